"""The teacher's signal over every window, written once and read in its place."""
