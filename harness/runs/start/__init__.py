"""How the program of a run is started: as a process of its own, or forked from one that has imported torch."""
