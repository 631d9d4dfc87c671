"""Chat templates and tokenizers of the kinds that published models have, and text on which they differ."""
