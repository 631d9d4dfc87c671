"""Measurements of the fused loss: values and gradients in every mode and of cached teachers, and what it allocates."""

import argparse
import io
import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from q4kd.trainer.files import write_atomic, write_json


def fused_losses(arguments: list[str]) -> int:
    """Evaluate the loss and its gradients for every case of the input; see ``experiments_fused.loss_cases``.

    Arrays: student ``hidden [M, H]`` and ``weight [V, H]``, float32 (bfloat16 on CUDA, where the given values are
    exact in it), ``teacher_hidden [M, H']``, ``teacher_weight [V', H']``, ``labels [M]``, and for the cached teacher
    ``ids-k`` and ``log_probs-k [M, k]`` with ``tail-k [M]``.
    """
    parser = argparse.ArgumentParser()
    for option in ("--inputs", "--out"):
        parser.add_argument(option, type=Path, required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args(arguments)

    with np.load(args.inputs, allow_pickle=False) as arrays:
        given = dict(arrays)
    results: dict[str, Any] = {}
    for name, settings in json.loads(str(given["cases"])).items():
        terms, grad_hidden, grad_weight = _evaluate(given, settings, args.device)
        results[f"{name}-terms"] = np.array([float(terms.loss.detach()), float(terms.ce), float(terms.kd)])
        results[f"{name}-grad_hidden"] = grad_hidden.float().cpu().numpy()
        results[f"{name}-grad_weight"] = grad_weight.float().cpu().numpy()
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **results)
    write_atomic(args.out, buffer.getvalue())
    return 0


def _evaluate(given: dict[str, Any], settings: dict[str, Any], device: str) -> tuple[Any, Any, Any]:
    import torch

    from q4kd.trainer.kd_loss import kd_loss
    from q4kd.trainer.loss_config import KDLossConfig
    from q4kd.trainer.loss_topk import topk_kd_loss
    from q4kd.trainer.teacher_head import DenseHead

    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    arrays = {name: torch.from_numpy(array).to(device) for name, array in given.items() if name != "cases"}
    hidden, weight = (arrays[name].to(dtype).requires_grad_() for name in ("hidden", "weight"))
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
    loss: Any = terms.loss
    loss.backward()
    return terms, hidden.grad, weight.grad


def loss_allocations(arguments: list[str]) -> int:
    """Run the loss, forward and backward, while every operator's result is recorded from outside it.

    ``--cases`` is a JSON file: case to ``{"tokens", "vocab", "hidden", "teacher_hidden", "padding", "config"}``. Of
    each case are written: tensors made, the ten largest shapes, and the most bytes that what was made held together.
    """
    parser = argparse.ArgumentParser()
    for option in ("--cases", "--out"):
        parser.add_argument(option, type=Path, required=True)
    args = parser.parse_args(arguments)
    cases = json.loads(args.cases.read_text(encoding="utf-8"))
    write_json(args.out, {name: _record(case) for name, case in cases.items()})
    return 0


def _record(case: dict[str, Any]) -> dict[str, Any]:
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    from q4kd.trainer.kd_loss import kd_loss
    from q4kd.trainer.loss_config import KDLossConfig
    from q4kd.trainer.teacher_head import DenseHead

    class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]
        """Storages that operators made: the shapes they have, and the bytes of those still alive."""

        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]
            self.held: dict[int, tuple[Any, int]] = {}
            self.shapes: set[tuple[int, ...]] = set()
            self.made = self.peak = 0

        def __torch_dispatch__(self, function: Any, _kinds: Any, given: Any = (), options: Any = None) -> Any:
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

    def normal(rows: int, columns: int) -> Any:
        return (torch.randn(rows, columns, generator=generator) * columns**-0.5).bfloat16()

    student, weight = normal(tokens, hidden).requires_grad_(), normal(vocab, hidden).requires_grad_()
    teacher, head = normal(tokens, source).float(), DenseHead(normal(vocab + case["padding"], source).float())
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    config = KDLossConfig(**case["config"])
    with Allocations() as seen:
        terms = kd_loss(
            student,
            weight,
            labels,
            teacher_hidden=teacher,
            teacher_head=head,
            num_targets=float(tokens),
            config=config,
        )
        loss: Any = terms.loss
        loss.backward()
    largest = sorted(seen.shapes, key=lambda shape: -np.prod(shape, dtype=np.int64))[:10]
    return {"made": seen.made, "largest": [list(shape) for shape in largest], "peak_bytes": seen.peak}
