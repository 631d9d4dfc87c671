"""What leaves a run: Hugging Face folders, GGUF files, model cards, and how faithful they are."""
