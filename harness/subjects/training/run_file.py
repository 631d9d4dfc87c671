"""Experiments on where settings come from: their schema, RUN.yaml as printed and read back, and as people write it."""

import json
from pathlib import Path
from typing import Any

import yaml

from q4kd.harness.inputs.collect import arm_of
from q4kd.harness.inputs.command_lines import set_words
from q4kd.harness.runs.experiment import Arm, Facts, Inputs, experiment

# Every setting but teacher_cache, which excludes others; none is at its default, most are at a bound or beside one.
SETTINGS: dict[str, object] = {
    "teacher": "teacher.gguf", "student": "student", "data": "texts", "out": "run", "data_format": "jsonl",
    "data_glob": "**/*.jsonl", "data_max_bytes": 1 << 60, "text_field": "body", "messages_field": "turns",
    "begin_of_text": "false", "chat_date": "2026-11-30", "ignore_fields": "label,images",
    "completion_only": True, "held_out": "held-out.jsonl", "packing": "none", "streaming": True, "shuffle_buffer": 1,
    "seq_len": 2, "batch_size": 65536, "accumulation": 65535, "epochs": 0.000001, "steps": 1, "max_steps": 2,
    "lr": 0.000123456789, "schedule": "linear", "warmup_steps": 0, "alpha": 1.0, "temperature": 1000.0,
    "divergence": "jsd", "beta": 0.999, "loss_mode": "low", "loss_logits": "bfloat16", "chunk_tokens": 1048576,
    "student_dtype": "bfloat16", "from_scratch": True, "student_kernels": "liger",
    "gradient_checkpointing": True, "compile": True,
    "lora_rank": 4096, "lora_alpha": 0.0, "lora_dropout": 0.99, "lora_targets": "q_proj,v_proj",
    "optimizer": "paged_adamw_8bit", "beta1": 0.0, "beta2": 0.99999, "eps": 1e-30, "weight_decay": 10.0, "clip": 1e-9,
    "backend": "dense", "device": "cuda", "dtype": "bfloat16", "threads": 4096, "log_every": 0,
    "trackers": "tensorboard,wandb", "eval_every": 7, "eval_tokens": 0, "checkpoint_every": 0, "keep": 1,
    "best_metric": "agreement", "best_resumable": True, "seed": 4294967295, "allow_degenerate_kd": True,
    "hang_s": 10000000.0,
}  # fmt: skip
# What people write, in the words of YAML 1.1, whose numbers with an exponent and without a point are text.
WRITTEN = """\
# a run, by hand
teacher: "teacher.gguf"
student: 'student'
data: texts
out: run   # comment
lr: 1e-3
weight_decay: 1
batch_size: 0x10
seq_len: 1_024
warmup_steps: 010
streaming: yes
compile: off
steps: ~
eval_every: &often 50
checkpoint_every: *often
lora_targets: >-
  q_proj,
  v_proj
text_field: "2"
seed: 5
temperature: 2.0
"""
FLAGS = ("--seed", "6", "--temperature", "3", "--no-streaming", "--set", "temperature=4")


def _printed_argv(_inputs: Inputs) -> list[str]:
    return ["distill", *set_words(SETTINGS), "--print-config"]


def _written_argv(inputs: Inputs) -> list[str]:
    path = inputs.file("RUN.yaml", lambda path: path.write_text(WRITTEN, encoding="utf-8"))
    return ["distill", str(path), *FLAGS, "--print-config"]


@experiment(
    "run-files",
    "the schema of the settings; every setting printed as RUN.yaml and read back; a RUN.yaml by hand, under flags",
    Arm("schema", lambda _inputs: ["distill", "--print-schema"], timeout_s=60),
    Arm("printed", _printed_argv, timeout_s=60),
    Arm("read", lambda _inputs: ["distill", "../run-files.printed/stdout.log", "--print-config"], timeout_s=60),
    Arm("written", _written_argv, timeout_s=60),
)
def _collect_run_files(run_dir: Path, _inputs: Inputs) -> Facts:
    """Read back what the command printed, with PyYAML and ``json`` alone."""
    printed = (run_dir / "stdout.log").read_text(encoding="utf-8")
    if not printed:
        return {}
    arm = arm_of(run_dir)
    if arm == "schema":
        return {"tables": {"schema": _schema_table(json.loads(printed))}}
    values = yaml.safe_load(printed)
    if arm == "written":
        return {"tables": {"values": {name: json.dumps(value) for name, value in values.items() if name in _NAMED}}}
    return {
        "tables": {
            "settings": {
                "settings": len(values),
                "not as they were set": sum(values.get(name) != value for name, value in SETTINGS.items()),
                "not set": ", ".join(sorted(set(values) - set(SETTINGS))),
            }
        }
    }


_NAMED = {line.partition(":")[0] for line in WRITTEN.splitlines() if line[0].isalpha()}


def _schema_table(schema: dict[str, Any]) -> dict[str, str]:
    """Return default, bounds and choices of each setting, as in ``0.1 of [0.0, 1.0]``, and whether there are others."""
    table = {"any other": json.dumps(schema.get("additionalProperties", True))}
    for name, entry in schema["properties"].items():
        default = json.dumps(entry["default"]) if "default" in entry else "required"
        bounds = [entry["minimum"], entry["maximum"]] if "minimum" in entry else entry.get("enum", entry.get("type"))
        table[name] = f"{default} of {json.dumps(bounds)}"
    return table
