"""Weights that a library draws from torch's random numbers, of which a process has one sequence for all its threads.

A session judges in several threads, and what another one draws or loads in between would change the weights: this once
gave a claim about a fresh student another student to begin from.
"""

import threading
from collections.abc import Callable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray

Arrays = Mapping[str, NDArray[np.float64]]

_ONE_AT_A_TIME = threading.Lock()
_TRIES = 8


def drawn_from(seed: int, draw: Callable[[], Arrays]) -> Arrays:
    """Return what ``draw`` makes of torch's random numbers after ``torch.manual_seed(seed)``, float64 by name.

    It is drawn until two in a row are equal, since whatever another thread draws changes one of them.

    Raises:
        RuntimeError: when no two in a row are.
    """
    with _ONE_AT_A_TIME:
        last: Arrays | None = None
        for _ in range(_TRIES):
            torch.manual_seed(seed)
            made = draw()
            if last is not None and _are_equal(made, last):
                return made
            last = made
    raise RuntimeError(f"expected equal weights twice in a row from seed {seed}, got others {_TRIES} times")


def _are_equal(one: Arrays, other: Arrays) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)
