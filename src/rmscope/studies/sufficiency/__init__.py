"""Which reported features move the reward when they are put in, and why the others do not."""
