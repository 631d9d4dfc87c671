"""How far a run is: the part of its state that is neither weights nor optimizer."""

from dataclasses import dataclass


@dataclass
class Progress:
    """How far a run is: all that changes while it trains, beside weights and optimizer.

    Attributes:
        done: steps that are taken.
        is_evaluated: whether the state after them is evaluated.
        leg_steps: steps since the run was started or resumed.
        training_seconds: seconds of these steps and of their data.
        first_step_seconds: seconds of the first of them, which loads and compiles what the others find ready.
    """

    done: int = 0
    is_evaluated: bool = False
    leg_steps: int = 0
    training_seconds: float = 0.0
    first_step_seconds: float = 0.0

    def count_step(self, seconds: float) -> None:
        """Count a step that took so long, with its data."""
        self.done += 1
        self.leg_steps += 1
        self.is_evaluated = False
        self.first_step_seconds = self.first_step_seconds or seconds
        self.training_seconds += seconds
