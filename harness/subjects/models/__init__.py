"""Model files: what is read from them, and what is refused."""
