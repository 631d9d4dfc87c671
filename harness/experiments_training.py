"""Experiments on training: the loss itself, its first step end to end, a run that must survive, KD against CE."""

import functools
import json
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np

from q4kd.harness.experiment import Arm, Experiment, Inputs, register
from q4kd.harness.experiments_teacher import save_pairs
from q4kd.harness.reference import from_hugging_face, read_gguf, reference_logits, reference_loss
from q4kd.trainer.demo import student_path, teacher_path
from q4kd.trainer.files import read_json, sha256_file

# --- kd-loss: the fused loss against a dense float64 reference ---

_DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")


def _loss_cases() -> dict[str, dict[str, Any]]:
    cases: dict[str, dict[str, Any]] = {}
    for divergence in _DIVERGENCES:
        for temperature in (1.0, 2.0):
            for alpha in (0.0, 0.3):
                name = f"{divergence}-t{temperature:g}-a{alpha:g}"
                cases[name] = {"divergence": divergence, "temperature": temperature, "alpha": alpha}
        cases[f"{divergence}-equal"] = {"divergence": divergence, "alpha": 0.0, "equal": True}
        # T² scaling: at T = 2 the term must be 4 x the term at T = 1 of halved logits, to the last bit.
        cases[f"{divergence}-halved"] = {"divergence": divergence, "alpha": 0.0, "scale": 0.5}
    for settings in cases.values():
        settings["chunk_tokens"] = 7
    return cases


def _loss_inputs(inputs: Inputs) -> Path:
    def make(path: Path) -> None:
        rng = np.random.default_rng(4)
        labels = rng.integers(0, 300, 40)
        labels[::5] = -100
        with path.open("wb") as file:
            np.savez_compressed(
                file,
                hidden=rng.normal(0, 1, (40, 24)).astype(np.float32),
                weight=rng.normal(0, 0.5, (300, 24)).astype(np.float32),
                teacher_hidden=rng.normal(0, 1, (40, 32)).astype(np.float32),
                teacher_weight=rng.normal(0, 0.4, (304, 32)).astype(np.float32),
                labels=labels,
                cases=json.dumps(_loss_cases()),
            )

    return inputs.file("kd-loss.npz", make)


def _loss_argv(inputs: Inputs) -> list[str]:
    return ["probe", "kd-loss", "--inputs", str(_loss_inputs(inputs)), "--out", "loss.npz"]


def _collect_loss(run_dir: Path, inputs: Inputs) -> dict[str, Any]:
    if not (run_dir / "loss.npz").is_file():
        return {"comparators": {}}
    with np.load(run_dir / "loss.npz", allow_pickle=False) as arrays:
        found = dict(arrays)
    with np.load(_loss_inputs(inputs), allow_pickle=False) as arrays:
        given = dict(arrays)
    kept = given["labels"] >= 0
    hidden, weight = given["hidden"].astype(np.float64), given["weight"].astype(np.float64)
    student = hidden[kept] @ weight.T
    teacher = (given["teacher_hidden"].astype(np.float64)[kept] @ given["teacher_weight"].astype(np.float64).T)[:, :300]
    losses: tuple[list[Any], list[Any]] = ([], [])
    hidden_gradients: tuple[list[Any], list[Any]] = ([], [])
    weight_gradients: tuple[list[Any], list[Any]] = ([], [])
    for name, settings in _loss_cases().items():
        if "equal" in settings or "scale" in settings:
            continue
        exact = reference_loss(
            student,
            teacher,
            given["labels"][kept],
            alpha=settings["alpha"],
            temperature=settings["temperature"],
            divergence=settings["divergence"],
        )
        losses[0].append(found[f"{name}-terms"][:1])
        losses[1].append([exact.loss])
        grad_hidden = np.zeros_like(hidden)
        grad_hidden[kept] = exact.grad_logits @ weight
        hidden_gradients[0].append(found[f"{name}-grad_hidden"].ravel())
        hidden_gradients[1].append(grad_hidden.ravel())
        weight_gradients[0].append(found[f"{name}-grad_weight"].ravel())
        weight_gradients[1].append((exact.grad_logits.T @ hidden[kept]).ravel())

    def term(case: str) -> list[float]:
        return [float(found[f"{case}-terms"][2])]

    kl_equal = [term(f"{name}-equal") for name in ("forward_kl", "reverse_kl")]
    scaled = [term(f"{name}-t2-a0") for name in _DIVERGENCES]
    four_times = [[4 * term(f"{name}-halved")[0]] for name in _DIVERGENCES]
    comparators = save_pairs(
        run_dir,
        {
            "loss": (np.array(losses[0]), np.array(losses[1])),
            "grad-hidden": (np.array(hidden_gradients[0]), np.array(hidden_gradients[1])),
            "grad-weight": (np.array(weight_gradients[0]), np.array(weight_gradients[1])),
        },
        ("trainer fused loss", "dense float64 loss of the harness"),
    )
    comparators |= save_pairs(
        run_dir,
        {
            "kl-at-equality": (np.array(kl_equal), np.zeros((2, 1))),
            "jsd-at-equality": (np.array([term("jsd-equal")]), np.zeros((1, 1))),
        },
        ("trainer fused loss, teacher = student", "zero"),
    )
    comparators |= save_pairs(
        run_dir,
        {"t-squared": (np.array(scaled), np.array(four_times))},
        ("trainer fused loss at T = 2", "4 x the loss of halved logits at T = 1"),
    )
    return {"comparators": comparators}


register(
    Experiment(
        name="kd-loss",
        title="the fused loss and its gradients against a dense float64 reference",
        needs=(),
        arms=(Arm(None, _loss_argv, timeout_s=60),),
        prepare=lambda inputs: _loss_inputs(inputs) and None,
        collect=_collect_loss,
    )
)


# --- first-step: the loss that `q4kd distill` logs for a batch the harness can recompute ---

_SEQ_LEN, _SEQUENCES, _ALPHA = 32, 4, 0.4
_TEXT = """def mean(values):
    \"\"\"Return the arithmetic mean of a non-empty sequence of numbers.\"\"\"
    if not values:
        raise ValueError("mean of nothing")
    return sum(values) / len(values)


class Counter(dict):
    def update(self, words):
        for word in words:
            self[word] = self.get(word, 0) + 1
"""


def _student_with_weights(inputs: Inputs) -> Path:
    """Give the demo student weights of the harness's own drawing, so that the reference knows them."""

    def make(folder: Path) -> None:
        from q4kd.trainer.student import load_student, load_tokenizer

        load_student(student_path(), seed=7).save_pretrained(folder)  # type: ignore[operator]
        load_tokenizer(student_path()).save_pretrained(folder)

    return inputs.file("student", make)


def _token_ids(inputs: Inputs) -> list[int]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(_student_with_weights(inputs) / "tokenizer.json"))
    ids: list[int] = tokenizer.encode(_TEXT * 8, add_special_tokens=False).ids
    return ids


def _one_batch(inputs: Inputs) -> Path:
    """Write a text that makes exactly one batch, so that its order cannot matter."""

    def make(path: Path) -> None:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(_student_with_weights(inputs) / "tokenizer.json"))
        text = _TEXT * 8
        offsets = tokenizer.encode(text, add_special_tokens=False).offsets
        # The end-of-text token is the last of seq_len * sequences + 1 tokens.
        path.write_text(text[: offsets[_SEQ_LEN * _SEQUENCES - 1][1]])

    return inputs.file("one-batch.txt", make)


def _first_step_argv(inputs: Inputs) -> list[str]:
    return [
        *("distill", "--teacher", str(teacher_path()), "--student", str(_student_with_weights(inputs))),
        *("--data", str(_one_batch(inputs)), "--out", "run", "--events", "events.jsonl", "--max-steps", "1"),
        *("--seq-len", str(_SEQ_LEN), "--set", f"batch_size={_SEQUENCES}", "--set", f"alpha={_ALPHA}"),
        *("--set", "temperature=2", "--set", "lr=0.001"),
    ]


def _collect_first_step(run_dir: Path, inputs: Inputs) -> dict[str, Any]:
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    step = next((event for event in events if event["event"] == "step"), None)
    if step is None:
        return {"comparators": {}}
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    student_folder = _student_with_weights(inputs)
    tokenizer = Tokenizer.from_file(str(student_folder / "tokenizer.json"))
    settings = read_json(student_folder / "tokenizer_config.json")
    ids = tokenizer.encode(_one_batch(inputs).read_text(), add_special_tokens=False).ids
    ids.append(tokenizer.token_to_id(str(settings["eos_token"])))
    student = from_hugging_face(
        load_file(student_folder / "model.safetensors"), read_json(student_folder / "config.json")
    )
    teacher = read_gguf(teacher_path())
    windows = np.array([ids[start : start + _SEQ_LEN + 1] for start in range(0, len(ids) - 1, _SEQ_LEN)])
    if windows.shape != (_SEQUENCES, _SEQ_LEN + 1):
        raise ValueError(f"the text makes windows of shape {windows.shape}")
    exact = reference_loss(
        np.concatenate([reference_logits(student, window[:-1]) for window in windows]),
        np.concatenate([reference_logits(teacher, window[:-1]) for window in windows]),
        windows[:, 1:].ravel(),
        alpha=_ALPHA,
        temperature=2.0,
        divergence="forward_kl",
    )
    subject = np.array([[step["loss"]], [step["ce"]], [step["kd"]]], np.float64)
    reference = np.array([[exact.loss], [exact.ce], [exact.kd]])
    sources = ("step event of q4kd distill", "float64 teacher, student and loss of the harness")
    return {"comparators": save_pairs(run_dir, {"first-step": (subject, reference)}, sources)}


register(
    Experiment(
        name="first-step",
        title="the first loss that q4kd distill logs, against a float64 teacher, student and loss",
        needs=(),
        arms=(Arm(None, _first_step_argv, timeout_s=120, stall_s=90),),
        prepare=lambda inputs: _one_batch(inputs) and None,
        collect=_collect_first_step,
    )
)


# --- distill-run and kd-vs-control: real runs on the Python standard library's source ---


def _distill_argv(
    alpha: float, seed: int, steps: int, checkpoint_every: int, eval_tokens: int, _inputs: Inputs
) -> list[str]:
    settings = {
        "steps": steps,
        "batch_size": 8,
        "lr": 0.003,
        "warmup_steps": 10,
        "eval_tokens": eval_tokens,
        "checkpoint_every": checkpoint_every,
        "data_glob": "**/*.py",
        "data_max_bytes": 2_500_000,
        "alpha": alpha,
    }
    return [
        *("distill", "--teacher", str(teacher_path()), "--student", str(student_path())),
        *("--data", sysconfig.get_paths()["stdlib"], "--out", "run", "--events", "events.jsonl"),
        *("--seq-len", "64", "--seed", str(seed)),
        *[word for key, value in settings.items() for word in ("--set", f"{key}={value}")],
    ]


def _collect_checkpoint(run_dir: Path, _inputs: Inputs) -> dict[str, Any]:
    """Read the newest checkpoint without the trainer's reader: counters, finiteness, digests."""
    from safetensors.numpy import load_file

    folders = sorted((run_dir / "run" / "checkpoints").glob("step-*"))
    if not folders:
        return {"checkpoint": None}
    state = read_json(folders[-1] / "state.json")
    optimizer = load_file(folders[-1] / "optimizer.safetensors")
    model = load_file(folders[-1] / "model.safetensors")
    counters = [int(value) for name, value in optimizer.items() if name.endswith("|step")]
    return {
        "checkpoint": {
            "step": int(state["step"]),
            "optimizer_step_min": min(counters),
            "optimizer_step_max": max(counters),
            "tensors": len(model),
            "finite": all(bool(np.isfinite(tensor).all()) for tensor in (*model.values(), *optimizer.values())),
            "digests_match": all(sha256_file(folders[-1] / name) == digest for name, digest in state["sha256"].items()),
        }
    }


SURVIVAL_STEPS = 24
CONTROL_STEPS = 120
SEEDS = (1, 2, 3)

register(
    Experiment(
        name="distill-run",
        title=f"q4kd distill for {SURVIVAL_STEPS} steps with checkpoints",
        needs=(),
        arms=(
            Arm(None, functools.partial(_distill_argv, 0.1, 1, SURVIVAL_STEPS, 10, 2048), timeout_s=240, stall_s=45),
        ),
        collect=_collect_checkpoint,
    ),
)

register(
    Experiment(
        name="kd-vs-control",
        title=f"{CONTROL_STEPS} steps of KD and of CE alone, same data, order, steps and tokens, {len(SEEDS)} seeds",
        needs=(),
        arms=tuple(
            Arm(
                f"{arm}-seed{seed}",
                functools.partial(_distill_argv, alpha, seed, CONTROL_STEPS, 0, 8192),
                timeout_s=400,
                stall_s=90,
                env={"OMP_NUM_THREADS": "1"},
            )
            for seed in SEEDS
            for arm, alpha in (("kd", 0.1), ("ce", 1.0))
        ),
        parallel=2,
    ),
)
