"""Model files that experiments read: small ones of every kind, split ones, and broken ones."""
