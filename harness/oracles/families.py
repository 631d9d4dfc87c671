"""The harness's own forward pass of the families beyond ``reference.py``'s: float64, NumPy, weights by ``gguf``.

It shares no code with the trainer. Each family is written here as its authors define it, in the order of its parts:

    gemma2, gemma3    GELU, embeddings times sqrt(H), norms behind both parts, windows, soft caps, two rotary bases
    granite           multipliers of embeddings, scores, residual additions and logits
    phi3              one matrix for Q, K and V, one for gate and up; divisors of frequencies for long texts
    smollm3           every fourth layer turns nothing
    olmo2             norms behind both parts only; queries and keys normalised over all heads; windows in Olmo 3
    glm4              the first elements of a head turn, in pairs of neighbours; norms before and behind both parts
    mistral3          queries far from the beginning are scaled
    qwen3moe          norms of heads; each token is given to its own experts
    qwen35, -moe      gated delta nets (``delta_net.py``), gated attention, an expert that every token is given to
    llama, qwen2      with rotary scaling: linear, YaRN, long; llama with a window on every layer (Mistral)

Letters in shapes: T positions, H hidden size, N query heads, K key-value heads, D head size, R turned elements.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from q4kd.harness.oracles.delta_net import delta_net

Array = NDArray[np.float64]
_NEIGHBOURS = ("llama", "mistral3", "granite", "smollm3", "glm4")


@dataclass(frozen=True)
class FamilyModel:
    """Float64 weights under GGUF names, and the metadata of the architecture without its prefix."""

    architecture: str
    weights: Mapping[str, Array]
    settings: Mapping[str, Any]

    def setting(self, key: str, default: Any = None) -> Any:
        """Return a value of the metadata."""
        return self.settings.get(key, default)

    @property
    def num_layers(self) -> int:
        """Number of blocks that are run; those behind them predict further tokens."""
        return int(self.settings["block_count"]) - int(self.setting("nextn_predict_layers", 0))

    @property
    def head_dim(self) -> int:
        """Elements of a head, D."""
        heads = int(self.settings["attention.head_count"])
        return int(self.setting("attention.key_length", int(self.settings["embedding_length"]) // heads))


def read_family(path: Path) -> FamilyModel:
    """Read a GGUF of one of the families, every tensor decoded by the gguf package."""
    reader = gguf.GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    weights = {}
    for tensor in reader.tensors:
        decoded = gguf.quants.dequantize(np.asarray(tensor.data), tensor.tensor_type)
        weights[tensor.name] = decoded.reshape(tuple(reversed(tensor.shape.tolist()))).astype(np.float64)
    prefix = f"{architecture}."
    settings = {
        key.removeprefix(prefix): field.contents() for key, field in reader.fields.items() if key.startswith(prefix)
    }
    return FamilyModel(architecture, weights, settings)


def family_logits(model: FamilyModel, ids: NDArray[np.integer[Any]]) -> Array:
    """Return float64 logits ``[T, V]`` of one document's ids ``[T]``."""
    weights, name = model.weights, model.architecture
    x_TH = weights["token_embd.weight"][ids]
    if name in ("gemma2", "gemma3"):
        x_TH = x_TH * np.sqrt(x_TH.shape[1])
    x_TH = x_TH * model.setting("embedding_scale", 1.0)
    residual = model.setting("residual_scale", 1.0)
    for layer in range(model.num_layers):
        x_TH = x_TH + residual * _attention_part(model, layer, x_TH)
        x_TH = x_TH + residual * _feed_forward_part(model, layer, x_TH)
    head = weights.get("output.weight", weights["token_embd.weight"])
    logits = _norm(model, "output_norm.weight", x_TH) @ head.T / model.setting("logit_scale", 1.0)
    return _capped(logits, model.setting("final_logit_softcapping", 0.0))


def _norm(model: FamilyModel, name: str, x: Array) -> Array:
    eps = float(model.settings["attention.layer_norm_rms_epsilon"])
    return np.asarray(x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * model.weights[name])


def _if_there(model: FamilyModel, name: str, x: Array) -> Array:
    return _norm(model, name, x) if name in model.weights else x


def _capped(x: Array, cap: float) -> Array:
    return np.asarray(cap * np.tanh(x / cap)) if cap else x


def _feed_forward_part(model: FamilyModel, layer: int, x_TH: Array) -> Array:
    prefix = f"blk.{layer}."
    if model.architecture.startswith("qwen35"):
        normed = _norm(model, f"{prefix}post_attention_norm.weight", x_TH)
    else:
        normed = _if_there(model, f"{prefix}ffn_norm.weight", x_TH)
    if f"{prefix}ffn_gate_inp.weight" in model.weights:
        return _mixture(model, prefix, normed) + _shared_expert(model, prefix, normed)
    up = normed @ model.weights[f"{prefix}ffn_up.weight"].T
    if f"{prefix}ffn_gate.weight" in model.weights:
        gate = normed @ model.weights[f"{prefix}ffn_gate.weight"].T
    else:
        gate, up = up[:, : up.shape[1] // 2], up[:, up.shape[1] // 2 :]
    activation: Callable[[Array], Array] = _gelu if model.architecture in ("gemma2", "gemma3") else _silu
    out = activation(gate) * up @ model.weights[f"{prefix}ffn_down.weight"].T
    return _if_there(model, f"{prefix}post_ffw_norm.weight", out)


def expert_weights(model: FamilyModel, layer: int, normed_TH: Array) -> Array:
    """Return the weight of every expert for every token, float64 ``[T, E]``: 0 of those that it is not given to.

    Qwen3's router: the largest of a softmax over all experts, divided by their sum (``norm_topk_prob``).
    """
    scores = normed_TH @ model.weights[f"blk.{layer}.ffn_gate_inp.weight"].T
    weights = np.zeros_like(scores)
    for token, row in enumerate(scores):
        shares = np.exp(row - row.max())
        kept = sorted(range(len(row)), key=lambda expert: -shares[expert])[: model.settings["expert_used_count"]]
        weights[token, kept] = shares[kept] / shares[kept].sum()
    return weights


def _mixture(model: FamilyModel, prefix: str, normed_TH: Array) -> Array:
    gate, up, down = (model.weights[f"{prefix}ffn_{part}_exps.weight"] for part in ("gate", "up", "down"))
    out = np.zeros_like(normed_TH)
    for token, weights in enumerate(expert_weights(model, int(prefix.split(".")[1]), normed_TH)):
        for expert in np.flatnonzero(weights):
            state = normed_TH[token]
            inner = _silu(gate[expert] @ state) * (up[expert] @ state)
            out[token] += weights[expert] * (down[expert] @ inner)
    return out


def _shared_expert(model: FamilyModel, prefix: str, normed_TH: Array) -> Array:
    """Return what the expert of all tokens adds, each token's by the sigmoid of its own gate; 0 without one."""
    if f"{prefix}ffn_up_shexp.weight" not in model.weights:
        return np.zeros_like(normed_TH)
    gate, up, down = (model.weights[f"{prefix}ffn_{part}_shexp.weight"] for part in ("gate", "up", "down"))
    share = 1 / (1 + np.exp(-(normed_TH @ model.weights[f"{prefix}ffn_gate_inp_shexp.weight"])))
    return np.asarray(share[:, None] * ((_silu(normed_TH @ gate.T) * (normed_TH @ up.T)) @ down.T))


def _silu(x: Array) -> Array:
    return np.asarray(x / (1 + np.exp(-x)))


def _gelu(x: Array) -> Array:
    return np.asarray(0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))))


def _attention_part(model: FamilyModel, layer: int, x_TH: Array) -> Array:
    prefix, size = f"blk.{layer}.", model.head_dim
    heads = int(model.settings["attention.head_count"])
    kv_heads = int(model.setting("attention.head_count_kv", heads))
    normed = _if_there(model, f"{prefix}attn_norm.weight", x_TH)
    if f"{prefix}ssm_conv1d.weight" in model.weights:
        return delta_net(model.weights, model.settings, prefix, normed)
    if f"{prefix}attn_qkv.weight" in model.weights:
        rows = np.split(model.weights[f"{prefix}attn_qkv.weight"], [heads * size, (heads + kv_heads) * size])
    else:
        rows = [model.weights[f"{prefix}attn_{part}.weight"] for part in "qkv"]
    q, k, v = (
        normed @ matrix.T + model.weights.get(f"{prefix}attn_{part}.bias", 0.0)
        for part, matrix in zip("qkv", rows, strict=True)
    )
    share: Array | float = 1.0
    if q.shape[1] != heads * size:  # Qwen3.5: behind each query head lies a gate of its output
        q, gate = (part.reshape(len(q), -1) for part in np.split(q.reshape(len(q), heads, 2 * size), 2, axis=-1))
        share = 1 / (1 + np.exp(-gate))

    def split(x: Array, part: str, count: int) -> Array:
        name = f"{prefix}attn_{part}_norm.weight"
        if name in model.weights and len(model.weights[name]) != size:
            x, name = _norm(model, name, x), ""
        return _if_there(model, name, x.reshape(len(x), count, size).transpose(1, 0, 2))

    q_NTD, k_KTD = (
        _turn(model, layer, split(x, part, count)) for x, part, count in ((q, "q", heads), (k, "k", kv_heads))
    )
    q_NTD = q_NTD * _far_scale(model, len(x_TH))[:, None]
    v_KTD = v.reshape(len(v), kv_heads, size).transpose(1, 0, 2)
    mixed = _attend(model, layer, q_NTD, k_KTD, v_KTD) * share
    out = mixed @ model.weights[f"{prefix}attn_output.weight"].T
    return (
        out if model.architecture.startswith("qwen35") else _if_there(model, f"{prefix}post_attention_norm.weight", out)
    )


def _attend(model: FamilyModel, layer: int, q_NTD: Array, k_KTD: Array, v_KTD: Array) -> Array:
    scale, cap = _score_scale(model), float(model.setting("attn_logit_softcapping", 0.0))
    behind_TT = np.arange(q_NTD.shape[1])[:, None] - np.arange(q_NTD.shape[1])
    window = _window(model, layer)
    is_read = (behind_TT >= 0) & ((behind_TT < window) if window else True)
    groups, mixed = len(q_NTD) // len(k_KTD), []
    for head, q_TD in enumerate(q_NTD):
        scores = np.where(is_read, _capped(q_TD @ k_KTD[head // groups].T * scale, cap), -np.inf)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed.append(weights / weights.sum(axis=-1, keepdims=True) @ v_KTD[head // groups])
    return np.concatenate(mixed, axis=1)


def _score_scale(model: FamilyModel) -> float:
    stated = float(model.setting("attention.scale", 0.0))
    # Gemma's 27B models: 4608 / 32 and 5376 / 32, where heads have 128 elements.
    if (model.architecture, model.num_layers) in (("gemma2", 46), ("gemma3", 62)):
        return float((model.settings["embedding_length"] // model.settings["attention.head_count"]) ** -0.5)
    return stated or float(model.head_dim**-0.5)


def _window(model: FamilyModel, layer: int) -> int:
    """Return the keys that a query of a layer reads, or 0 for all."""
    window = int(model.setting("attention.sliding_window", 4096 if model.architecture == "gemma2" else 0))
    if model.architecture in ("llama", "phi3"):
        return window
    period = {"gemma2": 2, "gemma3": 6, "olmo2": 4}.get(model.architecture)
    pattern = model.setting("attention.sliding_window_pattern", period)
    if pattern is None or not window:
        return 0
    has_window = pattern[layer] if isinstance(pattern, list) else layer % pattern != pattern - 1
    return window if has_window else 0


def _far_scale(model: FamilyModel, length: int) -> Array:
    """Return what queries are multiplied by for their place (Llama 4's rule), float64 ``[T]``."""
    beta = float(model.setting("attention.temperature_scale", 0.0))
    original = int(model.setting("rope.scaling.original_context_length", model.settings["context_length"]))
    return 1 + beta * np.log(1 + np.arange(length) // original)


def _turn(model: FamilyModel, layer: int, x_NTD: Array) -> Array:
    """Turn each pair, read as a complex number, by position times frequency."""
    if model.architecture == "smollm3" and layer % 4 == 3:
        return x_NTD
    frequencies, gain = _frequencies(model, layer, x_NTD.shape[1])
    turned, rest = np.split(x_NTD, [2 * len(frequencies)], axis=-1)
    turn = gain * np.exp(1j * np.arange(x_NTD.shape[1])[:, None] * frequencies)
    if model.architecture in _NEIGHBOURS:
        pairs = (turned[..., 0::2] + 1j * turned[..., 1::2]) * turn
        turned = np.stack([pairs.real, pairs.imag], axis=-1).reshape(turned.shape)
    else:
        first, second = np.split(turned, 2, axis=-1)
        pairs = (first + 1j * second) * turn
        turned = np.concatenate([pairs.real, pairs.imag], axis=-1)
    return np.concatenate([turned, rest], axis=-1)


def _frequencies(model: FamilyModel, layer: int, length: int) -> tuple[Array, float]:
    """Return radians a position of each pair, ``[R / 2]``, and the gain of cos and sin."""
    size = int(model.setting("rope.dimension_count", model.head_dim))
    base = float(model.setting("rope.freq_base", 10_000.0))
    if _window(model, layer) and model.architecture in ("gemma3", "olmo2"):
        base = float(model.setting("rope.freq_base_swa", 10_000.0 if model.architecture == "gemma3" else base))
        return base ** (-np.arange(0, size, 2) / size), 1.0
    frequencies = base ** (-np.arange(0, size, 2) / size)
    original = int(model.setting("rope.scaling.original_context_length", model.settings["context_length"]))
    gain = float(model.setting("rope.scaling.attn_factor", 1.0))
    if "rope_factors_short.weight" in model.weights:
        kind = "long" if length > original else "short"
        return frequencies / model.weights[f"rope_factors_{kind}.weight"], gain
    frequencies = frequencies / model.weights.get("rope_freqs.weight", 1.0)
    factor = float(model.setting("rope.scaling.factor", 1.0))
    if model.setting("rope.scaling.type", "linear") != "yarn":
        return frequencies / factor, 1.0
    # YaRN: a ramp between the pairs that turn 32 times within the original context and those that turn once.
    places = [
        size * np.log(original / (2 * np.pi * turns)) / (2 * np.log(base))
        for turns in (
            model.setting("rope.scaling.yarn_beta_fast", 32.0),
            model.setting("rope.scaling.yarn_beta_slow", 1.0),
        )
    ]
    low, high = max(np.floor(places[0]), 0), min(np.ceil(places[1]), size - 1)
    slow = np.clip((np.arange(size // 2) - low) / max(high - low, 0.001), 0, 1)
    log = float(np.log(factor))
    gain *= (1 + 0.1 * log) / (1 + 0.1 * float(model.setting("rope.scaling.yarn_log_multiplier", 0.0)) * log)
    return frequencies * (1 - slow) + frequencies / factor * slow, gain
