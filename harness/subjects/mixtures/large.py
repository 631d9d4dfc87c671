"""Whole steps with a mixture of experts: Qwen3-30B-A3B's shapes on a GPU, and the same run with a small one on the CPU.

Weights are random blocks in the types of a Q4_K_M file; students have random weights too.
"""

import argparse
import dataclasses
import functools
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from q4kd.harness.inputs.collect import collect_checkpoint, read_events
from q4kd.harness.inputs.command_lines import scratch_words, set_words
from q4kd.harness.inputs.demo import changed_student, demo_student, demo_teacher, gguf_facts
from q4kd.harness.inputs.models.large_mixture import write_large_mixture
from q4kd.harness.inputs.synthetic_students import read_tokens, student_shape
from q4kd.harness.runs.experiment import ONE_THREAD, Arm, Facts, Inputs, declare
from q4kd.trainer.bench.synthetic_30b_a3b import qwen3_30b_a3b
from q4kd.trainer.formats.architecture import TeacherConfig

STEPS = 20
HELD_LAYERS, HELD_VOCAB = 4, 4096


@dataclass(frozen=True)
class Size:
    """What a run with a mixture differs in.

    Attributes:
        teacher: its dimensions; its vocabulary begins with the demo's tokens.
        student: what its config says beside the demo student's, under ``student_name``; nothing for the demo student.
        settings: of the run.
        device: cpu or cuda.
    """

    name: str
    teacher: TeacherConfig
    settings: Mapping[str, object]
    device: str
    student: Mapping[str, object] = field(default_factory=dict)
    student_name: str = ""


# A step of 8,192 tokens in four micro-batches, as with the 7B teacher; the student has Qwen2.5-0.5B's shapes.
LARGE = Size(
    "30b",
    qwen3_30b_a3b(),
    {"batch_size": 8, "accumulation": 4, "seq_len": 256},
    "cuda",
    {**student_shape(hidden=896, ffn=4864, layers=24, heads=14, kv_heads=2), "vocab_size": 151_936},
    "student-0.5b",
)
# 153 M weights, 94 MB: decoded they take several times what all else does.
SMALL = Size(
    "small",
    dataclasses.replace(
        qwen3_30b_a3b(3),
        hidden_size=512,
        num_heads=8,
        num_kv_heads=2,
        head_dim=64,
        vocab_size=2048,
        context_length=512,
        num_experts=64,
        expert_ffn_size=512,
    ),
    {"batch_size": 4, "accumulation": 2, "seq_len": 32, "dtype": "float32"},
    "cpu",
)


def mixture_teacher(inputs: Inputs, size: Size) -> Path:
    """Return the teacher of a size; the large one takes 18.6 GB."""
    tokens = read_tokens(demo_teacher(inputs))
    make = functools.partial(write_large_mixture, config=size.teacher, tokens=tokens)
    return inputs.file(f"mixture-{size.name}.gguf", make)


def held_mixture(inputs: Inputs) -> Path:
    """Return the first layers of Qwen3-30B-A3B with few tokens, 1.5 GB."""
    config = dataclasses.replace(qwen3_30b_a3b(HELD_LAYERS), vocab_size=HELD_VOCAB)
    return inputs.file("mixture-held.gguf", functools.partial(write_large_mixture, config=config))


def distill_argv(size: Size, inputs: Inputs) -> list[str]:
    """Return the arguments of a run of ``STEPS`` steps."""
    student = changed_student(inputs, size.student_name, size.student) if size.student else demo_student(inputs)
    text = inputs.file("argparse.txt", lambda path: shutil.copyfile(argparse.__file__, path))
    return [
        *("distill", "--teacher", str(mixture_teacher(inputs, size)), "--student", str(student)),
        *(*scratch_words(student), "--data", str(text), "--out", "run", "--device", size.device),
        *("--events", "events.jsonl", "--seed", "1"),
        *set_words({"steps": STEPS, "log_every": 5, "checkpoint_every": 0, **size.settings}),
    ]


def collect_distill(size: Size, run_dir: Path, inputs: Inputs) -> Facts:
    """Read the checkpoint and the teacher's file, and say how fast its weights were read."""
    facts = collect_checkpoint(run_dir, inputs) | gguf_facts(mixture_teacher(inputs, size))
    shutil.rmtree(run_dir / "run" / "model", ignore_errors=True)  # what a checkpoint holds too
    ready = read_events(run_dir, "teacher_ready")
    if ready:
        facts["figures"] = {
            "seconds to load the teacher": ready[0]["seconds"],
            "bytes of tensors loaded in a second": ready[0]["tensor_bytes"] / ready[0]["seconds"],
        }
    return facts


declare(
    "cuda-distill-30b",
    f"{STEPS} steps of 8,192 tokens, a teacher in Qwen3-30B-A3B's shapes and a 0.5B student on the GPU",
    Arm(None, functools.partial(distill_argv, LARGE), timeout_s=1800, stall_s=600),
    needs=("cuda",),
    collect=functools.partial(collect_distill, LARGE),
    exclusive=True,
)
declare(
    "distill-mixture",
    f"{STEPS} steps of 256 tokens, a teacher with 64 experts of 153 M weights and the demo student",
    Arm(None, functools.partial(distill_argv, SMALL), timeout_s=240, stall_s=60, env=ONE_THREAD, interval_s=0.02),
    collect=functools.partial(collect_distill, SMALL),
    measures=("memory",),
)
