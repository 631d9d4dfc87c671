"""Students of other families: which can be trained, told by their config alone."""
