"""Weights drawn from torch's random numbers are those of their seed, whatever other threads draw."""

import threading

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from q4kd.harness.oracles.drawing import drawn_from  # noqa: E402


def _draw() -> dict[str, np.ndarray]:
    return {"a": torch.randn(7).double().numpy(), "b": torch.rand(3).double().numpy()}


def test_what_another_thread_draws_in_between_changes_nothing() -> None:
    torch.manual_seed(3)
    alone = _draw()
    disturbed = iter([True, False, False])

    def draw() -> dict[str, np.ndarray]:
        if next(disturbed):
            other = threading.Thread(target=torch.randn, args=(1,))
            other.start()
            other.join()
        return _draw()

    found = drawn_from(3, draw)
    assert all(np.array_equal(found[name], alone[name]) for name in alone)
    assert next(disturbed, None) is None


def test_weights_that_are_never_twice_the_same_are_no_reference() -> None:
    numbers = iter(range(100))
    with pytest.raises(RuntimeError, match="expected equal weights twice in a row from seed 5"):
        drawn_from(5, lambda: {"a": np.array([float(next(numbers))])})
