"""One student over several processes: copies (DDP) or shards (FSDP), and whole tensors from and to them.

The launcher decides: ``torchrun`` and ``accelerate launch --multi_gpu`` give copies, ``accelerate launch --use_fsdp
--fsdp_version 2`` shards. The teacher is whole in every process.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from q4kd.trainer.errors import InputError


def make_accelerator(device: str) -> Any:
    """Make ``accelerate.Accelerator`` for this process; it chooses the process's GPU among several.

    Raises:
        InputError: when the launcher asks for FSDP 1, DeepSpeed or another engine that this student is not written for.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, DistributedType

    # Gradients live in the buckets that are reduced: no second copy. Buffers are constants, equal in every process.
    copies = DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)
    # student_dtype alone decides dtypes: a launcher's autocast would round again.
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no", kwargs_handlers=[copies])
    kind = accelerator.distributed_type
    plain = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    if kind not in plain and not accelerator.is_fsdp2:
        raise InputError(
            "accelerate launch",
            expected="no engine, or --use_fsdp --fsdp_version 2",
            got="FSDP 1" if kind == DistributedType.FSDP else str(kind.value),
            remedy="add --fsdp_version 2" if kind == DistributedType.FSDP else "leave that engine out",
        )
    return accelerator


def prepare_model(accelerator: Any, model: nn.Module) -> Any:
    """Return the model on its device, wrapped for the other processes. Its trained parameters may be new objects."""
    if not accelerator.is_fsdp2:
        return accelerator.prepare_model(model)
    # accelerate shards a model only beside an optimizer. Ours is made afterwards, from the shards: this one is dropped.
    placeholder = torch.optim.SGD(model.parameters(), lr=0.0)
    prepared, _ = accelerator.prepare(model, placeholder)
    accelerator._optimizers.clear()
    return prepared


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part of the tensor only."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor: all of it where it is not sharded. Memory is shared with it."""
    own: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return own


def whole(parameter: Tensor, part: Tensor) -> Tensor:
    """Return the whole tensor of which each process holds a ``part``, sharded as ``parameter`` is.

    All processes must call it together where the parameter is sharded.
    """
    if not is_sharded(parameter):
        return part
    from torch.distributed.tensor import DTensor

    if is_sharded(part):
        return part.full_tensor()  # type: ignore[attr-defined, no-any-return]
    like: Any = parameter
    sharded = DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )
    return sharded.full_tensor()


def shard_like(parameter: Tensor, value: Tensor) -> Tensor:
    """Return this process's part of a whole tensor, sharded as ``parameter`` is, on its device.

    All processes must call it together where the parameter is sharded; the main one's value counts.
    """
    value = value.to(parameter.device)
    if not is_sharded(parameter):
        return value
    from torch.distributed.tensor import distribute_tensor

    like: Any = parameter
    return distribute_tensor(value, like.device_mesh, like.placements).to_local()


def trained_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters that are trained, whole, by name: with adapters these alone. All processes together."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield name, whole(parameter, parameter.detach())


@torch.no_grad()
def load_trained_tensors(model: nn.Module, tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Take over what ``trained_tensors`` gave.

    Raises:
        ValueError: for a missing or unknown name, or another shape.
    """
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    given = dict(tensors)
    if given.keys() != parameters.keys():
        different = sorted(given.keys() ^ parameters.keys())
        raise ValueError(f"{len(different)} tensors are missing or unknown, such as {different[0]}")
    for name, parameter in parameters.items():
        if given[name].shape != parameter.shape:
            raise ValueError(f"{name}: shape {tuple(given[name].shape)}, expected {tuple(parameter.shape)}")
        local(parameter).copy_(shard_like(parameter, given[name]))


def gather(tensors: Iterable[tuple[str, Tensor]], keep: bool) -> dict[str, Tensor]:
    """Return whole tensors on the host where ``keep``, one at a time on the device; elsewhere nothing is kept.

    Args:
        tensors: as ``trained_tensors`` and ``MasterWeightOptimizer.tensors`` give them.
        keep: whether this is the process that writes.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if keep:
            found[name] = tensor.detach().cpu().contiguous()
    return found


def whole_state(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """Return parameters and persistent buffers, whole, on the host of the process that keeps them; tied ones once.

    All processes together.
    """
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - dict(model.named_parameters()).keys()
    state = model.state_dict().items()
    return gather(((name, whole(tensor, tensor)) for name, tensor in state if name not in tied), keep)
