"""Experiments on the loss: the fused loss by itself, and the first one that a real run logs."""

import json
from pathlib import Path

import numpy as np

from q4kd.harness.inputs.arrays import Array, Arrays, arrays_input, read_arrays
from q4kd.harness.inputs.collect import read_events, reference_step, save_pairs
from q4kd.harness.inputs.command_lines import probe_words, set_words
from q4kd.harness.inputs.demo import cut_text, demo_teacher, weighted_student
from q4kd.harness.oracles.reference import reference_loss
from q4kd.harness.records.json_types import JsonValue
from q4kd.harness.runs.experiment import ONE_THREAD, Arm, Facts, Inputs, experiment

# --- kd-loss: the fused loss against a dense float64 reference ---

_DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
_TEMPERATURES = (1.0, 2.0)
_ALPHAS = (0.0, 0.3)
GRADIENT_ELEMENTS = 400


def _case(divergence: str, temperature: float, alpha: float) -> str:
    return f"{divergence}-t{temperature:g}-a{alpha:g}"


def _loss_cases() -> dict[str, dict[str, JsonValue]]:
    cases: dict[str, dict[str, JsonValue]] = {}
    for divergence in _DIVERGENCES:
        common: dict[str, JsonValue] = {"divergence": divergence, "chunk_tokens": 7}
        for temperature in _TEMPERATURES:
            for alpha in _ALPHAS:
                name = _case(divergence, temperature, alpha)
                cases[name] = {**common, "temperature": temperature, "alpha": alpha}
        cases[f"{divergence}-equal"] = {**common, "alpha": 0.0, "equal": True}
        # At T = 2 the term must be 4 x the term of halved logits at T = 1, to the last bit.
        cases[f"{divergence}-halved"] = {**common, "alpha": 0.0, "scale": 0.5}
    return cases


def _loss_inputs(inputs: Inputs) -> Path:
    def make() -> Arrays:
        rng = np.random.default_rng(4)
        labels = rng.integers(0, 300, 40)
        labels[::5] = -100
        return {
            "hidden": rng.normal(0, 1, (40, 24)).astype(np.float32),
            "weight": rng.normal(0, 0.5, (300, 24)).astype(np.float32),
            "teacher_hidden": rng.normal(0, 1, (40, 32)).astype(np.float32),
            "teacher_weight": rng.normal(0, 0.4, (304, 32)).astype(np.float32),
            "labels": labels,
            "cases": np.array(json.dumps(_loss_cases())),
        }

    return arrays_input(inputs, "kd-loss.npz", make)


@experiment(
    "kd-loss",
    "the fused loss and its gradients against a dense float64 reference",
    Arm(
        None,
        lambda inputs: probe_words("kd-loss", inputs=_loss_inputs(inputs), out="loss.npz"),
        timeout_s=60,
        env=ONE_THREAD,
    ),
)
def _collect_loss(run_dir: Path, inputs: Inputs) -> Facts:
    if not (found := read_arrays(run_dir / "loss.npz")):
        return {"comparators": {}}
    given = read_arrays(_loss_inputs(inputs))
    kept = given["labels"] >= 0
    hidden, weight = given["hidden"].astype(np.float64), given["weight"].astype(np.float64)
    student = hidden[kept] @ weight.T
    teacher = (given["teacher_hidden"].astype(np.float64)[kept] @ given["teacher_weight"].astype(np.float64).T)[:, :300]
    # A seeded choice of each gradient's elements is kept, since the evidence of many sabotaged runs stays for good.
    rng = np.random.default_rng(6)
    of_hidden = rng.choice(hidden.size, GRADIENT_ELEMENTS, replace=False)
    of_weight = rng.choice(weight.size, GRADIENT_ELEMENTS, replace=False)
    pairs: dict[str, list[tuple[Array, Array]]] = {"loss": [], "grad-hidden": [], "grad-weight": []}
    for divergence in _DIVERGENCES:
        for temperature in _TEMPERATURES:
            for alpha in _ALPHAS:
                options = {"alpha": alpha, "temperature": temperature}
                exact = reference_loss(student, teacher, given["labels"][kept], **options, divergence=divergence)
                grad_hidden = np.zeros_like(hidden)
                grad_hidden[kept] = exact.grad_logits @ weight
                grad_weight = exact.grad_logits.T @ hidden[kept]
                name = _case(divergence, temperature, alpha)
                pairs["loss"].append((found[f"{name}-terms"][:1], np.array([exact.loss])))
                for part, gradient, chosen in (("hidden", grad_hidden, of_hidden), ("weight", grad_weight, of_weight)):
                    elements = found[f"{name}-grad_{part}"].ravel()[chosen], gradient.ravel()[chosen]
                    pairs[f"grad-{part}"].append(elements)
    columns = {name: (np.array([a for a, _ in rows]), np.array([b for _, b in rows])) for name, rows in pairs.items()}
    comparators = save_pairs(run_dir, columns, ("trainer fused loss", "dense float64 loss of the harness"))

    def kd_terms(*cases: str) -> Array:
        return np.array([[float(found[f"{case}-terms"][2])] for case in cases])

    at_equality = {
        "kl-at-equality": (kd_terms("forward_kl-equal", "reverse_kl-equal"), np.zeros((2, 1))),
        "jsd-at-equality": (kd_terms("jsd-equal"), np.zeros((1, 1))),
    }
    comparators |= save_pairs(run_dir, at_equality, ("trainer fused loss, teacher = student", "zero"))
    scaled = kd_terms(*(_case(divergence, 2.0, 0.0) for divergence in _DIVERGENCES))
    halved = kd_terms(*(f"{divergence}-halved" for divergence in _DIVERGENCES))
    sources = ("trainer fused loss at T = 2", "4 x the loss of halved logits at T = 1")
    comparators |= save_pairs(run_dir, {"t-squared": (scaled, 4 * halved)}, sources)
    return {"comparators": comparators}


# --- first-step: the loss that `q4kd distill` logs for a batch the harness can recompute ---

_SEQ_LEN, _SEQUENCES, _ALPHA, _TEMPERATURE = 32, 4, 0.4, 2
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


def _one_batch(inputs: Inputs) -> Path:
    """Return a text that makes exactly one batch, so that its order cannot matter."""
    text = cut_text(inputs, _TEXT * 8, _SEQ_LEN * _SEQUENCES)
    return inputs.file("one-batch.txt", lambda path: path.write_text(text))


def _first_step_argv(inputs: Inputs) -> list[str]:
    settings = {"batch_size": _SEQUENCES, "alpha": _ALPHA, "temperature": _TEMPERATURE, "lr": 0.001}
    return [
        *("distill", "--teacher", str(demo_teacher(inputs)), "--student", str(weighted_student(inputs))),
        *("--data", str(_one_batch(inputs)), "--out", "run", "--events", "events.jsonl", "--max-steps", "1"),
        *("--seq-len", str(_SEQ_LEN), "--dtype", "float32", *set_words(settings)),
    ]


@experiment(
    "first-step",
    "the first loss that q4kd distill logs, against a float64 teacher, student and loss",
    Arm(None, _first_step_argv, timeout_s=120, stall_s=90, env=ONE_THREAD),
)
def _collect_first_step(run_dir: Path, inputs: Inputs) -> Facts:
    step = next(iter(read_events(run_dir, "step")), None)
    if step is None:
        return {"comparators": {}}
    subject = np.array([[step["loss"]], [step["ce"]], [step["kd"]]], np.float64)
    shape = (_SEQUENCES, _SEQ_LEN)
    teacher, text = demo_teacher(inputs), _one_batch(inputs)
    exact = reference_step(inputs, teacher, text, shape, alpha=_ALPHA, temperature=_TEMPERATURE)
    sources = ("step event of q4kd distill", "float64 teacher, student and loss of the harness")
    return {"comparators": save_pairs(run_dir, {"first-step": (subject, exact)}, sources)}
