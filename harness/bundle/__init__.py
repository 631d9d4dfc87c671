"""Evidence bundles: they are written, signed, verified from their raw records, compared and exported."""
