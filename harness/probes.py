"""Measurements inside the child that no user command offers: each calls the trainer's real functions and only records.

A probe computes no reference and draws no conclusion; the harness does both, in another process.
"""

import argparse
import functools
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from q4kd.harness.probes_accelerator import forward_times, unified_allocation
from q4kd.harness.probes_backend import decision_tables
from q4kd.harness.probes_cache import cache_interrupted
from q4kd.harness.probes_cuda import cuda_busy, cuda_decode, cuda_hold
from q4kd.harness.probes_data import packed_logits, training_batches
from q4kd.harness.probes_export import exported_models
from q4kd.harness.probes_loss import fused_losses, loss_allocations
from q4kd.harness.probes_models import model_logits, open_models
from q4kd.harness.probes_precision import cuda_products, dense_logits
from q4kd.harness.probes_robust import damaged_resumes, ended_run, killed_runs
from q4kd.harness.probes_runs import distill_timed, start_runs, vocabulary_widths
from q4kd.harness.probes_student import distill_ranks, refused_settings, student_steps
from q4kd.trainer.files import write_atomic, write_json


def _save_arrays(path: Path, arrays: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_atomic(path, buffer.getvalue())


def frozen_teacher(arguments: list[str]) -> int:
    """Ask the teacher for gradients in every way a user might, and for the valid twin of each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)

    import torch

    from q4kd.trainer.events import EventLog
    from q4kd.trainer.teacher import load_teacher

    teacher = load_teacher(args.model, dtype="float32", events=EventLog(None))
    ids = torch.arange(8).unsqueeze(0)
    hidden = teacher.hidden(ids)[0]

    def no_graph() -> None:
        logits = teacher.logits(ids)
        if logits.requires_grad or logits.grad_fn is not None:
            raise AssertionError("logits carry a gradient function")

    def trained_through() -> None:
        loss: Any = teacher.head_logits(hidden.clone().requires_grad_(True)).sum()
        loss.backward()

    cases: list[tuple[str, Callable[[], object], Callable[[], object]]] = [
        ("requires_grad_", lambda: teacher.requires_grad_(True), lambda: teacher.requires_grad_(False)),
        ("parameters", lambda: list(teacher.parameters()), no_graph),
        ("backward", lambda: teacher.backward(), no_graph),
        ("gradient through the head", trained_through, lambda: teacher.head_logits(hidden)),
    ]
    records = [
        {"case": name, "error": _outcome(invalid), "twin": f"{name}, valid", "twin_error": _outcome(valid)}
        for name, invalid, valid in cases
    ]
    write_json(args.out, {"cases": records})
    return 0


def _outcome(action: Callable[[], object]) -> str | None:
    """Return the type name of what ``action`` raises, or None."""
    try:
        action()
    except Exception as error:  # the type of whatever comes is the observation
        return type(error).__name__
    return None


def superblock(arguments: list[str]) -> int:
    """Decode given blocks and multiply by them with the trainer's own functions."""
    parser = argparse.ArgumentParser()
    for option in ("--blocks", "--out", "--facts"):
        parser.add_argument(option, type=Path, required=True)
    args = parser.parse_args(arguments)

    import torch

    from q4kd.trainer.formats import FORMATS, SUPERBLOCK
    from q4kd.trainer.model_file import PackedTensor
    from q4kd.trainer.quant import decode_rows
    from q4kd.trainer.weights import PackedMatrix, Scratch

    with np.load(args.blocks, allow_pickle=False) as arrays:
        blocks = dict(arrays)
    activations = torch.from_numpy(blocks["activations"])

    def decode(name: str, packed: Any) -> Any:
        # Poisoned first: an element that the decoder leaves out shows as NaN.
        out = torch.full((len(packed), SUPERBLOCK), torch.nan)
        return decode_rows(name, torch.from_numpy(packed), out).numpy()

    def matrix(name: str, packed: Any) -> PackedMatrix:
        # A scratch of 20 rows makes the product run over several tiles, the last one short.
        tensor = PackedTensor("probe", name, (len(packed), SUPERBLOCK), packed)
        return PackedMatrix(tensor, Scratch(20 * SUPERBLOCK * 4))

    def multiply(name: str, packed: Any) -> Any:
        return matrix(name, packed).product(activations).numpy()

    results = {
        "q4_k": decode("Q4_K", blocks["q4_k"]),
        "q6_k": decode("Q6_K", blocks["q6_k"]),
        "q6_k-zero": decode("Q6_K", blocks["q6_k-zero"]),
        "q4_k-product": multiply("Q4_K", blocks["q4_k"]),
        "q6_k-product": multiply("Q6_K", blocks["q6_k"]),
        "q4_k-offset": multiply("Q4_K", blocks["q4_k-offset"]),
    }
    _save_arrays(args.out, results)
    k_quants = {name: form for name, form in FORMATS.items() if form.is_quantized and name.lower() in blocks}
    tables: dict[str, dict[str, object]] = {
        # What a matrix really holds, not what the format says.
        "superblock_bytes": {
            name: matrix(name, blocks[name.lower()]).resident_bytes // len(blocks[name.lower()]) for name in k_quants
        },
        "row_bytes": {
            f"{name} x {columns}": form.row_bytes(columns)
            for name, form in k_quants.items()
            for columns in (256, 512, 3584, 18944)
        },
        "not_finite": {name: int((~np.isfinite(results[name.lower()])).sum()) for name in k_quants},
    }
    write_json(args.facts, {"tables": tables})
    return 0


def _project(weight: Any, rows: Any) -> Any:
    return rows @ weight.T


def kd_loss_cases(arguments: list[str]) -> int:
    """Evaluate the trainer's fused loss and its gradients on given arrays and settings."""
    parser = argparse.ArgumentParser()
    for option in ("--inputs", "--out"):
        parser.add_argument(option, type=Path, required=True)
    args = parser.parse_args(arguments)

    import torch

    from q4kd.trainer.kd_loss import kd_loss
    from q4kd.trainer.loss_config import KDLossConfig

    with np.load(args.inputs, allow_pickle=False) as arrays:
        given = dict(arrays)
    teacher_hidden = torch.from_numpy(given["teacher_hidden"])
    teacher_weight = torch.from_numpy(given["teacher_weight"])
    labels = torch.from_numpy(given["labels"])
    results: dict[str, Any] = {}
    for name, settings in json.loads(str(given["cases"])).items():
        scale = settings.pop("scale", 1.0)
        equal = settings.pop("equal", False)
        hidden = (torch.from_numpy(given["hidden"]) * scale).requires_grad_(True)
        weight = torch.from_numpy(given["weight"]).clone().requires_grad_(True)
        source, head = (hidden.detach(), weight.detach()) if equal else (teacher_hidden * scale, teacher_weight)
        terms = kd_loss(
            hidden,
            weight,
            labels,
            teacher_hidden=source,
            teacher_head=functools.partial(_project, head),
            num_targets=float((labels >= 0).sum()),
            config=KDLossConfig(**settings),
        )
        loss: Any = terms.loss
        loss.backward()
        assert hidden.grad is not None and weight.grad is not None
        results[f"{name}-terms"] = np.array([float(terms.loss.detach()), float(terms.ce), float(terms.kd)])
        results[f"{name}-grad_hidden"] = hidden.grad.numpy()
        results[f"{name}-grad_weight"] = weight.grad.numpy()
    _save_arrays(args.out, results)
    return 0


PROBES: dict[str, Callable[[list[str]], int]] = {
    "frozen-teacher": frozen_teacher,
    "superblock": superblock,
    "kd-loss": kd_loss_cases,
    "cache-interrupted": cache_interrupted,
    "fused-losses": fused_losses,
    "loss-allocations": loss_allocations,
    "cuda-busy": cuda_busy,
    "cuda-decode": cuda_decode,
    "cuda-hold": cuda_hold,
    "cuda-products": cuda_products,
    "decision-tables": decision_tables,
    "dense-logits": dense_logits,
    "model-logits": model_logits,
    "open-models": open_models,
    "distill-timed": distill_timed,
    "exported-models": exported_models,
    "damaged-resumes": damaged_resumes,
    "ended-run": ended_run,
    "killed-runs": killed_runs,
    "start-runs": start_runs,
    "packed-logits": packed_logits,
    "training-batches": training_batches,
    "vocabulary-widths": vocabulary_widths,
    "student-steps": student_steps,
    "distill-ranks": distill_ranks,
    "refused-settings": refused_settings,
    "forward-times": forward_times,
    "unified-allocation": unified_allocation,
}
