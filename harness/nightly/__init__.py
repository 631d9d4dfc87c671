"""A night of validation: its stages, its state across a reboot, the disk it may fill."""
