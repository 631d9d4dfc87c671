"""The backend table is total and says why."""

import itertools

import pytest

from q4kd.trainer.device.backend import BACKENDS, OVERRIDES, backend_override, check_device, choose_backend
from q4kd.trainer.errors import InputError
from q4kd.trainer.formats.blocks.layout import FORMATS


def test_every_input_has_exactly_one_answer_with_a_reason() -> None:
    # All subsets of up to two types, and all of them: the answer depends on whether any is quantised.
    subsets = [subset for n in (0, 1, 2, len(FORMATS)) for subset in itertools.combinations(FORMATS, n)]
    for override, device, fits in itertools.product(OVERRIDES, ("cpu", "classic", "unified"), (True, False)):
        for types in subsets:
            choice = choose_backend(override, types, device, dense_fits=fits)  # type: ignore[arg-type]
            assert choice.backend in BACKENDS
            assert choice.reason
            if override != "auto":
                assert choice.backend == override
            else:
                packed = any(FORMATS[name].is_quantized for name in types)
                assert choice.backend == ("q4k" if packed or not fits else "dense")


def test_the_reason_names_the_types_and_the_device() -> None:
    reason = choose_backend("auto", ["Q6_K", "F32", "Q4_K"], "unified").reason
    assert "Q4_K and Q6_K" in reason
    assert "unified device" in reason


def test_option_beats_environment_beats_detection() -> None:
    variable = {"Q4KD_TEACHER_BACKEND": "dense"}
    assert backend_override("q4k", variable) == "q4k"
    assert backend_override(None, variable) == "dense"
    assert backend_override(None, {}) == "auto"


def test_unknown_values_are_refused() -> None:
    with pytest.raises(InputError, match="q4k or dense"):
        choose_backend("fast", ["Q4_K"])
    with pytest.raises(InputError, match="cpu or cuda"):
        check_device("tpu")
