"""The harness's own forward pass of Gemma 4: float64, NumPy, weights by ``gguf``. It shares no code with the trainer.

Written as its authors define it (transformers' ``models/gemma4``), one layer after another:

    attention      heads of one size in layers with a window, of another in the rest; queries and keys normalised with
                   weights and turned, values normalised without; values are the keys where a layer has no matrix for
                   them; scores are not scaled
    feed-forward   GELU; of a mixture the dense part and the experts, each normalised, added, and normalised again
    layer          norms before and behind each part; what comes out is multiplied by one number

Letters in shapes: T positions, H hidden size, N query heads, K key-value heads, D head size, E experts.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from q4kd.harness.oracles.families import Array, FamilyModel


def gemma4_logits(model: FamilyModel, ids: NDArray[np.integer[Any]]) -> Array:
    """Return float64 logits ``[T, V]`` of one document's ids ``[T]``."""
    embedding = model.weights["token_embd.weight"]
    x_TH = embedding[ids] * np.sqrt(embedding.shape[1])
    for layer in range(model.num_layers):
        prefix = f"blk.{layer}."
        x_TH = x_TH + _norm(model, prefix + "post_attention_norm.weight", _attention(model, layer, x_TH))
        x_TH = x_TH + _norm(model, prefix + "post_ffw_norm.weight", _feed_forward(model, prefix, x_TH))
        x_TH = x_TH * model.weights.get(prefix + "layer_output_scale.weight", 1.0)
    head = model.weights.get("output.weight", embedding)
    logits = _norm(model, "output_norm.weight", x_TH) @ head.T
    cap = float(model.setting("final_logit_softcapping", 0.0))
    return np.asarray(cap * np.tanh(logits / cap)) if cap else np.asarray(logits)


def _norm(model: FamilyModel, name: str, x: Array) -> Array:
    eps = float(model.settings["attention.layer_norm_rms_epsilon"])
    weight = model.weights[name] if name else 1.0
    return np.asarray(x / np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True) + eps) * weight)


def _gelu(x: Array) -> Array:
    return np.asarray(x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))))


def _attention(model: FamilyModel, layer: int, x_TH: Array) -> Array:
    prefix, weights, length = f"blk.{layer}.", model.weights, len(x_TH)
    has_window = bool(model.settings["attention.sliding_window_pattern"][layer])
    size = int(model.settings["attention.key_length" + ("_swa" if has_window else "")])
    normed = _norm(model, prefix + "attn_norm.weight", x_TH)

    def heads(part: str) -> Array:
        return np.asarray((normed @ weights[f"{prefix}attn_{part}.weight"].T).reshape(length, -1, size))

    raw_k = heads("k")
    raw_v = heads("v") if f"{prefix}attn_v.weight" in weights else raw_k
    angles = np.outer(np.arange(length), _frequencies(model, size, has_window))
    q_TND = _turned(_norm(model, prefix + "attn_q_norm.weight", heads("q")), angles)
    k_TKD = _turned(_norm(model, prefix + "attn_k_norm.weight", raw_k), angles)
    v_TKD = _norm(model, "", raw_v)
    behind = np.arange(length)[:, None] - np.arange(length)
    is_read = behind >= 0
    if has_window:
        is_read &= behind < int(model.settings["attention.sliding_window"])
    groups = q_TND.shape[1] // k_TKD.shape[1]
    mixed = np.empty_like(q_TND)
    for head in range(q_TND.shape[1]):
        scores = np.where(is_read, q_TND[:, head] @ k_TKD[:, head // groups].T, -np.inf)
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        mixed[:, head] = shares / shares.sum(axis=1, keepdims=True) @ v_TKD[:, head // groups]
    return np.asarray(mixed.reshape(length, -1) @ weights[prefix + "attn_output.weight"].T)


def _frequencies(model: FamilyModel, size: int, has_window: bool) -> Array:
    """Return the radians a position of each pair, ``[D / 2]``; divisors are those of layers without a window."""
    base = float(model.settings["rope.freq_base"])
    powers = -np.arange(0, size, 2) / size
    if has_window:
        return np.asarray(float(model.setting("rope.freq_base_swa", base)) ** powers)
    return np.asarray(base**powers / model.weights["rope_freqs.weight"])


def _turned(x_TND: Array, angles: Array) -> Array:
    """Turn each pair ``(i, i + D / 2)``, read as a complex number."""
    first, second = np.split(x_TND, 2, axis=-1)
    pairs = (first + 1j * second) * np.exp(1j * angles)[:, None]
    return np.concatenate([pairs.real, pairs.imag], axis=-1)


def _feed_forward(model: FamilyModel, prefix: str, x_TH: Array) -> Array:
    weights = model.weights
    normed = _norm(model, prefix + "ffn_norm.weight", x_TH)
    inner = _gelu(normed @ weights[prefix + "ffn_gate.weight"].T) * (normed @ weights[prefix + "ffn_up.weight"].T)
    dense = inner @ weights[prefix + "ffn_down.weight"].T
    if prefix + "ffn_gate_inp.weight" not in weights:
        return np.asarray(dense)
    experts = _experts(model, prefix, x_TH)
    return _norm(model, prefix + "post_ffw_norm_1.weight", dense) + experts


def gemma4_expert_weights(model: FamilyModel, prefix: str, x_TH: Array) -> Array:
    """Return what every expert's output is multiplied by for every token, float64 ``[T, E]``.

    It is the share of each of the k likeliest among them, times the expert's own scale; 0 for the others.
    """
    weights = model.weights
    state = _norm(model, "", x_TH) / np.sqrt(x_TH.shape[1]) * weights[prefix + "ffn_gate_inp.scale"]
    logits = state @ weights[prefix + "ffn_gate_inp.weight"].T
    used = int(model.settings["expert_used_count"])
    kept = np.argsort(-logits, axis=1, kind="stable")[:, :used]
    exponents = np.full_like(logits, -np.inf)
    np.put_along_axis(exponents, kept, np.take_along_axis(logits, kept, axis=1), axis=1)
    shares = np.exp(exponents - exponents.max(axis=1, keepdims=True))
    return np.asarray(shares / shares.sum(axis=1, keepdims=True) * weights[prefix + "ffn_down_exps.scale"])


def _experts(model: FamilyModel, prefix: str, x_TH: Array) -> Array:
    weights = model.weights
    down = weights[prefix + "ffn_down_exps.weight"]
    if prefix + "ffn_gate_up_exps.weight" in weights:
        gate, up = np.split(weights[prefix + "ffn_gate_up_exps.weight"], 2, axis=1)
    else:
        gate, up = weights[prefix + "ffn_gate_exps.weight"], weights[prefix + "ffn_up_exps.weight"]
    normed = _norm(model, prefix + "pre_ffw_norm_2.weight", x_TH)
    out = np.zeros_like(x_TH)
    of_experts = gemma4_expert_weights(model, prefix, x_TH)
    for expert in range(len(down)):
        inner = _gelu(normed @ gate[expert].T) * (normed @ up[expert].T)
        out += of_experts[:, expert, None] * (inner @ down[expert].T)
    return _norm(model, prefix + "post_ffw_norm_2.weight", out)
