"""The fused loss against the four products that no loss with both heads can do without, arms interleaved in one run.

The products: teacher head forward, student head forward, gradient of the hidden states, gradient of the student's head.
``products`` makes each in one call, ``products-chunked`` in the chunks and slices of ``fast`` (with its float32 sum of
the head's gradient), both with logits and gradients of the types of the arm they are compared with and no softmax.
``fast`` and ``low`` are the loss with its backward; their teacher's head is packed as Q6_K on CUDA and decoded within
the time, as in a step. Ratios are an arm's seconds over those of ``products``, round by round.

Bytes are the peak beyond what is held before, less the gradients: on CUDA torch's allocator, on the CPU its profiler.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from q4kd.trainer.bench.device_probes import current_device, seconds_of, wall_seconds
from q4kd.trainer.bench.interleave import Ids, Series, Shape, interleave, make_ids, round_ratios
from q4kd.trainer.bench.loss.inputs import LossShape, LossWork, make_work
from q4kd.trainer.loss.config import KDLossConfig, LogitsType
from q4kd.trainer.loss.fused import kd_loss
from q4kd.trainer.loss.sums import add_product, multiply_wide


class LossArm:
    """One way through the work, which ``step`` does once, timed by the device's clock; ``interleave.Arm``."""

    def __init__(self, name: str, step: Callable[[], object], device: torch.device) -> None:
        self.name, self.step, self._device = name, step, device

    def prepare(self) -> dict[str, Any]:
        """Return the arm's name."""
        return {"name": self.name}

    def run(self, _ids: Ids, save: Path | None = None) -> float:
        """Return the seconds of one step."""
        return seconds_of(self.step) if self._device.type == "cuda" else wall_seconds(self.step, self._device)

    def close(self) -> None:
        """Drop the work."""
        del self.step


def loss_step(work: LossWork, config: KDLossConfig) -> None:
    """Take the loss and its backward once."""
    work.hidden.grad = work.weight.grad = None
    hidden, head, tokens = work.teacher_hidden, work.head, float(work.shape.tokens)
    student = work.hidden, work.weight, work.labels
    terms = kd_loss(*student, teacher_hidden=hidden, teacher_head=head, num_targets=tokens, config=config)
    terms.loss.backward()  # type: ignore[no-untyped-call]


def _logits(x: Tensor, weight: Tensor, out: Tensor) -> None:
    if out.dtype == x.dtype:
        torch.mm(x, weight.T, out=out)
    else:
        torch.mm(x, weight.T, out_dtype=out.dtype, out=out)


class Products:
    """The four products, ``chunk`` tokens of gradients and ``step`` tokens of logits, its divisor, at a time.

    With ``sums`` the head's gradient is summed in float32 and rounded at the end, as chunks need it.
    """

    def __init__(self, work: LossWork, chunk: int, step: int, logits_type: torch.dtype, *, sums: bool) -> None:
        self._work, self._chunk, self._step, self._sums = work, chunk, step, sums
        vocab, device, dtype = work.shape.vocab, work.hidden.device, work.hidden.dtype
        self._student, self._teacher = (torch.empty(step, vocab, dtype=logits_type, device=device) for _ in range(2))
        self._grad = torch.randn(chunk, vocab, dtype=dtype, device=device).mul_(1e-3)

    @torch.no_grad()
    def __call__(self) -> None:
        """Make them once; results are dropped."""
        work, head = self._work, self._work.head.decoded()[: self._work.shape.vocab]
        head_grad = torch.empty_like(work.weight, dtype=torch.float32 if self._sums else work.weight.dtype)
        for start in range(0, work.shape.tokens, self._chunk):
            hidden, teacher = (x[start : start + self._chunk] for x in (work.hidden, work.teacher_hidden))
            for first in range(0, len(hidden), self._step):
                x, t = hidden[first : first + self._step], teacher[first : first + self._step]
                _logits(t, head, self._teacher[: len(t)])
                _logits(x, work.weight, self._student[: len(x)])
            grad = self._grad[: len(hidden)]
            multiply_wide(grad, work.weight)
            if self._sums:
                add_product(head_grad, grad.T, hidden, beta=int(start > 0), alpha=1.0)
            else:
                torch.mm(grad.T, hidden, out=head_grad)
        if self._sums:
            head_grad.to(work.weight.dtype)


def peak_bytes(step: Callable[[], object], work: LossWork) -> int:
    """Return the most bytes that ``step`` takes beyond those held before it, less the gradients it leaves."""
    work.hidden.grad = work.weight.grad = None
    if work.hidden.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before - work.gradient_bytes
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    held = most = 0
    events: Any = profiler.profiler
    changes = [event for event in events.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most - work.gradient_bytes


_TYPES: tuple[LogitsType, ...] = ("float32", "bfloat16")


def _arms(work: LossWork, config: KDLossConfig) -> list[tuple[LossArm, LogitsType]]:
    """Return the arms, ``products`` first, with the type of each one's logits."""
    device, tokens = work.hidden.device, work.shape.tokens
    arms = []
    for kind in _TYPES if device.type == "cuda" else _TYPES[:1]:
        if device.type == "cuda":
            from q4kd.trainer.loss.cuda.chunks import fast_chunk, slice_of

            chunk = fast_chunk(tokens, work.shape.vocab, replace(config, logits=kind), work.hidden)
            step = slice_of(chunk, in_place=kind == "bfloat16")
        else:
            chunk = step = config.chunk_for(work.shape.vocab)
        of_type = partial(Products, work, logits_type=getattr(torch, kind))
        made: dict[str, Callable[[], object]] = {
            "products": of_type(tokens, tokens, sums=False),
            "products-chunked": of_type(chunk, step, sums=True),
            "fast": partial(loss_step, work, replace(config, mode="fast", logits=kind)),
        }
        if kind == "float32":
            made["low"] = partial(loss_step, work, replace(config, mode="low", chunk_tokens=0))
        arms += [(LossArm(name, step_of, device), kind) for name, step_of in made.items()]
    return arms


def compare_loss(
    shape: LossShape, device: str, config: KDLossConfig, rounds: int, say: Callable[[str], None]
) -> dict[str, Any]:
    """Time every arm turn by turn and return rows: seconds, ratio to ``products`` of the same type, bytes."""
    where = current_device(device)
    work = make_work(shape, where)
    say(f"{shape.tokens} tokens, V {shape.vocab}, H {shape.hidden}, teacher H {shape.teacher_hidden}, {device}")
    arms = _arms(work, config)
    ids = make_ids(Shape(1, shape.tokens), 2)
    for arm, _ in arms:
        arm.run(ids)
    series = interleave([arm for arm, _ in arms], ids, rounds, say)
    rows = []
    for (arm, kind), one in zip(arms, series, strict=True):
        base = next(other for (first, of), other in zip(arms, series, strict=True) if of == kind)
        rows.append(
            {
                "arm": arm.name,
                "logits": kind,
                "seconds": statistics.median(one.seconds),
                **_ratio(one, base),
                "tflop_per_s": shape.flop / statistics.median(one.seconds) / 1e12,
                "peak_bytes": peak_bytes(arm.step, work) if arm.name in ("fast", "low") else None,
            }
        )
    name = torch.cuda.get_device_name(where) if device == "cuda" else "cpu"
    facts = {"device": name, "torch": torch.__version__, "shape": asdict(shape), "config": asdict(config)}
    return facts | {"head_bytes": work.head.decoded().nbytes, "rows": rows}


def _ratio(one: Series, base: Series) -> dict[str, float]:
    found = round_ratios(one.seconds, base.seconds)
    return {"ratio": found["median"], "ratio_low": found["low"], "ratio_high": found["high"]}


def table(found: dict[str, Any]) -> Sequence[str]:
    """Return the rows as aligned text."""
    lines = [f"decoded teacher head: {found['head_bytes'] / 1e6:.0f} MB"]
    lines += [f"{'arm':<17} {'logits':<9} {'ms':>9} {'ratio':>7} {'quartiles':>15} {'TFLOP/s':>8} {'MB beyond':>10}"]
    for row in found["rows"]:
        held = "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.0f}"
        spread = f"{row['ratio_low']:.3f}..{row['ratio_high']:.3f}"
        lines.append(
            f"{row['arm']:<17} {row['logits']:<9} {row['seconds'] * 1e3:9.2f} {row['ratio']:7.3f} {spread:>15} "
            f"{row['tflop_per_s']:8.2f} {held:>10}"
        )
    return lines
