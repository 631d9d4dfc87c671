"""What cannot fit is refused with its arithmetic; CUDA that is not there is refused with its remedy."""

import dataclasses
from pathlib import Path

import pytest
from teachers import load_quietly

from q4kd.trainer.demo import teacher_path
from q4kd.trainer.device.devices import AllocationPolicy, DeviceClass
from q4kd.trainer.device.placement import Place, check_fits, find_place, place_teacher
from q4kd.trainer.errors import InputError


def place(device_class: DeviceClass, budget: int, weight_bytes: int) -> Place:
    return Place("test device", device_class, AllocationPolicy("device", "test"), budget, weight_bytes)


@pytest.mark.parametrize(
    ("backend", "device_class", "weight_bytes", "short"),
    [("dense", "cpu", 4, True), ("dense", "classic", 2, True), ("q4k", "classic", 2, True), ("q4k", "cpu", 4, False)],
)
def test_weights_that_cannot_fit_are_refused(
    backend: str, device_class: DeviceClass, weight_bytes: int, short: bool
) -> None:
    placed = place_teacher(teacher_path(), backend=backend)
    needed = placed.model.num_weights * weight_bytes if backend == "dense" else placed.model.tensor_bytes

    def check(budget: int) -> None:
        check_fits(dataclasses.replace(placed, place=place(device_class, budget, weight_bytes)))

    check(needed)
    if short:
        with pytest.raises(InputError, match=r"expected \d+\.\d MB free .*got \d+\.\d MB"):
            check(needed - 1)
    else:  # a memory map always fits
        check(0)


def test_dense_that_does_not_fit_is_refused_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("q4kd.trainer.device.placement.mem_available", lambda: 1000)
    with pytest.raises(InputError, match="use --backend q4k"):
        load_quietly(teacher_path(), backend="dense")


def test_an_unquantised_teacher_stays_packed_where_dense_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from model_files import write_model

    monkeypatch.setattr("q4kd.trainer.device.placement.mem_available", lambda: 1000)
    model = write_model(tmp_path / "plain.gguf")
    teacher = load_quietly(model)
    assert teacher.choice.backend == "q4k"
    assert "would not fit" in teacher.choice.reason


def test_cuda_without_a_device_says_what_is_missing() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(InputError, match="expected a CUDA device"):
        find_place("cuda")
