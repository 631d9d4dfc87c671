"""What is decided about a teacher before it is loaded: its place, dtype and backend, and whether it fits there."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from q4kd.trainer.device.backend import BackendChoice, backend_override, check_device, choose_backend
from q4kd.trainer.device.devices import (
    AllocationPolicy,
    DeviceClass,
    allocation_override,
    allocation_policy,
    check_allocation,
    classify,
    cuda_facts,
    mem_available,
    memory_budget,
)
from q4kd.trainer.device.dtypes import DtypeChoice, choose_dtype
from q4kd.trainer.device.memory_report import sized
from q4kd.trainer.errors import InputError
from q4kd.trainer.formats.model_file import ModelFile
from q4kd.trainer.formats.open import open_model

# Bytes of a decoded weight in each compute dtype.
DENSE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Place:
    """A device, its allocation policy and its budget."""

    name: str
    device_class: DeviceClass
    policy: AllocationPolicy  # how weights are allocated there, and why
    budget: int  # bytes that may be taken
    dense_weight_bytes: int  # bytes of a decoded weight in the compute dtype

    @property
    def device(self) -> Literal["cpu", "cuda"]:
        """Torch's name of the device type."""
        return "cpu" if self.device_class == "cpu" else "cuda"


@dataclass(frozen=True)
class TeacherPlacement:
    """What was decided about a teacher, once, for all that plan, load or describe it."""

    model: ModelFile  # opened and checked
    choice: BackendChoice  # whether its weights stay packed, and why
    dtype: DtypeChoice  # of its products, and why
    place: Place  # where its weights will lie

    @property
    def dense_bytes(self) -> int:
        """Bytes of all weights when each is decoded to the compute dtype."""
        return self.model.num_weights * self.place.dense_weight_bytes


def place_teacher(
    model: Path | ModelFile,
    *,
    backend: str | None = None,
    device: str = "cpu",
    dtype: str = "auto",
    positions: int | None = None,
) -> TeacherPlacement:
    """Decide how a teacher will be held. Nothing of it is loaded, and whether it fits is not judged.

    Args:
        model: GGUF or .apr file, which is opened here; or one that is open.
        backend: ``auto``, ``q4k`` or ``dense``; ``None`` means the environment variable or ``auto``.
        device: ``cpu`` or ``cuda``.
        dtype: of the matrix products: ``auto``, ``float32`` or ``bfloat16``.
        positions: of a forward pass, all sequences together, by which ``auto`` chooses on the CPU; None if not known.

    Raises:
        InputError: when the file, the device or an option cannot be used.
    """
    check_device(device)
    compute = choose_dtype(dtype, device, positions)
    place = find_place(device, compute.name)
    opened = open_model(model) if isinstance(model, Path) else model
    dense_fits = opened.num_weights * place.dense_weight_bytes <= place.budget
    override = backend_override(backend)
    choice = choose_backend(override, opened.bytes_by_type(), place.device_class, dense_fits=dense_fits)
    return TeacherPlacement(opened, choice, compute, place)


def find_place(device: str, dtype: str = "float32") -> Place:
    """Describe a device, ``cpu`` or ``cuda``, to which a teacher may be loaded to compute in ``dtype``.

    Raises:
        InputError: when CUDA cannot be used, or the allocation override cannot be followed.
    """
    if device == "cpu":
        policy = AllocationPolicy("device", "a memory map of the file")
        return Place("CPU", "cpu", policy, mem_available(), DENSE_BYTES[dtype])
    import torch

    facts = cuda_facts(torch.cuda.current_device() if torch.cuda.is_available() else 0)
    device_class = classify(facts.capability, facts.integrated)
    policy = allocation_policy(device_class, allocation_override())
    check_allocation(policy, device_class)
    free, _total = torch.cuda.mem_get_info()
    budget = memory_budget(device_class, int(free), mem_available())
    return Place(facts.name, device_class, policy, budget, DENSE_BYTES[dtype])


def check_fits(teacher: TeacherPlacement) -> None:
    """Refuse weights that cannot fit. Packed weights on the CPU are a memory map, which always fits.

    Raises:
        InputError: with the bytes that are needed and those that are free.
    """
    model, place, backend = teacher.model, teacher.place, teacher.choice.backend
    if backend == "dense":
        needed = teacher.dense_bytes
        sum_up = f"{model.num_weights:,} weights x {place.dense_weight_bytes} bytes"
    elif place.device_class == "cpu":
        return
    else:
        needed, sum_up = model.tensor_bytes, "packed"
    if needed > place.budget:
        subject, expected = f"{model.path}: the {backend} backend on {place.name}", f"{sized(needed)} free ({sum_up})"
        remedy = "use --backend q4k" if backend == "dense" else "free memory, or use a smaller teacher"
        raise InputError(subject, expected=expected, got=sized(place.budget), remedy=remedy)
