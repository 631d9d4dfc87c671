"""A pair that somebody brought: its teacher beside transformers, and a whole run from the plan to the exported file."""
