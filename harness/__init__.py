"""The harness: contracts become falsifiers, which judge supervised runs of the real program and leave evidence."""
