"""Speed against other engines: every arm of a comparison is timed in the same run, turn by turn."""
