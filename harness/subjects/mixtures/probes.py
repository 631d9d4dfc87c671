"""Measurements on mixtures of experts inside the child: their logits in several cuts, and which experts are decoded."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from q4kd.harness.inputs.arrays import Array, Arrays, read_arrays, save_arrays
from q4kd.harness.runs.probes import probe

if TYPE_CHECKING:
    import torch

    from q4kd.trainer.formats.model_file import ModelFile
    from q4kd.trainer.teacher.forward import Forward

Device = Literal["cpu", "cuda"]
# Experts of the mixture decoded at once, and rows held at once, so that a small model is cut as a large one is.
SLAB_EXPERTS, SLAB_ROWS = 3, 200


@probe("mixture-passes")
def mixture_passes(ids: Path, out: Path, models: tuple[Path, ...], device: Device) -> None:
    """Compute logits of mixtures, ``<way>-<stem>-<case>``, float32 ``[B, T, V]``, for each file, each case and way.

    The ways are ``float32`` and ``bfloat16``; ``slabs``, float32 in which few experts and rows are held at a time (on
    the CPU experts always come one by one); and ``cpu``, float32 on the CPU.

    ``--ids`` holds ``<case>``, int ``[B, T]``, and ``<case>-starts`` where a sequence holds several documents.
    """
    from q4kd.trainer.formats.open import open_model
    from q4kd.trainer.teacher.forward import build_forward

    given, found = read_arrays(ids), Arrays()
    for path in models:
        model = open_model(path)
        ways: dict[str, Callable[[], Forward]] = {
            "float32": lambda model=model: build_forward(model, "q4k", device, "float32"),  # type: ignore[misc]
            "bfloat16": lambda model=model: build_forward(model, "q4k", device, "bfloat16"),  # type: ignore[misc]
            "slabs": lambda model=model: _in_slabs(model, device),  # type: ignore[misc]
            "cpu": lambda model=model: build_forward(model, "q4k", "cpu", "float32"),  # type: ignore[misc]
        }
        for way, load in ways.items():
            forward = load()
            for case in _cases(given):
                found[f"{way}-{path.stem}-{case}"] = _logits(forward, given, case)
    save_arrays(out, found)


def _in_slabs(model: "ModelFile", device: Device) -> "Forward":
    import torch

    from q4kd.trainer.teacher.forward import build_forward

    if device == "cpu":
        return build_forward(model, "q4k", "cpu", "float32")
    from q4kd.trainer.teacher.cuda import load

    expert_bytes = 4 * 2 * model.config.expert_ffn_size * model.config.hidden_size
    bounds = {"slab_bytes": SLAB_EXPERTS * expert_bytes, "expert_rows": SLAB_ROWS}
    return load.load_forward(model, "q4k", dtype=torch.float32, **bounds)  # type: ignore[arg-type]


def _cases(given: Arrays) -> Iterator[str]:
    return (name for name in given if not name.endswith("-starts"))


def _logits(forward: "Forward", given: Arrays, case: str) -> Array:
    import torch

    ids_BT = torch.from_numpy(given[case]).long()
    starts = given.get(f"{case}-starts")
    starts_BT = None if starts is None else torch.from_numpy(starts).long()
    hidden = forward.hidden(ids_BT.to(forward.device), None if starts_BT is None else starts_BT.to(forward.device))
    logits: Array = forward.head_logits(hidden.flatten(0, 1)).view(*ids_BT.shape, -1).float().cpu().numpy()
    return logits


@probe("expert-decodes")
def expert_decodes(ids: Path, out: Path, model: Path, device: Device) -> None:
    """Record which experts of a model of one layer are decoded in a pass: bool ``[E]`` for each case of ids."""
    from q4kd.trainer.formats.open import open_model
    from q4kd.trainer.teacher.forward import build_forward

    opened, given, found = open_model(model), read_arrays(ids), Arrays()
    forward = build_forward(opened, "q4k", device, "float32")
    for case in _cases(given):
        with (_watched_cpu if device == "cpu" else _watched_cuda)(opened) as decoded:
            _logits(forward, given, case)
        found[case] = decoded
    save_arrays(out, found)


@contextmanager
def _watched_cuda(model: "ModelFile") -> Iterator[Array]:
    """Yield bool ``[E]``: the experts whose place in the scratch a decoder has written."""
    import numpy as np
    import torch

    from q4kd.trainer.kernels.expert_kernels import ExpertKernels

    original, seen = ExpertKernels.decode_experts, np.zeros(model.config.num_experts, bool)

    def watched(
        self: ExpertKernels, kind: str, packed: "torch.Tensor", cols: int, experts: int, first: int, ends: Any, out: Any
    ) -> None:
        out.fill_(torch.nan)
        original(self, kind, packed, cols, experts, first, ends, out)
        written = ~out.isnan().flatten(1).all(1)
        seen[first : first + len(out)] |= written.cpu().numpy()

    ExpertKernels.decode_experts = watched  # type: ignore[assignment, method-assign]
    try:
        yield seen
    finally:
        ExpertKernels.decode_experts = original  # type: ignore[method-assign]


@contextmanager
def _watched_cpu(model: "ModelFile") -> Iterator[Array]:
    """Yield bool ``[E]``: the experts whose packed bytes a decoder has read."""
    import numpy as np

    from q4kd.trainer.teacher.cpu import weights

    original, seen = weights.decode_rows, np.zeros(model.config.num_experts, bool)  # type: ignore[attr-defined]
    tensors = [model.tensors[f"blk.0.ffn_{part}_exps.weight"] for part in ("gate", "up", "down")]

    def watched(kind: str, packed: "torch.Tensor", out: "torch.Tensor", scale: float = 1.0) -> "torch.Tensor":
        for tensor in tensors:
            offset = packed.data_ptr() - tensor.data.ctypes.data
            if 0 <= offset < tensor.num_bytes:
                size = tensor.num_bytes // tensor.shape[0]
                seen[offset // size : -(-(offset + packed.nbytes) // size)] = True
        return original(kind, packed, out, scale)

    weights.decode_rows = watched  # type: ignore[assignment, attr-defined]
    try:
        yield seen
    finally:
        weights.decode_rows = original  # type: ignore[attr-defined]
