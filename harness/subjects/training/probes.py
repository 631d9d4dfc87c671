"""Measurements of the student: the trainer's own step under other settings, and its command line on two processes."""

import argparse
import functools
import multiprocessing
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from q4kd.harness.inputs.arrays import Arrays, save_arrays
from q4kd.harness.records.json_types import JsonObject
from q4kd.harness.runs.probes import probe
from q4kd.harness.subjects.runs.following import Passes, recorded_compiler, tracked
from q4kd.trainer.errors import InputError
from q4kd.trainer.files import write_json

if TYPE_CHECKING:
    from q4kd.trainer.teacher.teacher import Teacher

STEPS, SEQUENCES, LENGTH = 4, 8, 24
RANKS = 2
# TINY is far below half of bfloat16's spacing at 1 (2^-8), so that one update rounds to nothing.
TINY, TINY_STEPS = 2e-4, 20
# Settings that must not change the losses, or not by much, by the name of what is compared.
VARIANTS: Mapping[str, Mapping[str, object]] = {
    "whole": {},
    "accumulated": {"batch_size": 2, "accumulation": 4},
    # Its batch is accumulated too: arrays equal to the bit would be taken for one array compared with itself.
    "recomputed": {"gradient_checkpointing": True, "batch_size": 4, "accumulation": 2},
    "bfloat16": {"student_dtype": "bfloat16"},
}


class _Trained:
    """A few steps of the trainer's own on masked batches, with some settings."""

    student: Any

    def __init__(self, folder: Path, teacher: "Teacher", settings: Mapping[str, object]) -> None:
        import torch

        from q4kd.trainer.config.settings import make_config
        from q4kd.trainer.data.batch import Batch
        from q4kd.trainer.loss.config import IGNORE_INDEX
        from q4kd.trainer.student import model as student
        from q4kd.trainer.train import step
        from q4kd.trainer.train.distributed import make_accelerator
        from q4kd.trainer.train.run import assembly as run

        given = {"teacher": ".", "student": folder, "data": ".", "out": ".", "lr": 0.003}
        config = make_config({**given, "warmup_steps": 1, "batch_size": SEQUENCES, **settings})
        accelerator = make_accelerator("cpu")
        loaded: Any = student.load_student(folder, 1, student.student_dtype(config))
        self.student = loaded
        self.before = {name: value.detach().clone() for name, value in self.student.named_parameters()}
        model, optimizer, self.adapted = run.prepare_student(config, accelerator, self.student)
        self.passes = Passes(self.student.base_model.layers[0].mlp)
        rng = np.random.default_rng(3)
        self.losses = []
        model.train()
        for index in range(STEPS):
            drawn = rng.integers(0, int(self.student.config.vocab_size), (SEQUENCES, LENGTH + 1))
            windows = torch.from_numpy(drawn)
            # The first sequence keeps all labels, the last one a single label: micro-batches weigh unequally.
            kept = torch.arange(LENGTH) < torch.linspace(LENGTH, 1, SEQUENCES).long().unsqueeze(1)
            batch = Batch(windows[:, :-1], windows[:, 1:].masked_fill(~kept, IGNORE_INDEX))
            rate = step.learning_rate(index, config, STEPS)
            result = step.train_step(accelerator, model, teacher, optimizer, batch, config, rate)
            self.losses.append([result.loss, result.ce, result.kd, result.grad_norm])


@probe("student-steps")
def student_steps(teacher: Path, student: Path, out: Path, facts: Path) -> None:
    """Take the same steps under several settings; record losses, what adapters changed, and what a merge gives."""
    import torch

    from q4kd.trainer.device.placement import place_teacher
    from q4kd.trainer.events import EventLog
    from q4kd.trainer.student.lora import merged_state
    from q4kd.trainer.student.model import load_student
    from q4kd.trainer.teacher.teacher import load_teacher
    from q4kd.trainer.train.distributed import whole_state

    loaded = load_teacher(place_teacher(teacher, dtype="float32"), events=EventLog(None), announce=lambda _line: None)
    trained = {name: _Trained(student, loaded, settings) for name, settings in VARIANTS.items()}
    arrays: Arrays = {name: np.array(variant.losses) for name, variant in trained.items()}
    with recorded_compiler() as compiled:
        through = _Trained(student, loaded, {"compile": True}).student
    lora = _Trained(student, loaded, {"lora_rank": 4})
    after = {name.replace(".base_layer.", "."): value for name, value in lora.student.named_parameters()}
    frozen = [name for name in lora.before if torch.equal(lora.before[name], after[name])]
    adapters = [value for name, value in after.items() if ".lora_B." in name]
    state = whole_state(lora.student, keep=True)
    ids = torch.arange(2 * LENGTH).view(2, LENGTH)
    lora.student.eval()
    plain = load_student(student, 1)
    plain.load_state_dict(merged_state(lora.adapted, state), strict=False)
    plain.eval()
    with torch.no_grad():
        arrays["merged"] = plain(ids).logits[0].numpy()
        arrays["adapted"] = lora.student(ids).logits[0].numpy()
        arrays["untrained"] = load_student(student, 1)(ids).logits[0].numpy()
    save_arrays(out, arrays)
    tables = {
        "lora": {
            "weights of the student": len(lora.before),
            "of them as before, to the bit": len(frozen),
            "adapters": len(adapters),
            "of them moved": sum(bool(value.abs().max() > 0) for value in adapters),
        },
        "masters": _tiny_updates(),
        "passes": {
            "of a layer": trained["whole"].passes.count,
            "of a layer, recomputed, in twice as many micro-batches": trained["recomputed"].passes.count,
            "of the layers, compiled": sum(module is through.base_model for module in compiled),
            "of anything else, compiled": sum(module is not through.base_model for module in compiled),
        },
        "tracked": tracked(),
    }
    write_json(facts, {"tables": tables})


def _tiny_updates() -> dict[str, bool]:
    """Move a bfloat16 weight of value 1 by updates that are each too small for it."""
    import torch

    from q4kd.trainer.train.optimizer import MasterWeightOptimizer

    def take(dtype: torch.dtype) -> list[float]:
        weight = torch.nn.Parameter(torch.ones(4, 4, dtype=dtype))
        optimizer = MasterWeightOptimizer([("weight", weight)], functools.partial(torch.optim.AdamW, lr=TINY))
        held = []
        for _ in range(TINY_STEPS):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
            optimizer.zero_grad()
            held.append(float(weight.detach()[0, 0]))
        return held

    rounded, exact = take(torch.bfloat16), take(torch.float32)
    return {
        "the first update shows in the weight": rounded[0] != 1.0,
        "all of them together show in it": rounded[-1] != 1.0,
        "it is the float32 weight, rounded once": rounded == torch.tensor(exact).bfloat16().tolist(),
    }


def _rank(rank: int, port: int, words: tuple[str, ...]) -> int:
    """Run the command line as one process of several."""
    addresses = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
    os.environ |= addresses | {name: str(number) for name, number in numbers.items()}
    from q4kd.harness.__main__ import main

    return main(list(words))


def _other_rank(rank: int, port: int, words: tuple[str, ...]) -> None:
    raise SystemExit(_rank(rank, port, words))


@probe("distill-ranks")
def distill_ranks(kind: Literal["copies", "shards"], /, *words: str) -> int:
    """Run ``q4kd distill`` as one of two processes, ``copies`` or ``shards``; the other is forked, with faults."""
    if kind == "shards":
        os.environ |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The fork comes before torch has threads. The main rank stays here: its events are the supervised process's.
    other = multiprocessing.get_context("fork").Process(target=_other_rank, args=(1, port, words))
    other.start()
    code = _rank(0, port, words)
    other.join()
    return code or abs(other.exitcode or 0)


@probe("refused-settings")
def refused_settings(out: Path) -> None:
    """Give settings that do not exist, or that cannot be followed here, beside their valid twins."""
    from q4kd.trainer.config.settings import make_config
    from q4kd.trainer.student.model import set_up_student
    from q4kd.trainer.train.run.tracking import tracker_names

    base: dict[str, object] = {"teacher": "t", "student": "s", "data": "d", "out": "o"}
    cases: list[tuple[str, dict[str, object], dict[str, object], str]] = [
        ("learning rate", {"lrr": 1e-4}, {"lr": 1e-4}, "did you mean lr?"),
        ("rank", {"lora_rnk": 8}, {"lora_rank": 8}, "did you mean lora_rank?"),
        ("nothing like it", {"zzzzzzzz": 1}, {"steps": 1}, "use one of"),
        ("range", {"clip": -1.0}, {"clip": 1.0}, "q4kd distill --help"),
        ("kernels", {"student_kernels": "liger"}, {"student_kernels": "torch"}, "use student_kernels torch"),
        ("tracker", {"trackers": "tensorbord"}, {"trackers": ""}, "did you mean tensorboard?"),
    ]
    records: list[JsonObject] = []
    for name, wrong, right, remedy in cases:
        outcomes: list[str | None] = []
        for values in (wrong, right):
            try:
                config = make_config(base | values)
                tracker_names(config)
                set_up_student(None, config)
                outcomes.append(None)
            except InputError as error:
                outcomes.append(type(error).__name__ if remedy in str(error) else "another message")
        records.append({"case": name, "error": outcomes[0], "twin": f"{name}, valid", "twin_error": outcomes[1]})
    write_json(
        out,
        {"cases": records, "tables": {"bounds": {**_at_the_bounds(), **_cache_options()}, "loss": _loss_settings()}},
    )


def _cache_options() -> JsonObject:
    """Return which numbers at and outside the bounds of its options ``q4kd cache`` takes or refuses wrongly."""
    from q4kd.trainer.cli import cache
    from q4kd.trainer.config.settings import make_config

    config = make_config({"teacher": "t", "student": "s", "data": "d", "out": "o"})
    good = {"k": 32, "sample_tokens": 4096, "shard_mb": 64}
    wrong: list[str] = []
    for name, low, high in (("k", 1, 4096), ("sample_tokens", 0, 1 << 24), ("shard_mb", 1, 1000)):
        for value in (low - 1, low, high, high + 1):
            try:
                cache._check_arguments(argparse.Namespace(**{**good, name: value}), config)
                taken = True
            except InputError:
                taken = False
            if taken != (low <= value <= high):
                wrong.append(f"{name}: {value} is {'taken' if taken else 'refused'}")
    return {"options of q4kd cache, taken or refused wrongly": ", ".join(wrong) or "none"}


def _loss_settings() -> JsonObject:
    """Return what the loss gets of settings of which none is at its default."""
    from q4kd.trainer.config.settings import make_config

    given = {
        "alpha": 0.25, "temperature": 3.0, "divergence": "jsd", "beta": 0.75, "loss_mode": "low", "chunk_tokens": 77,
        "loss_logits": "bfloat16",
    }  # fmt: skip
    config = make_config({"teacher": "t", "student": "s", "data": "d", "out": "o", **given})
    names = ("alpha", "temperature", "divergence", "beta", "mode", "chunk_tokens", "logits")
    return {name: str(getattr(config.loss, name)) for name in names}


def _at_the_bounds() -> JsonObject:
    """Return how the bounds of every number, and the next values outside them, are taken as the setting's own."""
    from q4kd.trainer.config.settings import settings

    wrong: list[str] = []
    numbers = 0
    for setting in settings().values():
        low, high = setting.low, setting.high
        if low is None or high is None:
            continue
        numbers += 1
        below, above = (low - 1, high + 1) if setting.kind is int else (low - 0.1, high * 1.1)
        for value, is_inside in ((low, True), (high, True), (below, False), (above, False)):
            try:
                setting.convert(value)
                taken = True
            except InputError as error:
                taken = False
                if f"from {low:g} to {high:g}" not in str(error):
                    wrong.append(f"{setting.name}: the bounds are not named")
            if taken != is_inside:
                wrong.append(f"{setting.name}: {value} is {'taken' if taken else 'refused'}")
    return {"numbers": numbers, "taken or refused wrongly": ", ".join(wrong) or "none"}
