"""Experiments on the loss: the fused loss by itself, and the first one that a real run logs."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from q4kd.harness.experiment import Arm, Experiment, Inputs, register
from q4kd.harness.experiments_teacher import demo_teacher, save_pairs
from q4kd.harness.reference import from_hugging_face, read_gguf, reference_logits, reference_loss
from q4kd.trainer.demo import student_path
from q4kd.trainer.files import read_json

# --- kd-loss: the fused loss against a dense float64 reference ---

_DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
GRADIENT_ELEMENTS = 400


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
    # Of each gradient a seeded choice of elements: the evidence of many sabotaged runs is kept for good.
    rng = np.random.default_rng(6)
    of_hidden = rng.choice(hidden.size, GRADIENT_ELEMENTS, replace=False)
    of_weight = rng.choice(weight.size, GRADIENT_ELEMENTS, replace=False)
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
        hidden_gradients[0].append(found[f"{name}-grad_hidden"].ravel()[of_hidden])
        hidden_gradients[1].append(grad_hidden.ravel()[of_hidden])
        weight_gradients[0].append(found[f"{name}-grad_weight"].ravel()[of_weight])
        weight_gradients[1].append((exact.grad_logits.T @ hidden[kept]).ravel()[of_weight])

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


def demo_student(inputs: Inputs) -> Path:
    """Return the demo student as an input of this session: a config and a tokenizer, no weights."""
    return inputs.file("fresh-student", lambda folder: shutil.copytree(student_path(), folder))


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

        load_student(demo_student(inputs), seed=7).save_pretrained(folder)  # type: ignore[operator]
        load_tokenizer(demo_student(inputs)).save_pretrained(folder)

    return inputs.file("student", make)


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
        *("distill", "--teacher", str(demo_teacher(inputs)), "--student", str(_student_with_weights(inputs))),
        *("--data", str(_one_batch(inputs)), "--out", "run", "--events", "events.jsonl", "--max-steps", "1"),
        *(
            "--seq-len",
            str(_SEQ_LEN),
            "--dtype",
            "float32",
            "--set",
            f"batch_size={_SEQUENCES}",
            "--set",
            f"alpha={_ALPHA}",
        ),
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
    end_of_text = tokenizer.token_to_id(str(settings["eos_token"]))
    ids = [*tokenizer.encode(_one_batch(inputs).read_text(), add_special_tokens=False).ids, end_of_text]
    student = from_hugging_face(
        load_file(student_folder / "model.safetensors"), read_json(student_folder / "config.json")
    )
    teacher = read_gguf(demo_teacher(inputs))
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
