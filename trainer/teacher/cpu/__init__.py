"""The forward pass on the CPU: a product decodes one tile of rows and multiplies."""
