"""One student over several processes: copies (DDP) or shards (FSDP), and whole tensors from and to them.

The launcher decides: ``torchrun`` and ``accelerate launch`` give copies, ``accelerate launch --use_fsdp --fsdp_version
2`` shards. The teacher is whole in every process.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from q4kd.trainer.errors import InputError


def make_accelerator(device: str, **options: Any) -> Any:
    """Make ``accelerate.Accelerator`` for this process; it chooses the process's GPU among several.

    Args:
        device: cpu or cuda.
        options: further arguments of ``Accelerator``, such as ``log_with``.

    Raises:
        InputError: when the launcher asks for FSDP 1, DeepSpeed or another engine that this student is not written for.
    """
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, DistributedType

    # Every process reads the student's file, which they share in page cache; by default transformers gives all but one
    # of them empty weights.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    # student_dtype alone decides dtypes: a launcher's autocast would round again. Gradients live in the buckets that
    # are reduced, so that there is no second copy.
    handlers = [DistributedDataParallelKwargs(gradient_as_bucket_view=True)]
    accelerator = Accelerator(cpu=device == "cpu", mixed_precision="no", kwargs_handlers=handlers, **options)
    kind = accelerator.distributed_type
    copies = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)
    wrong = "" if kind in (*copies, DistributedType.FSDP) else str(kind.value)
    if _asks_for_shards() and os.environ.get("FSDP_VERSION", "1") != "2":
        wrong = "FSDP 1"
    if wrong:
        expected = "no engine, or --use_fsdp --fsdp_version 2"
        remedy = "add --fsdp_version 2" if wrong == "FSDP 1" else "leave that engine out"
        raise InputError("accelerate launch", expected=expected, got=wrong, remedy=remedy)
    return accelerator


def describe_processes(accelerator: Any) -> str:
    """Return how many processes there are and what each holds: a launcher may start fewer than it was asked for."""
    number = accelerator.num_processes
    if number == 1:
        return "processes: 1"
    return f"processes: {number}, each with a {'shard' if _asks_for_shards() else 'copy'} of the student"


def _asks_for_shards() -> bool:
    """Return whether ``accelerate launch --use_fsdp`` started this process."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


def will_shard(accelerator: Any) -> bool:
    """Return whether ``prepare_model`` cuts the model into shards: a whole one may not fit on a device."""
    return _asks_for_shards() and accelerator.num_processes > 1


def prepare_model(accelerator: Any, model: nn.Module) -> Any:
    """Return the model on its device, wrapped for the other processes. Its trained parameters may be new objects.

    accelerate shards on GPUs only. torch, which it calls, shards on CPUs too, so torch is called here: one unit for
    each of the student's layers (by the launcher's ``reshard_after_forward`` and ``offload_params``), and one for the
    rest, embedding and head, which is whole from the start of ``forward`` to the end of the backward pass.
    """
    if not will_shard(accelerator):
        return accelerator.prepare_model(model)
    from accelerate import FullyShardedDataParallelPlugin
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    plugin = FullyShardedDataParallelPlugin()
    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    policy = CPUOffloadPolicy() if isinstance(plugin.cpu_offload, CPUOffloadPolicy) else OffloadPolicy()
    layers = set(getattr(model, "_no_split_modules", None) or ())
    is_dropped = bool(plugin.reshard_after_forward)
    for module in model.modules():
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh, reshard_after_forward=is_dropped, offload_policy=policy)
    fully_shard(model, mesh=mesh, reshard_after_forward=False, offload_policy=policy)
    return model


def wait_for_all(accelerator: Any) -> None:
    """Return when every process has come here.

    On the CPU torch is asked itself: accelerate names a device by its index, which torch takes for one of the GPU where
    there is one, and then fails for every process beyond the number of GPUs.
    """
    if accelerator.num_processes > 1 and accelerator.device.type == "cpu":
        torch.distributed.barrier()
    else:
        accelerator.wait_for_everyone()


@contextlib.contextmanager
def without_sync(model: Any) -> Iterator[None]:
    """Let gradients add up in this process: only those of the last micro-batch are reduced over processes."""
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)
    else:
        with model.no_sync() if hasattr(model, "no_sync") else contextlib.nullcontext():
            yield


def reshard(model: Any) -> None:
    """Shard again the weights that a forward pass without a backward pass left whole."""
    if hasattr(model, "reshard"):
        model.reshard()


def is_sharded(tensor: Tensor) -> bool:
    """Return whether this process holds only a part of the tensor."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor: all of it where it is not sharded. Memory is shared with it."""
    own: Tensor = getattr(tensor, "to_local", lambda: tensor)()
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
    layout = {"shape": like.shape, "stride": like.stride()}
    return DTensor.from_local(part, like.device_mesh, like.placements, run_check=False, **layout).full_tensor()


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
    """Yield the whole parameters that are trained, by name; all processes must call it together."""
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
    """Return whole tensors on the host of the process that keeps them, with one at a time on the device.

    ``tensors`` are those of ``trained_tensors`` or ``MasterWeightOptimizer.tensors``.
    """
    # Where nothing is kept the tensors are made all the same: making one takes all processes.
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors if keep}


def whole_state(model: nn.Module, keep: bool) -> dict[str, Tensor]:
    """Return whole parameters and persistent buffers on the host of the process that keeps them, tied ones once.

    All processes must call it together.
    """
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - dict(model.named_parameters()).keys()
    state = model.state_dict().items()
    return gather(((name, whole(tensor, tensor)) for name, tensor in state if name not in tied), keep)
