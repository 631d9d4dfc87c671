"""Settings: one field each, with bounds, unit and help; their flags, their YAML keys, their schema."""
