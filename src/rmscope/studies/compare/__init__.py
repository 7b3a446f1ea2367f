"""Two PMs compared on the same fresh texts: whether features are there in both, and what ablating them does in either."""
