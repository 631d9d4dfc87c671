"""The packed teacher in float32 and in bfloat16 on this CPU: from how many positions of a pass bfloat16 is faster.

Both teachers live in one process and take turns; they map the same file. ``device/dtypes.py`` holds what was found.
"""

import contextlib
import functools
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from q4kd.trainer.bench.interleave import Ids, Shape, compare, describe_spread, interleave, make_ids, spread
from q4kd.trainer.bench.synthetic import write_large_teacher
from q4kd.trainer.bench.teacher.comparison import environment
from q4kd.trainer.bench.teacher.cpu import TeacherArm
from q4kd.trainer.device.dtypes import DTYPES, PAYS_FROM, usable_flags
from q4kd.trainer.formats.model_file import PackedTensor
from q4kd.trainer.formats.open import open_model
from q4kd.trainer.kernels.gemm import multiply
from q4kd.trainer.teacher.cpu.weights import PackedMatrix, Scratch

# 390 M weights, 250 MB: the shapes of a 0.5B model, in columns that K-quants divide, with a smaller vocabulary.
DEFAULT_MODEL: dict[str, Any] = {
    "layers": 20, "hidden": 1024, "ffn": 4864, "vocab": 32768, "kv_heads": 2, "tied": True,
}  # fmt: skip
_SAMPLED = "blk.0.ffn_up.weight"


class _DtypeArm:
    """The packed teacher in one dtype, in this process; ``interleave.Arm``."""

    def __init__(self, model: Path, threads: int, dtype: str) -> None:
        self.name, self._teacher = dtype, TeacherArm("q4k", model, threads, dtype)

    def prepare(self) -> dict[str, Any]:
        return self._teacher.prepare()

    def run(self, ids_BT: Ids, save: Path | None = None) -> float:
        return self._teacher.run(ids_BT, save)

    def close(self) -> None:
        self._teacher.close()


def compare_dtypes(
    model: Path | None, lengths: Sequence[int], *, rounds: int, threads: int, announce: Callable[[str], None]
) -> dict[str, Any]:
    """Time passes of one sequence with logits at every position, in both dtypes, in turn.

    Args:
        model: GGUF; None makes a synthetic one of ``DEFAULT_MODEL``.
        lengths: positions of a pass; each makes a comparison of its own.
        rounds: counted passes of each dtype and length.
        threads: of torch.
        announce: receives progress lines.

    Returns:
        JSON-able: environment, series and ratios by length, and what one product is made of (``parts``).
    """
    with tempfile.TemporaryDirectory(prefix="q4kd-bench-") as folder:
        if model is None:
            model = Path(folder) / "synthetic.gguf"
            write_large_teacher(model, **DEFAULT_MODEL)
        opened = open_model(model)
        arms = [_DtypeArm(model, threads, dtype) for dtype in reversed(DTYPES)]
        facts = {arm.name: arm.prepare() for arm in arms}
        shapes = []
        for length in lengths:
            ids_BT = make_ids(Shape(1, length), opened.config.vocab_size)
            series = interleave(arms, ids_BT, rounds, announce)
            parts = product_parts(opened.tensors[_SAMPLED], length, rounds)
            shapes.append(
                {
                    "positions": length,
                    "seconds": {one.arm: one.seconds for one in series},
                    "speedup": asdict(compare(series)[0]),
                    "parts": parts,
                }
            )
    flags = sorted(flag for flag in PAYS_FROM if flag in usable_flags())
    return {
        "environment": environment() | {"threads": threads, "flags": flags, "torch": torch.__version__},
        "facts": facts,
        "shapes": shapes,
        "pays_from": pays_from(shapes),
    }


def product_parts(tensor: PackedTensor, positions: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Return what a product with one packed matrix ``[R, K]`` takes in each dtype.

    Returns:
        For each dtype ``decode_ms``, ``product_ms`` (medians) and ``made_by``, oneDNN's name of the implementation,
        empty where torch makes the product itself; and ``inner_product``, the product of bfloat16 by the operator that
        float32 uses, which is not taken for bfloat16, without ``decode_ms``.
    """
    scratch = Scratch(4 * tensor.shape[0] * tensor.shape[1])
    matrix, found = PackedMatrix(tensor, scratch), {}
    x_MK = torch.randn(positions, matrix.cols, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16):
        weight_RK, x = torch.empty(tensor.shape, dtype=dtype), x_MK.to(dtype)
        decode = functools.partial(matrix.decode, 0, matrix.rows, weight_RK)
        product = functools.partial(multiply, x, weight_RK)
        found[str(dtype).removeprefix("torch.")] = {
            "decode_ms": _milliseconds(decode, rounds),
            "product_ms": _milliseconds(product, rounds),
            "made_by": implementation(product),
        }
    if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        inner = functools.partial(torch.ops.mkldnn._linear_pointwise, x, weight_RK, None, "none", [], "")
        with contextlib.suppress(RuntimeError):  # oneDNN has none for bfloat16 below AVX-512
            made = {"product_ms": _milliseconds(inner, rounds), "made_by": implementation(inner)}
            found["inner_product"] = made
    return found


def _milliseconds(work: Callable[[], object], rounds: int) -> float:
    """Return the median of ``rounds`` after one that is not counted."""
    return 1e3 * spread([_timed(work) for _ in range(rounds + 1)][1:])["median"]


def _timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def implementation(work: Callable[[], object]) -> str:
    """Return oneDNN's name of what ``work`` first executes, such as ``brg_matmul:avx512_core_bf16``; empty for none."""
    backend = torch.backends.mkldnn
    with _captured_output() as lines, backend.verbose(backend.VERBOSE_ON):  # type: ignore[no-untyped-call]
        work()
    # onednn_verbose,v1,primitive,exec,cpu,matmul,brg_matmul:avx512_core_bf16,...
    executed = [line.split(",") for line in lines if ",exec," in line]
    return next((words[words.index("exec") + 3] for words in executed), "")


@contextlib.contextmanager
def _captured_output() -> Iterator[list[str]]:
    """Collect the lines that C code prints to standard output, which a Python stream would not see."""
    lines: list[str] = []
    with tempfile.TemporaryFile("w+") as file:
        kept = os.dup(1)
        os.dup2(file.fileno(), 1)
        try:
            yield lines
        finally:
            os.dup2(kept, 1)
            os.close(kept)
            file.seek(0)
            lines += file.read().splitlines()


def pays_from(shapes: Sequence[dict[str, Any]]) -> int | None:
    """Return the least number of positions from which bfloat16 was faster at every larger one too; None for none.

    Faster means that even the lower quartile of the rounds' speed-ups is above one.
    """
    least = None
    for shape in sorted(shapes, key=lambda shape: -int(shape["positions"])):
        if shape["speedup"]["low"] <= 1:
            break
        least = int(shape["positions"])
    return least


def table(found: dict[str, Any]) -> list[str]:
    """Return the comparison as lines: a size a line, and what follows for ``PAYS_FROM``."""
    where = found["environment"]
    lines = [f"{where['processor']}, {where['threads']} threads, {', '.join(where['flags']) or 'no native bfloat16'}"]
    for shape in found["shapes"]:
        taken = {name: spread(seconds)["median"] for name, seconds in shape["seconds"].items()}
        lines.append(
            f"{shape['positions']:>6} positions: float32 {taken['float32']:.3f} s, bfloat16 {taken['bfloat16']:.3f} s, "
            f"{shape['speedup']['median']:.2f} times as fast ({describe_spread(shape['speedup'], 2)})"
        )
        for name, part in shape["parts"].items():
            took = f"decodes in {part['decode_ms']:.2f} ms, " if "decode_ms" in part else ""
            made_by = part["made_by"] or "torch itself"
            lines.append(f"       {name:<14} {took}multiplies in {part['product_ms']:.2f} ms: {made_by}")
    least = found["pays_from"]
    return [
        *lines,
        "bfloat16 is not faster at the largest size" if least is None else f"bfloat16 is faster from {least} positions",
    ]
