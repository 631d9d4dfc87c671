"""Where a teacher's weights will lie, how much room there is, and the refusal when it is too little."""

from dataclasses import dataclass

from q4kd.trainer.backend import BackendChoice
from q4kd.trainer.device import (
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
from q4kd.trainer.errors import InputError
from q4kd.trainer.memory_report import sized
from q4kd.trainer.model_file import ModelFile

# Bytes of a decoded weight in each compute dtype.
DENSE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Place:
    """A device, its allocation policy and its budget.

    Attributes:
        name: of the device.
        device_class: of the device.
        policy: how weights are allocated there, and why.
        budget: bytes that may be taken.
        dense_weight_bytes: bytes of a decoded weight in the compute dtype.
    """

    name: str
    device_class: DeviceClass
    policy: AllocationPolicy
    budget: int
    dense_weight_bytes: int


def find_place(device: str, dtype: str = "float32") -> Place:
    """Look at a device, ``cpu`` or ``cuda``, that a teacher shall be loaded to and compute on in ``dtype``.

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
    return Place(
        facts.name, device_class, policy, memory_budget(device_class, int(free), mem_available()), DENSE_BYTES[dtype]
    )


def check_fits(model: ModelFile, choice: BackendChoice, place: Place) -> None:
    """Refuse weights that cannot fit. On the CPU packed weights are a memory map, which always does.

    Raises:
        InputError: with the bytes that are needed and those that are free.
    """
    if choice.backend == "dense":
        needed = model.num_weights * place.dense_weight_bytes
        sum_up = f"{model.num_weights:,} weights x {place.dense_weight_bytes} bytes"
    elif place.device_class == "cpu":
        return
    else:
        needed, sum_up = model.tensor_bytes, "packed"
    if needed > place.budget:
        raise InputError(
            f"{model.path}: the {choice.backend} backend on {place.name}",
            expected=f"{sized(needed)} free ({sum_up})",
            got=sized(place.budget),
            remedy="use --backend q4k" if choice.backend == "dense" else "free memory, or use a smaller teacher",
        )
