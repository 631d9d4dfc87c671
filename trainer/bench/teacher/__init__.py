"""The teacher's forward pass beside other engines."""
