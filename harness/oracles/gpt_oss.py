"""The harness's own forward pass of gpt-oss: float64, NumPy, token by token where it chooses experts.

It shares no code with the trainer and, but for the reading of files, none with ``families.py``. The order of its parts
is that of the model's authors (https://github.com/openai/gpt-oss, ``gpt_oss/torch/model.py``).

Letters in shapes: T positions, H hidden size, N query heads, K key-value heads, D head size, F feed-forward size.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from q4kd.harness.oracles.families import Array, FamilyModel

_LIMIT, _SLOPE = 7.0, 1.702


def gpt_oss_logits(model: FamilyModel, ids: NDArray[np.integer[Any]]) -> Array:
    """Return float64 logits ``[T, V]`` of one document's ids ``[T]``."""
    weights = model.weights
    x_TH = weights["token_embd.weight"][ids]
    for layer in range(model.num_layers):
        x_TH = x_TH + _attention(model, layer, _normed(model, f"blk.{layer}.attn_norm", x_TH))
        x_TH = x_TH + _experts(model, layer, _normed(model, f"blk.{layer}.post_attention_norm", x_TH))
    head = weights.get("output.weight", weights["token_embd.weight"])
    return np.asarray(_normed(model, "output_norm", x_TH) @ head.T)


def chosen_experts(model: FamilyModel, layer: int, state_H: Array) -> dict[int, float]:
    """Return the experts of a token, whose normalised state is given, and the weight of each.

    Those of the largest scores are chosen first; the softmax is over their scores alone.
    """
    prefix = f"blk.{layer}.ffn_gate_inp."
    scores = model.weights[prefix + "weight"] @ state_H + model.weights[prefix + "bias"]
    chosen = sorted(range(len(scores)), key=lambda expert: -scores[expert])[: model.settings["expert_used_count"]]
    powers = np.exp(scores[chosen] - scores[chosen[0]])
    return dict(zip(chosen, (powers / powers.sum()).tolist(), strict=True))


def expert_output(model: FamilyModel, layer: int, expert: int, state_H: Array) -> Array:
    """Return what an expert makes of a token's normalised state, ``[H]``, before it is weighted."""

    def product(part: str, x: Array) -> Array:
        name = f"blk.{layer}.ffn_{part}_exps."
        return np.asarray(model.weights[name + "weight"][expert] @ x + model.weights[name + "bias"][expert])

    gate = np.minimum(product("gate", state_H), _LIMIT)
    up = np.clip(product("up", state_H), -_LIMIT, _LIMIT)
    return product("down", gate / (1 + np.exp(-_SLOPE * gate)) * (up + 1))


def _experts(model: FamilyModel, layer: int, normed_TH: Array) -> Array:
    rows = []
    for state_H in normed_TH:
        shares = chosen_experts(model, layer, state_H)
        rows.append(sum(share * expert_output(model, layer, expert, state_H) for expert, share in shares.items()))
    return np.array(rows)


def _normed(model: FamilyModel, name: str, x: Array) -> Array:
    eps = float(model.settings["attention.layer_norm_rms_epsilon"])
    return np.asarray(x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * model.weights[f"{name}.weight"])


def _attention(model: FamilyModel, layer: int, normed_TH: Array) -> Array:
    size, length = model.head_dim, len(normed_TH)

    def product(part: str, x: Array) -> Array:
        name = f"blk.{layer}.attn_{part}."
        return np.asarray(x @ model.weights[name + "weight"].T + model.weights[name + "bias"])

    q_TND, k_TKD, v_TKD = (product(part, normed_TH).reshape(length, -1, size) for part in "qkv")
    q_TND, k_TKD = _turned(model, q_TND), _turned(model, k_TKD)
    sinks, window = model.weights[f"blk.{layer}.attn_sinks.weight"], _window(model, layer)
    groups = q_TND.shape[1] // k_TKD.shape[1]
    mixed = np.zeros_like(q_TND)
    for head in range(q_TND.shape[1]):
        for place in range(length):
            first = max(0, place + 1 - window) if window else 0
            keys, values = (x[first : place + 1, head // groups] for x in (k_TKD, v_TKD))
            scores = np.append(keys @ q_TND[place, head] / np.sqrt(size), sinks[head])
            shares = np.exp(scores - scores.max())
            mixed[place, head] = shares[:-1] / shares.sum() @ values
    return product("output", mixed.reshape(length, -1))


def _window(model: FamilyModel, layer: int) -> int:
    """Return the keys that a query of a layer reads, or 0 for all: the first layer has a window, the next none, ..."""
    window, pattern = int(model.settings["attention.sliding_window"]), model.setting("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        return window if pattern[layer] else 0
    return window if (layer + 1) % int(pattern or 2) else 0


def _turned(model: FamilyModel, x_THD: Array) -> Array:
    """Turn elements i and i + D/2 of each head by their frequency times the position."""
    size = x_THD.shape[-1]
    base, factor = float(model.setting("rope.freq_base", 10_000.0)), float(model.setting("rope.scaling.factor", 1.0))
    frequencies, gain = base ** -(np.arange(0, size, 2) / size), 1.0
    if model.setting("rope.scaling.type", "none") == "yarn":
        original = float(model.settings["rope.scaling.original_context_length"])
        turns = [float(model.setting(f"rope.scaling.yarn_beta_{end}", at)) for end, at in (("fast", 32), ("slow", 1))]
        # The pairs that turn so many times within the original context; the ramp between them begins at no whole one.
        low, high = (size / 2 * np.log(original / (2 * np.pi * turn)) / np.log(base) for turn in turns)
        low, high = max(low, 0.0), min(high, size - 1.0)
        slowed = np.clip((np.arange(size // 2) - low) / max(high - low, 1e-3), 0, 1)
        frequencies = frequencies * (1 - slowed + slowed / factor)
        gain = float(1 + 0.1 * np.log(factor))
    angles = np.arange(len(x_THD))[:, None, None] * frequencies
    cos, sin = gain * np.cos(angles), gain * np.sin(angles)
    first, second = x_THD[..., : size // 2], x_THD[..., size // 2 :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
