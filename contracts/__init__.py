"""Package data only: see the files beside this one."""
