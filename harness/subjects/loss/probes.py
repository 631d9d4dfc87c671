"""Measurements of the fused loss: values and gradients in every mode and of cached teachers, and what it allocates."""

import functools
import json
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from q4kd.harness.inputs.arrays import Arrays, read_arrays, save_arrays
from q4kd.harness.records.json_types import JsonObject
from q4kd.harness.runs.probes import probe
from q4kd.trainer.files import read_json, write_json

if TYPE_CHECKING:
    from torch import Tensor

    from q4kd.trainer.loss.sums import LossTerms


@probe("kd-loss")
def kd_loss_cases(inputs: Path, out: Path) -> None:
    """Evaluate the trainer's fused loss and its gradients on given arrays and settings."""
    import torch

    from q4kd.trainer.loss.config import KDLossConfig
    from q4kd.trainer.loss.fused import kd_loss

    given = read_arrays(inputs)
    teacher_hidden = torch.from_numpy(given["teacher_hidden"])
    teacher_weight = torch.from_numpy(given["teacher_weight"])
    labels = torch.from_numpy(given["labels"])
    results: Arrays = {}
    for name, settings in json.loads(str(given["cases"])).items():
        scale = settings.pop("scale", 1.0)
        equal = settings.pop("equal", False)
        hidden = (torch.from_numpy(given["hidden"]) * scale).requires_grad_(True)
        weight = torch.from_numpy(given["weight"]).clone().requires_grad_(True)
        source, head = (hidden.detach(), weight.detach()) if equal else (teacher_hidden * scale, teacher_weight)
        teacher: dict[str, Any] = {"teacher_hidden": source, "teacher_head": functools.partial(_project, head)}
        num_targets, config = float((labels >= 0).sum()), KDLossConfig(**settings)
        terms = kd_loss(hidden, weight, labels, **teacher, num_targets=num_targets, config=config)
        results |= _differentiated(name, terms, hidden, weight)
    save_arrays(out, results)


def _project(weight_VH: "Tensor", rows_MH: "Tensor") -> "Tensor":
    return rows_MH @ weight_VH.T


def _differentiated(name: str, terms: "LossTerms", hidden: "Tensor", weight: "Tensor") -> Arrays:
    """Return the terms of a loss and, after its backward pass, both gradients, by the name of the case."""
    import torch

    torch.autograd.backward(terms.loss)
    assert hidden.grad is not None and weight.grad is not None
    return {
        f"{name}-terms": np.array([float(terms.loss.detach()), float(terms.ce), float(terms.kd)]),
        f"{name}-grad_hidden": hidden.grad.float().cpu().numpy(),
        f"{name}-grad_weight": weight.grad.float().cpu().numpy(),
    }


@probe("fused-losses")
def fused_losses(inputs: tuple[Path, ...], out: Path, device: Literal["cpu", "cuda"] = "cpu") -> None:
    """Evaluate the loss and its gradients for every case of the inputs; see ``loss_cases`` in ``fused.py``.

    Arrays: student ``hidden [M, H]`` and ``weight [V, H]``, float32 (bfloat16 on CUDA, where the given values are
    exact in it), ``teacher_hidden [M, H']``, ``teacher_weight [V', H']``, ``labels [M]``, and for the cached teacher
    ``ids-k`` and ``log_probs-k [M, k]`` with ``tail-k [M]``.
    """
    results: Arrays = {}
    for path in inputs:
        given = read_arrays(path)
        for name, settings in json.loads(str(given["cases"])).items():
            results |= _evaluate(name, given, settings, device)
    save_arrays(out, results)


def _evaluate(name: str, given: Arrays, settings: dict[str, Any], device: str) -> Arrays:
    import torch

    from q4kd.trainer.loss.config import KDLossConfig
    from q4kd.trainer.loss.fused import kd_loss
    from q4kd.trainer.loss.teacher_head import DenseHead
    from q4kd.trainer.loss.topk import topk_kd_loss

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    arrays = {key: torch.from_numpy(array).to(device) for key, array in given.items() if key != "cases"}
    hidden, weight = (arrays[key].to(dtype).requires_grad_() for key in ("hidden", "weight"))
    labels, settings = arrays["labels"], dict(settings)
    listed, num_targets = settings.pop("listed", None), float((labels >= 0).sum())
    config = KDLossConfig(**settings)
    if listed is None:
        terms = kd_loss(
            hidden,
            weight,
            labels,
            teacher_hidden=arrays["teacher_hidden"].to(dtype),
            teacher_head=DenseHead(arrays["teacher_weight"].to(dtype)),
            num_targets=num_targets,
            config=config,
        )
    else:
        terms = topk_kd_loss(
            hidden,
            weight,
            labels,
            topk_ids_MK=arrays[f"ids-{listed}"],
            topk_log_probs_MK=arrays[f"log_probs-{listed}"],
            tail_log_prob_M=arrays[f"tail-{listed}"],
            num_targets=num_targets,
            config=config,
        )
    return _differentiated(name, terms, hidden, weight)


@probe("loss-allocations")
def loss_allocations(cases: Path, out: Path) -> None:
    """Run the loss, forward and backward, while every operator's result is recorded from outside it.

    ``--cases`` is a JSON file: case to ``{"tokens", "vocab", "hidden", "teacher_hidden", "padding", "config"}``. Of
    each case are written: tensors made, the ten largest shapes, and the most bytes that what was made held together.
    """
    write_json(out, {name: _record(case) for name, case in read_json(cases).items()})


def _record(case: dict[str, Any]) -> JsonObject:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from q4kd.trainer.loss.config import KDLossConfig
    from q4kd.trainer.loss.fused import kd_loss
    from q4kd.trainer.loss.teacher_head import DenseHead

    class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
        """Storages that operators made: the shapes they have, and the bytes of those still alive."""

        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.held: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
            self.shapes: set[tuple[int, ...]] = set()
            self.made = self.peak = 0

        def __torch_dispatch__(self, function: Any, _kinds: object, given: Any = (), options: Any = None) -> object:
            result = function(*given, **(options or {}))
            known = {x.untyped_storage().data_ptr() for x in tree_leaves((given, options)) if torch.is_tensor(x)}
            for tensor in filter(torch.is_tensor, tree_leaves(result)):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in known:
                    self.made += 1
                    self.shapes.add(tuple(tensor.shape))
                    self.held[storage.data_ptr()] = (weakref.ref(storage), storage.nbytes())
            self.held = {key: entry for key, entry in self.held.items() if entry[0]() is not None}
            self.peak = max(self.peak, sum(size for _, size in self.held.values()))
            return result

    generator = torch.Generator().manual_seed(3)
    tokens, vocab, hidden, source = (case[name] for name in ("tokens", "vocab", "hidden", "teacher_hidden"))

    def normal(rows: int, columns: int) -> "Tensor":
        drawn: Tensor = torch.randn(rows, columns, generator=generator) * columns**-0.5
        return drawn.bfloat16()

    student, weight = normal(tokens, hidden).requires_grad_(), normal(vocab, hidden).requires_grad_()
    teacher, head = normal(tokens, source).float(), DenseHead(normal(vocab + case["padding"], source).float())
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    config = KDLossConfig(**case["config"])
    with Allocations() as seen:
        terms = kd_loss(
            student, weight, labels, teacher_hidden=teacher, teacher_head=head, num_targets=float(tokens), config=config
        )
        torch.autograd.backward(terms.loss)
    largest = sorted(seen.shapes, key=lambda shape: -np.prod(shape, dtype=np.int64))[:10]
    return {"made": seen.made, "largest": [list(shape) for shape in largest], "peak_bytes": seen.peak}
