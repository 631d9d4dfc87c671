"""Claims: contracts are read from YAML, checked, planned for a machine, and compared with older ones."""
