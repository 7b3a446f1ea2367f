"""Two PMs compared on the same fresh texts: whether features are there in both, and what removing them does in either."""
