"""From files to batches: documents are read, encoded, packed into windows and drawn in order."""
