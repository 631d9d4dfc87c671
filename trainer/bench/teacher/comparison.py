"""One comparison on the CPU from start to end: arms, agreement of their logits, interleaved timing, table and log."""

import platform
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from q4kd.trainer.bench.interleave import Arm, Ids, Series, Shape, compare, describe_spread, interleave, make_ids
from q4kd.trainer.bench.synthetic import write_large_teacher
from q4kd.trainer.bench.teacher.cpu import worker_arm
from q4kd.trainer.bench.teacher.worker import ArmFailed
from q4kd.trainer.formats.open import open_model

# 129 M weights, 83 MB: the proportions of today's 130M models, in columns that K-quants divide (multiples of 256).
DEFAULT_MODEL: dict[str, Any] = {"layers": 12, "hidden": 768, "ffn": 3072, "vocab": 32768, "kv_heads": 4, "tied": True}


def compare_on_cpu(
    model: Path | None,
    engines: Sequence[str],
    lengths: Sequence[int],
    *,
    rounds: int,
    threads: int,
    dtype: str,
    announce: Callable[[str], None],
    layer_type: str | None = None,
    clock: str = "wall",
) -> dict[str, Any]:
    """Time ``q4k`` against other engines on a GGUF file, or on a synthetic one of ``DEFAULT_MODEL``.

    The engines are names in ``cpu.ENGINES`` without ``q4k``; ``dtype`` is that of those which have a choice. Each of
    ``lengths``, the positions of one sequence, makes a comparison of its own. ``announce`` receives progress lines.
    ``layer_type`` is that of the synthetic model's layers (``synthetic.LAYER_TYPES``), ``clock`` one of ``cpu.CLOCKS``.

    Returns:
        JSON-able: environment, facts of each arm, agreement, series and ratios.
    """
    with tempfile.TemporaryDirectory(prefix="q4kd-bench-") as folder:
        if model is None:
            model = Path(folder) / "synthetic.gguf"
            write_large_teacher(model, **DEFAULT_MODEL, layer_type=layer_type)
        opened = open_model(model)
        vocab_size = opened.config.vocab_size
        # Of a split model llama.cpp wants the first shard.
        wanted: list[Arm] = [worker_arm(engine, opened.path, threads, dtype, clock) for engine in ("q4k", *engines)]
        found: dict[str, Any] = {
            "environment": environment() | {"threads": threads, "dtype": dtype, "clock": clock},
            "layer_type": layer_type,
            "file_bytes": opened.file_bytes,
            "facts": {},
            "not_run": {},
            "shapes": [],
        }
        try:
            arms = [arm for arm in wanted if _prepare(arm, found)]
            if wanted[0] not in arms:
                return found
            for length in lengths:
                ids_BT = make_ids(Shape(1, length), vocab_size)
                agreement = agree(arms, ids_BT, Path(folder))
                found["shapes"].append(_shape_result(interleave(arms, ids_BT, rounds, announce), agreement))
        finally:
            for arm in wanted:
                arm.close()
    return found


def _prepare(arm: Arm, found: dict[str, Any]) -> bool:
    try:
        found["facts"][arm.name] = arm.prepare()
    except ArmFailed as failure:
        found["not_run"][arm.name] = str(failure)
        return False
    return True


def agree(arms: Sequence[Arm], ids_BT: Ids, folder: Path) -> dict[str, float]:
    """Return the least cosine over positions of every other arm's logits with the first one's."""
    saved = [folder / f"logits-{index}.npy" for index in range(len(arms))]
    for arm, path in zip(arms, saved, strict=True):
        arm.run(ids_BT, path)
    ours, *others = (np.load(path, mmap_mode="r", allow_pickle=False) for path in saved)
    return {arm.name: least_cosine(ours, theirs) for arm, theirs in zip(arms[1:], others, strict=True)}


def least_cosine(ours: npt.NDArray[np.float32], theirs: npt.NDArray[np.float32]) -> float:
    """Return the least cosine between two arms' logits over all positions, in float64; ``[..., V]`` each."""
    worst = 1.0
    for a, b in zip(ours.reshape(-1, ours.shape[-1]), theirs.reshape(-1, theirs.shape[-1]), strict=True):
        x, y = a.astype(np.float64), b.astype(np.float64)
        scale = float(np.linalg.norm(x) * np.linalg.norm(y))
        worst = min(worst, float(x @ y) / scale if scale > 0 and np.isfinite(scale) else -1.0)
    return worst


def _shape_result(series: Sequence[Series], agreement: dict[str, float]) -> dict[str, Any]:
    return {
        "shape": str(series[0].shape),
        "least_cosine": agreement,
        "series": [{**asdict(one), "tokens_per_second": one.tokens_per_second} for one in series],
        "ratios": [asdict(ratio) for ratio in compare(series)],
    }


def environment() -> dict[str, Any]:
    """Return the machine that the numbers belong to."""
    return {"processor": _processor(), "system": platform.platform(), "python": platform.python_version()}


def _processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    try:
        lines = cpuinfo.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def table(found: dict[str, Any]) -> list[str]:
    """Return the comparison as lines: an arm a line, with how many times faster the subject is."""
    lines = []
    for result in found["shapes"]:
        subject, *others = result["series"]
        lines.append(f"{result['shape']} positions, {len(subject['seconds'])} rounds")
        lines.append(f"  {subject['arm']:<22} {subject['tokens_per_second']:8.0f} tokens/s")
        for one, ratio in zip(others, result["ratios"], strict=True):
            lines.append(
                f"  {one['arm']:<22} {one['tokens_per_second']:8.0f} tokens/s   {subject['arm']} is "
                f"{ratio['median']:.2f} times as fast ({describe_spread(ratio, 2)}), "
                f"least cosine {result['least_cosine'][one['arm']]:.5f}"
            )
    return lines + [f"  {name}: not run: {why}" for name, why in found["not_run"].items()]
