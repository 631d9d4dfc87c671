"""A Hugging Face folder: its config.json and its weights."""
