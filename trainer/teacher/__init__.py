"""The frozen teacher: what every forward pass is wrapped in, and its output head."""
