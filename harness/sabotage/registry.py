"""Faults are declared with these names; see ``runs/faults.py``."""

from q4kd.harness.runs.faults import Fault, MissingTarget, declare, get_fault, register, replace, resolve

__all__ = ["Fault", "MissingTarget", "declare", "get_fault", "register", "replace", "resolve"]
