"""One optimiser step, taken apart, and beside what else a user could run: ``q4kd bench step``.

Every arm takes whole steps on the same token windows, in turn, in one process (``interleave.py``). Arms:

    q4kd        teacher forward from packed blocks, student forward with the fused loss, backward, clip, AdamW
    teacher     the teacher's part of it alone: final hidden states and the logits of every position
    ce          a step of the same student without a teacher (alpha = 1)
    trl-bf16    TRL's GKDTrainer, off-policy (lmbda = 0), forward KL (beta = 0), with the dense bfloat16 teacher of the
                same weights
    trl-nf4     the same with the teacher's linear layers in bitsandbytes' NF4

The step's own cost over its two unavoidable parts is q4kd / (teacher + ce), round by round. A peak is the most that
torch's allocator held while an arm ran, less what the other arms keep; on the CPU the process's own, over all arms.
"""

import functools
import gc
import platform
import resource
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from q4kd.trainer.bench.interleave import Ids, Series, Shape, interleave, make_ids, spread
from q4kd.trainer.bench.step.arms import make_arms
from q4kd.trainer.bench.step.models import Pair, make_engine, make_pair, peer_student, peer_teacher
from q4kd.trainer.bench.step.trl_arm import TrlArm
from q4kd.trainer.config.settings import DistillConfig, make_config
from q4kd.trainer.device.placement import place_teacher
from q4kd.trainer.events import EventLog
from q4kd.trainer.files import write_json
from q4kd.trainer.teacher.teacher import load_teacher
from q4kd.trainer.train.step import StepResult

WARM_UP_STEPS = 3
PEERS = ("trl-bf16", "trl-nf4")


class StepArm(Protocol):
    """One trainer; ``interleave.Arm`` whose ``run`` takes int64 windows ``[B, T + 1]`` through one step."""

    @property
    def name(self) -> str:
        """Short name for the table."""

    def prepare(self) -> dict[str, Any]:
        """Load models, make the optimiser."""

    def run(self, ids_BT: Ids, save: Path | None = None) -> float:
        """Take one step and return its seconds."""

    def close(self) -> None:
        """Give back what ``prepare`` took."""


@dataclass
class Memory:
    """Bytes of one arm on the device.

    Attributes:
        resident: kept between steps: weights, optimiser state, scratch.
        peak: most while a step runs, ``resident`` included.
    """

    resident: int
    peak: int


class MeteredArm:
    """An arm whose device memory is told from that of the others which live in the same process."""

    def __init__(self, arm: StepArm, device: torch.device) -> None:
        self.arm, self._device = arm, device
        self.memory = Memory(0, 0)

    @property
    def name(self) -> str:
        """Name of the arm."""
        return self.arm.name

    def _held(self) -> int:
        return torch.cuda.memory_allocated() if self._device.type == "cuda" else 0

    def prepare(self, windows: Ids | None = None) -> dict[str, Any]:
        """Prepare the arm and take the first steps, so that what it keeps is known before another is made."""
        before = self._held()
        facts = self.arm.prepare()
        for _ in range(WARM_UP_STEPS if windows is not None else 0):
            assert windows is not None
            self.arm.run(windows)
        self.memory.resident = self._held() - before
        return facts

    def run(self, ids_BT: Ids, save: Path | None = None) -> float:
        """Take one step; the peak is counted over what this arm itself keeps."""
        if self._device.type != "cuda":
            return self.arm.run(ids_BT, save)
        others = self._held() - self.memory.resident
        torch.cuda.reset_peak_memory_stats()
        taken = self.arm.run(ids_BT, save)
        self.memory.peak = max(self.memory.peak, torch.cuda.max_memory_allocated() - others)
        return taken

    def close(self) -> None:
        """Close the arm and give its memory back to the device."""
        self.arm.close()
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


def measure(
    arms: Sequence[StepArm],
    shape: Shape,
    vocab_size: int,
    rounds: int,
    device: torch.device,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Time every arm's steps in turn.

    Args:
        arms: not yet prepared; one that cannot be is named under ``not_run``.
        shape: sequences and positions of a step.
        vocab_size: ids are drawn below it.
        rounds: counted rounds.
        device: device of every arm.
        say: receives progress lines.

    Returns:
        JSON-able: facts, seconds, ratios and bytes of every arm.
    """
    windows = make_ids(Shape(shape.batch, shape.length + 1), vocab_size)
    metered: list[MeteredArm] = []
    found: dict[str, Any] = {"shape": str(shape), "tokens": shape.tokens, "facts": {}, "not_run": {}}
    for arm in arms:
        candidate = MeteredArm(arm, device)
        try:
            found["facts"][arm.name] = candidate.prepare(windows)
        except (ImportError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            if arm.name not in PEERS:
                raise
            # It is another project's trainer: whatever stops it is a result, not our failure.
            found["not_run"][arm.name] = f"{type(error).__name__}: {str(error)[:300]}"
            candidate.close()
            continue
        kept = f", {candidate.memory.resident / 1e9:.2f} GB kept on the device" if device.type == "cuda" else ""
        say(f"{arm.name}: ready{kept}")
        metered.append(candidate)
    try:
        series = interleave(metered, windows, rounds, say)
    finally:
        for candidate in metered:
            candidate.close()
    found["series"] = [asdict(one) for one in series]
    found["memory"] = {one.name: asdict(one.memory) for one in metered}
    found["ratios"] = ratios(series)
    return found


def ratios(series: Sequence[Series]) -> dict[str, dict[str, float]]:
    """Return q4kd's seconds over the sum of its parts', and every peer's over q4kd's: median and quartiles."""
    seconds = {one.arm: one.seconds for one in series}
    found = {}
    if {"q4kd", "teacher", "ce"} <= set(seconds):
        parts = [a + b for a, b in zip(seconds["teacher"], seconds["ce"], strict=True)]
        found["step over teacher + ce"] = spread([s / p for s, p in zip(seconds["q4kd"], parts, strict=True)])
    for peer in PEERS:
        if peer in seconds and "q4kd" in seconds:
            found[f"{peer} over q4kd"] = spread([b / a for a, b in zip(seconds["q4kd"], seconds[peer], strict=True)])
    return found


def table(found: dict[str, Any]) -> list[str]:
    """Return the comparison as lines."""
    lines = [f"one step of {found['shape']} tokens, {len(found['series'][0]['seconds'])} rounds, arms in turn"]
    tokens = found["tokens"]
    for one in found["series"]:
        median = statistics.median(one["seconds"])
        memory = found["memory"][one["arm"]]
        held = f"  peak {memory['peak'] / 1e9:6.2f} GB" if memory["peak"] else ""
        lines.append(f"  {one['arm']:<10} {median * 1e3:9.1f} ms  {tokens / median:9.0f} tokens/s{held}")
    for name, ratio in found["ratios"].items():
        lines.append(
            f"  {name}: {ratio['median']:.3f} (quartiles {ratio['low']:.3f}..{ratio['high']:.3f}, extremes "
            f"{ratio['least']:.3f}..{ratio['greatest']:.3f})"
        )
    if split := found.get("split"):
        parts = ", ".join(f"{name} {share:.1%}" for name, share in split.items())
        lines.append(f"  where the time of a q4kd step goes: {parts}")
    if process := found.get("process_peak_bytes"):
        lines.append(f"  peak of the process, all arms together: {process / 1e9:.2f} GB")
    return lines + [f"  {name}: not run: {why}" for name, why in found["not_run"].items()]


def run_step(
    *,
    out: Path,
    device: str,
    shape: Shape,
    rounds: int,
    against: Sequence[str],
    settings: dict[str, Any],
    layers: int = 28,
    say: Callable[[str], None] = print,
) -> list[str]:
    """Make the models, time every arm, write ``step.json`` into ``out`` and return the table's lines.

    Args:
        out: folder.
        device: cpu or cuda.
        shape: sequences and positions of a step.
        rounds: counted rounds.
        against: names in ``PEERS``.
        settings: settings of ``DistillConfig`` for q4kd's own arms.
        layers: number of layers of the 7B-shaped teacher on CUDA.
        say: receives progress lines.
    """
    where = torch.device(device, torch.cuda.current_device()) if device == "cuda" else torch.device(device)
    with tempfile.TemporaryDirectory(prefix="q4kd-bench-step-") as name:
        pair = make_pair(Path(name), where, layers)
        say(f"teacher: {pair.teacher.stat().st_size / 1e9:.2f} GB")
        files = {"teacher": pair.teacher, "student": pair.student, "data": pair.teacher, "out": Path(name) / "run"}
        sizes = {"device": device, "batch_size": shape.batch, "seq_len": shape.length}
        config = make_config({**files, **sizes, "alpha": 0.1, "lr": 1e-5, **settings})
        load = functools.cache(
            lambda: load_teacher(
                place_teacher(pair.teacher, device=device, dtype=config.dtype), events=EventLog(None), announce=say
            )
        )
        whole, alone, student = make_arms(config, load, where, make_engine)
        peers = [_peer(name, pair, where, layers, config) for name in against]
        found = measure([whole, alone, student, *peers], shape, pair.vocab_size, rounds, where, say)
        found |= {
            "environment": environment(where),
            "split": split_of(whole.results[-rounds:], whole.data_seconds[-rounds:]),
        }
        found["loss"] = asdict(config.loss)
        if where.type == "cpu":  # There no allocator tells the arms apart.
            found["process_peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "step.json", found)
    return table(found)


def _peer(name: str, pair: Pair, device: torch.device, layers: int, config: DistillConfig) -> TrlArm:
    make_teacher = functools.partial(peer_teacher, pair, device, layers, nf4=name == "trl-nf4")
    return TrlArm(name, functools.partial(peer_student, pair, device), make_teacher, lr=config.lr, clip=config.clip)


def split_of(results: Sequence[StepResult], data_seconds: Sequence[float]) -> dict[str, float]:
    """Return the share of a step's time, the making of its batch included, that each part takes, at the median."""
    parts = ("teacher_s", "student_s", "loss_s", "optimizer_s")
    data = statistics.median(data_seconds)
    whole = data + statistics.median(result.seconds for result in results)
    split = {part.removesuffix("_s"): statistics.median(getattr(r, part) for r in results) / whole for part in parts}
    return split | {"data": data / whole}


def environment(device: torch.device) -> dict[str, str]:
    """Return the versions and the device that the numbers belong to."""
    import transformers

    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name = f"{properties.name}, compute capability {properties.major}.{properties.minor}"
    else:
        name = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {"device": name, **versions, "python": platform.python_version()}
