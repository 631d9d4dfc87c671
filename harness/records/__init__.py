"""Raw records of runs: they are read within bounds, stored, redacted and packed."""
