"""Runs that are killed, damaged, starved or given nonsense."""
