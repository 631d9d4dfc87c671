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
import platform
import resource
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from q4kd.trainer.bench.device_probes import collect_garbage, current_device
from q4kd.trainer.bench.interleave import Arm, Ids, Series, Shape, describe_spread, interleave, make_ids, round_ratios
from q4kd.trainer.bench.step.arms import make_arms
from q4kd.trainer.bench.step.models import Pair, make_engine, make_pair, peer_student, peer_teacher
from q4kd.trainer.bench.step.trl_arm import TrlArm
from q4kd.trainer.config.settings import DistillConfig, make_config
from q4kd.trainer.device.placement import place_teacher
from q4kd.trainer.events import EventLog
from q4kd.trainer.files import write_json
from q4kd.trainer.teacher.teacher import Teacher, load_teacher
from q4kd.trainer.train.step import StepResult

WARM_UP_STEPS = 3
PEERS = ("trl-bf16", "trl-nf4")


class MeteredArm:
    """An arm whose device memory is told from that of the others which live in the same process.

    Attributes:
        memory: bytes on the device: ``resident`` are kept between steps (weights, optimiser state, scratch), ``peak``
            is the most while a step runs, ``resident`` included.
    """

    def __init__(self, arm: Arm, device: torch.device) -> None:
        self.arm, self.name, self._device = arm, arm.name, device
        self.memory = {"resident": 0, "peak": 0}

    def _held(self) -> int:
        return torch.cuda.memory_allocated() if self._device.type == "cuda" else 0

    def prepare(self, *windows: Ids) -> dict[str, Any]:
        """Prepare the arm and take the first steps, so that what it keeps is known before another is made."""
        before = self._held()
        facts = self.arm.prepare()
        for ids_BT in windows:
            self.arm.run(ids_BT)
        self.memory["resident"] = self._held() - before
        return facts

    def run(self, ids_BT: Ids, save: Path | None = None) -> float:
        """Take one step; the peak is counted over what this arm itself keeps."""
        if self._device.type != "cuda":
            return self.arm.run(ids_BT, save)
        others = self._held() - self.memory["resident"]
        torch.cuda.reset_peak_memory_stats()
        taken = self.arm.run(ids_BT, save)
        self.memory["peak"] = max(self.memory["peak"], torch.cuda.max_memory_allocated() - others)
        return taken

    def close(self) -> None:
        """Close the arm and give its memory back to the device."""
        self.arm.close()
        collect_garbage()


def measure(
    arms: Sequence[Arm], shape: Shape, vocab_size: int, rounds: int, device: torch.device, say: Callable[[str], None]
) -> dict[str, Any]:
    """Time every arm's steps in turn and return facts, seconds, ratios and bytes of each, JSON-able.

    The arms are not yet prepared; a peer that cannot be is named under ``not_run``.
    """
    windows = make_ids(Shape(shape.batch, shape.length + 1), vocab_size)
    metered: list[MeteredArm] = []
    found: dict[str, Any] = {"shape": str(shape), "tokens": shape.tokens, "facts": {}, "not_run": {}}
    for arm in arms:
        candidate = MeteredArm(arm, device)
        try:
            found["facts"][arm.name] = candidate.prepare(*[windows] * WARM_UP_STEPS)
        except (ImportError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            if arm.name not in PEERS:
                raise
            # It is another project's trainer: whatever stops it is a result, not our failure.
            found["not_run"][arm.name] = f"{type(error).__name__}: {str(error)[:300]}"
            candidate.close()
            continue
        kept = f", {candidate.memory['resident'] / 1e9:.2f} GB kept on the device" if device.type == "cuda" else ""
        say(f"{arm.name}: ready{kept}")
        metered.append(candidate)
    try:
        series = interleave(metered, windows, rounds, say)
    finally:
        for candidate in metered:
            candidate.close()
    found["series"] = [asdict(one) for one in series]
    found["memory"] = {one.name: one.memory for one in metered}
    found["ratios"] = ratios(series)
    return found


def ratios(series: Sequence[Series]) -> dict[str, dict[str, float]]:
    """Return q4kd's seconds over the sum of its parts', and every peer's over q4kd's: median and quartiles."""
    seconds = {one.arm: one.seconds for one in series}
    found = {}
    if {"q4kd", "teacher", "ce"} <= set(seconds):
        parts = [a + b for a, b in zip(seconds["teacher"], seconds["ce"], strict=True)]
        found["step over teacher + ce"] = round_ratios(seconds["q4kd"], parts)
    for peer in PEERS:
        if peer in seconds and "q4kd" in seconds:
            found[f"{peer} over q4kd"] = round_ratios(seconds[peer], seconds["q4kd"])
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
    lines += [f"  {name}: {one['median']:.3f} ({describe_spread(one, 3)})" for name, one in found["ratios"].items()]
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
    """Make the models, time every arm, write ``step.json`` into the folder ``out`` and return the table's lines.

    ``against`` are names in ``PEERS``, ``settings`` those of ``DistillConfig`` for q4kd's own arms, and ``layers`` the
    layers of the 7B-shaped teacher on CUDA.
    """
    where = current_device(device)
    with tempfile.TemporaryDirectory(prefix="q4kd-bench-step-") as name:
        pair = make_pair(Path(name), where, layers)
        say(f"teacher: {pair.teacher.stat().st_size / 1e9:.2f} GB")
        files = {"teacher": pair.teacher, "student": pair.student, "data": pair.teacher, "out": Path(name) / "run"}
        sizes = {"device": device, "batch_size": shape.batch, "seq_len": shape.length}
        config = make_config({**files, **sizes, "alpha": 0.1, "lr": 1e-5, **settings})

        @functools.cache
        def load() -> Teacher:
            placement = place_teacher(
                pair.teacher, device=device, dtype=config.dtype, positions=shape.batch * shape.length
            )
            return load_teacher(placement, events=EventLog(None), announce=say)

        whole, alone, student = make_arms(config, load, where, make_engine)
        peers = [_peer(name, pair, where, layers, config) for name in against]
        found = measure([whole, alone, student, *peers], shape, pair.vocab_size, rounds, where, say)
        split = split_of(whole.results[-rounds:], whole.data_seconds[-rounds:])
        found |= {"environment": environment(where), "split": split, "loss": asdict(config.loss)}
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
