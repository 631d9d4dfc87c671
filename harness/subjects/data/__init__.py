"""Training data: documents, windows, batches, and what is refused."""
