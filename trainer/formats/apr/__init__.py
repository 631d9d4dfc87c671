"""The .apr container, aprender's."""
