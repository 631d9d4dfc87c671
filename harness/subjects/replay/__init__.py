"""Real runs of several steps, recomputed in float64 from their files and settings alone."""
