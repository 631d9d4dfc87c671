"""Whole runs of the program: logs, progress, plans, smoke runs, vocabularies."""
