"""The harness: contracts become falsifiers, falsifiers judge supervised runs of the real program, verdicts leave proof."""
