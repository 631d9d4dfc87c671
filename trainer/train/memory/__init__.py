"""What a run will take, phase by phase, and what helps when it does not fit."""
