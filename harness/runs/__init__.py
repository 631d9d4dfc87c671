"""Supervised runs: experiments and faults are declared, children are started and watched from outside."""
