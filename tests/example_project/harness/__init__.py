"""A merge sort, and what falsifies it."""
