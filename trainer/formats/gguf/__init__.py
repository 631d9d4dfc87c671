"""The GGUF container: its header, tensors, vocabulary and tokenizer are read and written."""
