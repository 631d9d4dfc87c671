"""The public import path of what another project's experiments are made of; see ``runs/experiment.py``."""

from q4kd.harness.runs.experiment import EXPERIMENTS, Arm, Experiment, Inputs, get_experiment, register

__all__ = ["EXPERIMENTS", "Arm", "Experiment", "Inputs", "get_experiment", "register"]
