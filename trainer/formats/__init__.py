"""Model files: containers are walked within bounds, and block layouts are described and decoded."""
