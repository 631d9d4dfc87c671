"""The replayed runs: what each is given, and what the harness computes of it in float64."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from q4kd.harness.inputs.arrays import Arrays, Floats, arrays_input, read_arrays
from q4kd.harness.inputs.command_lines import scratch_words, set_words
from q4kd.harness.inputs.models.apr_write import huggingface_name
from q4kd.harness.inputs.small_pair import (
    ROWS,
    completion_documents,
    completions,
    fresh_small_student,
    small_student,
    small_teacher,
)
from q4kd.harness.oracles.reference import read_gguf
from q4kd.harness.oracles.windows import Packing, Windows, cut_windows
from q4kd.harness.runs.experiment import Inputs
from q4kd.trainer.files import read_json

if TYPE_CHECKING:
    from q4kd.harness.oracles.training import Half

SEQ_LEN = 64
TRAINED, HELD_OUT = (0, 38), (100, 14)
# Few settings have their default, and eps is as large as the roots it is added to, so that the sign of a tiny gradient
# decides nothing.
_COMMON: Mapping[str, Any] = {
    "seed": 11,
    "lr": 4e-3,
    "warmup_steps": 3,
    "schedule": "cosine",
    "alpha": 0.3,
    "temperature": 2.0,
    "divergence": "forward_kl",
    "beta": 0.5,
    "beta1": 0.8,
    "beta2": 0.95,
    "eps": 1e-3,
    "weight_decay": 0.3,
    "clip": 1.0,
    "batch_size": 2,
    "accumulation": 2,
    "eval_every": 2,
    "eval_tokens": 5 * SEQ_LEN + 7,
    "epochs": 1.7,
    "steps": None,
}


@dataclass(frozen=True)
class Leg:
    """A replayed run.

    Attributes:
        changes: its settings that the oracle needs, where they are not the common ones.
        more: its other settings.
        stops: steps at which the run is ended and resumed by another process.
        dropout: of the student's attention.
        is_fresh: whether the student's weights come from the seed.
    """

    changes: Mapping[str, Any]
    more: Mapping[str, Any]
    stops: tuple[int, ...] = ()
    dropout: float = 0.0
    is_fresh: bool = False

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that the oracle needs."""
        return {**_COMMON, **self.changes}

    @property
    def packing(self) -> Packing:
        """How documents become windows."""
        packing: Packing = self.more.get("packing", "documents")
        return packing

    @property
    def only_completions(self) -> bool:
        """Whether prompts have no label."""
        return bool(self.more.get("completion_only", True))

    @property
    def targets(self) -> list[str]:
        """Names of the modules that have adapters; none where all weights are trained."""
        return str(self.more["lora_targets"]).split(",") if self.settings.get("lora_rank") else []

    @property
    def rounds_weights(self) -> bool:
        """Whether the student is bfloat16."""
        return self.more.get("student_dtype") == "bfloat16"


_THREE_LARGE_STEPS: Mapping[str, Any] = {"steps": 3, "batch_size": 3, "accumulation": 1}

LEGS: Mapping[str, Leg] = {
    "whole": Leg({}, {"best_metric": "loss", "checkpoint_every": 3, "keep": 1}),
    "dropout": Leg(
        {"seed": 12, "schedule": "linear", "steps": 4, "warmup_steps": 0, "eval_every": 1, "clip": 1e9},
        {"best_metric": "loss", "keep": 4},
        stops=(2,),
        dropout=0.25,
    ),
    "bfloat16": Leg(
        # Weights move less than bfloat16 can hold, so that what is only in the masters decides.
        {"seed": 13, "schedule": "constant", "steps": 5, "warmup_steps": 1, "lr": 4e-4},
        {"student_dtype": "bfloat16", "best_metric": "kl"},
        stops=(2,),
    ),
    "reverse": Leg(
        # The rate is too high on purpose: agreement falls from 26 of 320 tokens to 4 in the last step, so that the best
        # checkpoint is not the last by far more than the tokens that another processor decides otherwise.
        {"seed": 6, "lr": 0.3, "divergence": "reverse_kl", "schedule": "linear", **_THREE_LARGE_STEPS},
        {"packing": "stream", "completion_only": False, "chunk_tokens": 50, "best_metric": "agreement", "keep": 1}
        | {"best_resumable": True},
    ),
    "jsd": Leg(
        {"seed": 15, "divergence": "jsd", "beta": 0.3, "schedule": "constant", "warmup_steps": 0, "epochs": 0.3},
        {"packing": "none", "loss_mode": "low", "best_metric": "kl", "keep": 1},
        is_fresh=True,
    ),
    "adapters": Leg(
        {"seed": 16, "steps": 4, "schedule": "constant", "warmup_steps": 0, "lr": 0.02, "eval_every": 0, "clip": 1e9}
        | {"lora_rank": 3, "lora_alpha": 7.5, "lora_dropout": 0.25},
        {"lora_targets": "q_proj,down_proj"},
    ),
}


def _student(inputs: Inputs, leg: Leg) -> Path:
    return fresh_small_student(inputs) if leg.is_fresh else small_student(inputs, leg.dropout)


def command_lines(inputs: Inputs) -> list[list[str]]:
    """Return the command lines of all runs in order, a resumed one after what it goes on from."""
    data = completions(inputs, "completions.jsonl", *TRAINED)
    held_out = completions(inputs, "held-out-completions.jsonl", *HELD_OUT)
    lines = []
    for name, leg in LEGS.items():
        given = {key: value for key, value in leg.settings.items() if value is not None}
        words = [
            *("distill", "--teacher", str(small_teacher(inputs)), "--student", str(_student(inputs, leg))),
            *("--data", str(data), "--out", name, "--events", f"{name}.jsonl", "--dtype", "float32"),
            *scratch_words(_student(inputs, leg)),
            *set_words({"held_out": held_out, "seq_len": SEQ_LEN, "completion_only": True, "checkpoint_every": 0}),
            *set_words({**given, **leg.more}),
        ]
        resumes: list[str] = []
        for stop in leg.stops:
            lines.append([*words, "--max-steps", str(stop), *resumes])
            resumes = ["--resume"]
        lines.append([*words, *resumes])
    return lines


# --- what the harness computes ---


def _start_weights(inputs: Inputs, leg: Leg) -> Arrays:
    """Return the weights before the first step, float64, by Hugging Face name; transformers draws a fresh student's."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM

    from q4kd.harness.oracles.adapters import fresh_adapters
    from q4kd.harness.oracles.drawing import drawn_from

    folder = _student(inputs, leg)
    # A student is loaded in its dtype, and its masters begin there.
    dtype = torch.bfloat16 if leg.rounds_weights else torch.float32

    def widened(tensors: Mapping[str, torch.Tensor]) -> Arrays:
        return {name: value.to(dtype).double().numpy() for name, value in tensors.items()}

    if leg.is_fresh:
        make: Any = AutoModelForCausalLM.from_config
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        drawn = drawn_from(
            leg.settings["seed"],
            lambda: widened({name: value.detach() for name, value in make(config).named_parameters()}),
        )
        start = dict(drawn)
    else:
        start = widened(load_file(folder / "model.safetensors"))
    if leg.targets:
        start |= fresh_adapters(folder, leg.settings["seed"], leg.settings["lora_rank"], leg.targets)
    return start


def _teach(inputs: Inputs, windows: Windows) -> Floats:
    """Return the teacher's logits of the student's rows ``[N, T, V]``, its weights decoded by the gguf package."""
    import torch

    from q4kd.harness.oracles.adapters import keep_all
    from q4kd.harness.oracles.training import logits_of

    model = read_gguf(small_teacher(inputs))
    config = {
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "rms_norm_eps": model.rms_eps,
        "rope_theta": model.frequencies[1] ** -len(model.frequencies),
    }
    weights = {huggingface_name(name): torch.from_numpy(weight) for name, weight in model.weights.items()}
    return np.asarray(logits_of(weights, config, windows, keep_all)[..., :ROWS].numpy())


def _half(inputs: Inputs, leg: Leg, which: tuple[int, int]) -> "Half":
    from q4kd.harness.oracles.training import Half

    documents = completion_documents(*which, only_completions=leg.only_completions)
    windows = cut_windows(documents, SEQ_LEN, leg.packing)
    return Half(windows, _teach(inputs, windows))


def _replayed(inputs: Inputs, leg: Leg) -> Arrays:
    from q4kd.harness.oracles.training import Recipe, one_thread, replay

    recipe = Recipe(**leg.settings, rounds_weights=leg.rounds_weights)
    config, start = read_json(_student(inputs, leg) / "config.json"), _start_weights(inputs, leg)
    with one_thread():
        found = replay(recipe, config, start, _half(inputs, leg, TRAINED), _half(inputs, leg, HELD_OUT))
    arrays: Arrays = {f"weight:{name}": value for name, value in found.weights.items()}
    arrays |= {f"start:{name}": value for name, value in start.items()}
    arrays["steps"] = np.array(found.steps)
    arrays["clipped"] = np.array(found.clipped)
    arrays["evaluated"] = np.array(list(found.evaluations))
    arrays["evaluations"] = np.array(list(found.evaluations.values()))
    return arrays


def replayed(inputs: Inputs, name: str) -> Arrays:
    """Return the float64 replay of a run, computed once a session: it depends on files and settings alone.

    ``steps [steps, 5]``, ``evaluations [evaluations, 5]`` and ``clipped [steps]`` are those of ``Replay``;
    ``evaluated`` is the number of steps before each evaluation; ``start:NAME`` and ``weight:NAME`` are the weights
    before and after.
    """
    return read_arrays(arrays_input(inputs, f"replay-{name}.npz", functools.partial(_replayed, inputs, LEGS[name])))
