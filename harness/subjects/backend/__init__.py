"""The choice of a backend: decision tables, and runs that follow them."""
