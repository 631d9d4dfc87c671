"""A run of several steps in float64, from its files and settings alone: what each step and evaluation must say.

Both models are a Qwen2 of the harness's own in torch.float64, masked by the documents' numbers; the student's gradients
are autograd's. The loss is Hinton's (https://arxiv.org/abs/1503.02531) with generalised divergences
(https://arxiv.org/abs/2306.13649), over all labelled positions of a step; the update is AdamW
(https://arxiv.org/abs/1711.05101). A bfloat16 student multiplies by its rounded masters.

Letters in shapes: B sequences, T positions, N query heads, K key-value heads, D head size, V vocabulary.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from q4kd.harness.oracles.adapters import Adapters, Drop, is_adapter, keep_all, multiply, seeded_dropout
from q4kd.harness.oracles.windows import MASKED, Windows, chosen_windows

Floats = NDArray[np.float64]
Weights = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The settings of a run that decide its numbers, by the names of ``q4kd distill``; ``steps`` is None by epochs."""

    seed: int
    lr: float
    warmup_steps: int
    schedule: Literal["cosine", "linear", "constant"]
    alpha: float
    temperature: float
    divergence: Literal["forward_kl", "reverse_kl", "jsd"]
    beta: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip: float
    batch_size: int
    accumulation: int
    eval_every: int
    eval_tokens: int
    epochs: float
    steps: int | None
    rounds_weights: bool
    lora_rank: int = 0
    lora_alpha: float = 0.0
    lora_dropout: float = 0.0


@dataclass(frozen=True)
class Half:
    """Windows of a split, and the teacher's logits on them, ``[N, T, V]``."""

    windows: Windows
    teacher: Floats


@dataclass
class Replay:
    """What a run must say.

    Attributes:
        steps: loss, cross-entropy, divergence term, gradient norm and learning rate of each step, ``[steps, 5]``.
        evaluations: loss, perplexity, KL, agreement and tokens after each number of steps.
        weights: the trained weights at the end, float64.
        clipped: of each step whether its gradient was clipped.
    """

    steps: list[tuple[float, ...]] = field(default_factory=list)
    evaluations: dict[int, tuple[float, ...]] = field(default_factory=dict)
    weights: dict[str, Floats] = field(default_factory=dict)
    clipped: list[bool] = field(default_factory=list)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread of torch for a while: on tensors this small, several would wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# --- the models ---


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def _rotated(x_BNTD: Tensor, base: float) -> Tensor:
    """Turn element i of a head's first half together with that of its second half."""
    length, size = x_BNTD.shape[-2:]
    frequencies = base ** (-torch.arange(size // 2, dtype=torch.float64) * 2 / size)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    first, second = x_BNTD[..., : size // 2], x_BNTD[..., size // 2 :]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def _attention(
    weights: Weights,
    at: str,
    config: Mapping[str, Any],
    x_BTH: Tensor,
    seen: Tensor,
    drop: Drop,
    adapters: Adapters | None,
) -> Tensor:
    heads = {"q": int(config["num_attention_heads"])}
    heads |= dict.fromkeys("kv", int(config["num_key_value_heads"]))
    base = float((config.get("rope_parameters") or config)["rope_theta"])

    def projected(name: str) -> Tensor:
        out = multiply(x_BTH, weights, f"{at}{name}_proj", adapters) + weights[f"{at}{name}_proj.bias"]
        return out.view(*out.shape[:-1], heads[name], -1).transpose(1, 2)

    query, key = (_rotated(projected(name), base) for name in "qk")
    key, value = (part.repeat_interleave(heads["q"] // heads["k"], 1) for part in (key, projected("v")))
    scores = (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])).masked_fill(~seen, -math.inf)
    shares = scores.softmax(-1)
    mixed = (shares * drop(tuple(shares.shape))) @ value
    return multiply(mixed.transpose(1, 2).flatten(-2), weights, f"{at}o_proj", adapters)


def logits_of(
    weights: Weights, config: Mapping[str, Any], windows: Windows, drop: Drop, adapters: Adapters | None = None
) -> Tensor:
    """Return float64 logits ``[B, T, V]`` of a qwen2 with a tied head; no position sees another document.

    Args:
        weights: float64, by their Hugging Face names.
        config: what config.json says of layers, heads, RMSNorm and RoPE.
        windows: ids, and the number of each position's document.
        drop: masks of the attention's dropout, one call a layer.
        adapters: what those among the weights add to products.
    """
    documents, length = torch.from_numpy(windows.documents), windows.ids.shape[1]
    behind = torch.arange(length)[:, None] >= torch.arange(length)
    seen = (behind & (documents[:, :, None] == documents[:, None, :]))[:, None]
    embedding, eps = weights["model.embed_tokens.weight"], float(config["rms_norm_eps"])
    x = embedding[torch.from_numpy(windows.ids)]
    for layer in range(int(config["num_hidden_layers"])):
        at = f"model.layers.{layer}."
        normed = _norm(x, weights[f"{at}input_layernorm.weight"], eps)
        x = x + _attention(weights, f"{at}self_attn.", config, normed, seen, drop, adapters)
        normed = _norm(x, weights[f"{at}post_attention_layernorm.weight"], eps)
        gate, up = (multiply(normed, weights, f"{at}mlp.{name}_proj", adapters) for name in ("gate", "up"))
        x = x + multiply(gate * gate.sigmoid() * up, weights, f"{at}mlp.down_proj", adapters)
    return _norm(x, weights["model.norm.weight"], eps) @ embedding.T


# --- the loss ---


def divergences(student_PV: Tensor, teacher_PV: Tensor, recipe: Recipe) -> Tensor:
    """Return T² D of each row of logits ``[P, V]``, float64 ``[P]``."""
    log_p = (teacher_PV / recipe.temperature).log_softmax(-1)
    log_q = (student_PV / recipe.temperature).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    if recipe.divergence == "forward_kl":
        rows = (p * (log_p - log_q)).sum(-1)
    elif recipe.divergence == "reverse_kl":
        rows = (q * (log_q - log_p)).sum(-1)
    else:
        log_m = (recipe.beta * p + (1 - recipe.beta) * q).log()
        rows = recipe.beta * (p * (log_p - log_m)).sum(-1) + (1 - recipe.beta) * (q * (log_q - log_m)).sum(-1)
    return recipe.temperature**2 * rows


def _labelled(logits: Tensor, half: Half, chosen: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the student's and the teacher's logits ``[P, V]`` and the labels ``[P]`` of labelled positions."""
    labels = torch.from_numpy(half.windows.labels[chosen])
    kept = labels != MASKED
    return logits[kept], torch.from_numpy(half.teacher[chosen])[kept], labels[kept]


def _evaluate(
    weights: Weights, config: Mapping[str, Any], half: Half, count: int, adapters: Adapters
) -> tuple[float, ...]:
    """Return loss, perplexity, KL at temperature 1, agreement and tokens of the first ``count`` windows."""
    chosen = range(count)
    with torch.no_grad():
        logits = logits_of(weights, config, half.windows.take(np.arange(count)), keep_all, adapters)
        student, teacher, labels = _labelled(logits, half, chosen)
        log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
        loss = -float(log_q[torch.arange(len(labels)), labels].mean())
        kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
        agreement = float((student.argmax(-1) == teacher.argmax(-1)).double().mean())
    return loss, math.exp(loss), kl, agreement, float(len(labels))


# --- the run ---


def rate_of(recipe: Recipe, step: int, steps: int) -> float:
    """Return the rate of a step, counted from 0: linear warm-up to the peak, then the schedule towards 0 at the end."""
    if step < recipe.warmup_steps:
        return recipe.lr * (step + 1) / recipe.warmup_steps
    part = (step - recipe.warmup_steps) / (steps - recipe.warmup_steps)
    left = {"cosine": (1 + math.cos(math.pi * part)) / 2, "linear": 1 - part, "constant": 1.0}
    return recipe.lr * left[recipe.schedule]


def _used(masters: Weights, recipe: Recipe) -> dict[str, Tensor]:
    """Return what the student multiplies by, as leaves that take a gradient."""
    rounded = {
        name: master.bfloat16().double() if recipe.rounds_weights else master for name, master in masters.items()
    }
    return {name: value.detach().clone().requires_grad_(True) for name, value in rounded.items()}


@dataclass
class _AdamW:
    """Masters and moments of AdamW with decoupled decay of matrices."""

    masters: dict[str, Tensor]
    recipe: Recipe
    steps: int = 0

    def __post_init__(self) -> None:
        self.first, self.second = ({name: torch.zeros_like(w) for name, w in self.masters.items()} for _ in range(2))

    def update(self, gradients: Weights, rate: float) -> None:
        recipe = self.recipe
        self.steps += 1
        for name, gradient in gradients.items():
            self.first[name] = recipe.beta1 * self.first[name] + (1 - recipe.beta1) * gradient
            self.second[name] = recipe.beta2 * self.second[name] + (1 - recipe.beta2) * gradient.square()
            first = self.first[name] / (1 - recipe.beta1**self.steps)
            second = self.second[name] / (1 - recipe.beta2**self.steps)
            decay = recipe.weight_decay if gradient.ndim > 1 else 0.0
            master = self.masters[name]
            self.masters[name] = master - rate * (decay * master + first / (second.sqrt() + recipe.eps))


def replay(
    recipe: Recipe, config: Mapping[str, Any], start: Mapping[str, Floats], train: Half, held_out: Half
) -> Replay:
    """Return what a run of this recipe must say and leave.

    Args:
        recipe: its settings.
        config: config.json of the qwen2 student, with a tied head.
        start: the student's weights before the first step, by their Hugging Face names. With adapters among them (see
            ``adapters.py``) these alone are trained.
        train: what it learns from.
        held_out: what it is evaluated on; ``eval_tokens`` of whole windows are.
    """
    found = Replay()
    per_step = recipe.batch_size * recipe.accumulation
    steps = recipe.steps or math.ceil(recipe.epochs * (len(train.windows) // per_step))
    evaluated = min(len(held_out.windows), recipe.eval_tokens // held_out.windows.ids.shape[1])
    drop = seeded_dropout(float(config.get("attention_dropout") or 0.0), recipe.seed)
    tensors = {name: torch.from_numpy(np.array(value, np.float64)) for name, value in start.items()}
    frozen = {} if not recipe.lora_rank else {name: value for name, value in tensors.items() if not is_adapter(name)}
    optimizer = _AdamW({name: value for name, value in tensors.items() if name not in frozen}, recipe)
    scale = recipe.lora_alpha / max(1, recipe.lora_rank)
    whole = Adapters(scale, keep_all)
    dropped = Adapters(scale, seeded_dropout(recipe.lora_dropout, recipe.seed))

    def evaluate() -> tuple[float, ...]:
        return _evaluate({**frozen, **_used(optimizer.masters, recipe)}, config, held_out, evaluated, whole)

    for step in range(steps):
        if step == 0 or (recipe.eval_every and step % recipe.eval_every == 0):
            found.evaluations[step] = evaluate()
        rate = rate_of(recipe, step, steps)
        weights = _used(optimizer.masters, recipe)
        chosen = chosen_windows(len(train.windows), per_step, recipe.seed, step)
        targets = max(1, int((train.windows.labels[chosen] != MASKED).sum()))
        ce_sum = kd_sum = torch.zeros((), dtype=torch.float64)
        for part in np.split(chosen, recipe.accumulation):
            logits = logits_of({**frozen, **weights}, config, train.windows.take(part), drop, dropped)
            student, teacher, labels = _labelled(logits, train, part.tolist())
            ce_sum = ce_sum - student.log_softmax(-1)[torch.arange(len(labels)), labels].sum()
            kd_sum = kd_sum + divergences(student, teacher, recipe).sum()
        ce, kd = ce_sum / targets, kd_sum / targets
        loss = recipe.alpha * ce + (1 - recipe.alpha) * kd
        gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
        norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
        share = min(1.0, recipe.clip / norm)
        optimizer.update({name: gradient * share for name, gradient in gradients.items()}, rate)
        found.steps.append((loss.item(), ce.item(), kd.item(), norm, rate))
        found.clipped.append(share < 1)
    found.evaluations[steps] = evaluate()
    found.weights = {name: master.numpy() for name, master in optimizer.masters.items()}
    return found
