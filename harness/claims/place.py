"""Places: what an experiment runs on. What was shown to fail on a CPU is shown to fail, whatever the machine's GPU."""

from collections.abc import Collection
from typing import Literal, TypeAlias, cast

from q4kd.harness.claims.model import Claim
from q4kd.harness.claims.profile import Profile

# The CPU; a GPU with memory of its own; a GPU that shares the CPU's memory.
Place: TypeAlias = Literal["cpu", "cuda", "unified"]
PLACES: tuple[Place, ...] = ("cpu", "cuda", "unified")


def accelerator(profile: Profile) -> Place:
    """Return where the CUDA experiments of a profile run; ``cpu`` for a profile that has none."""
    return cast("Place", next((name for name in ("unified", "cuda") if name in profile.provides), "cpu"))


def place_of(claim: Claim, experiment_needs: Collection[str], accelerated: Place) -> Place:
    """Return where a claim's experiment runs on a machine whose CUDA experiments run on ``accelerated``.

    An experiment that does not need CUDA runs on the CPU on every machine.
    """
    needs = {*experiment_needs, *(claim.falsifier.needs if claim.falsifier else ())}
    return accelerated if needs & {"cuda", "unified"} else "cpu"
