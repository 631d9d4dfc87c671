"""The harness's own forward pass: float64, NumPy, weights through ``gguf``'s decoder or straight from safetensors.

Headers are read by ``gguf_metadata.py``.

It shares no code with the trainer. Equations as in the Qwen2 report (https://arxiv.org/abs/2407.10671): pre-norm
blocks, RMSNorm, rotary embedding, grouped-query attention, SwiGLU. What differs between the architectures it reads:

    qwen2           biases on Q, K and V
    qwen3           RMSNorm of each query and key head; the head size is not H / N
    llama, mistral  in a GGUF: adjacent elements turn together, frequencies are divided by ``rope_freqs.weight``

Letters in shapes: T positions, H hidden size, N query heads, K key-value heads, D head size, V vocabulary.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from q4kd.harness.oracles.gguf_metadata import StoredTensor, read_header

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ReferenceModel:
    """Float64 weights under GGUF names, and what shapes do not tell.

    Attributes:
        frequencies: radians per position of each pair of a head, ``[D / 2]``.
        interleaved: whether a pair is elements ``(2i, 2i + 1)`` of a head, not ``(i, i + D / 2)``.
    """

    weights: Mapping[str, Array]
    num_heads: int
    num_kv_heads: int
    rms_eps: float
    frequencies: Array
    interleaved: bool

    @property
    def num_layers(self) -> int:
        """Number of blocks."""
        return len({name.split(".")[1] for name in self.weights if name.startswith("blk.")})


def read_gguf(path: Path) -> ReferenceModel:
    """Read a qwen2, qwen3 or llama GGUF, not a split one; every tensor is decoded by the gguf package."""
    metadata, tensors = read_header(path)
    architecture = metadata["general.architecture"]
    if architecture not in ("qwen2", "qwen3", "llama"):
        raise ValueError(f"no reference for architecture {architecture}")

    def value(key: str, default: Any = None) -> Any:
        return metadata.get(f"{architecture}.{key}", default)

    data = np.memmap(path, np.uint8, "r")
    weights = {tensor.name: _decoded(data, tensor) for tensor in tensors}
    # NVFP4 matrices have a factor beside them. What activations would be divided by to be quantised takes no part.
    for name in [name for name in weights if name.endswith((".scale", ".input_scale"))]:
        scale = weights.pop(name)
        if name.endswith(".scale"):
            weights[name.replace(".scale", ".weight")] *= scale
    heads = int(value("attention.head_count"))
    frequencies = _frequencies(float(value("rope.freq_base", 10000.0)), len(weights["blk.0.attn_q.weight"]) // heads)
    return ReferenceModel(
        weights=weights,
        num_heads=heads,
        num_kv_heads=int(value("attention.head_count_kv", heads)),
        rms_eps=float(value("attention.layer_norm_rms_epsilon")),
        frequencies=frequencies / weights.pop("rope_freqs.weight", np.ones_like(frequencies)),
        interleaved=architecture == "llama",
    )


def _decoded(data: NDArray[np.uint8], tensor: StoredTensor) -> Array:
    """Return a tensor's weights, outermost dimension first."""
    kind, (cols, *outer) = gguf.GGMLQuantizationType(tensor.kind), tensor.shape
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    rows = math.prod(outer)
    stored = data[tensor.begin : tensor.begin + rows * cols // weights * size].reshape(rows, -1)
    if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
        stored = stored.view(np.float32 if kind == gguf.GGMLQuantizationType.F32 else np.float16)
    decoded = gguf.quants.dequantize(stored, kind)
    return np.asarray(decoded.reshape(*reversed(outer), cols).astype(np.float64))


# Hugging Face's name of a layer's module → GGUF's.
HF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def from_hugging_face(tensors: Mapping[str, NDArray[Any]], config: Mapping[str, Any]) -> ReferenceModel:
    """Rename the state dict of a qwen2, qwen3, llama or mistral causal LM; ``config`` is its config.json."""
    weights = {}
    for name, tensor in tensors.items():
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            module, _, kind = rest.rpartition(".")
            new = f"blk.{layer}.{HF_NAMES[module]}.{kind}"
        else:
            new = {
                "model.embed_tokens.weight": "token_embd.weight",
                "model.norm.weight": "output_norm.weight",
                "lm_head.weight": "output.weight",
            }[name]
        weights[new] = tensor.astype(np.float64)
    rope: Mapping[str, Any] = config.get("rope_parameters") or config
    heads = int(config["num_attention_heads"])
    frequencies = _frequencies(float(rope["rope_theta"]), len(weights["blk.0.attn_q.weight"]) // heads)
    kind = rope.get("rope_type", "default")
    if kind == "llama3":
        frequencies = _llama3_frequencies(frequencies, rope)
    elif kind != "default":
        raise ValueError(f"no reference for rope type {kind}")
    return ReferenceModel(
        weights=weights,
        num_heads=heads,
        num_kv_heads=int(config["num_key_value_heads"]),
        rms_eps=float(config["rms_norm_eps"]),
        frequencies=frequencies,
        interleaved=False,
    )


def _frequencies(base: float, head_dim: int) -> Array:
    half = head_dim // 2
    return np.asarray(base ** (-np.arange(half) / half))


def _llama3_frequencies(frequencies: Array, rope: Mapping[str, Any]) -> Array:
    """Stretch long wavelengths as Llama 3.1 does (``apply_scaling`` in meta-llama/llama-models, model.py)."""
    scaled = []
    for frequency in frequencies:
        turns = rope["original_max_position_embeddings"] * frequency / (2 * np.pi)
        if turns > rope["high_freq_factor"]:
            scaled.append(frequency)
        elif turns < rope["low_freq_factor"]:
            scaled.append(frequency / rope["factor"])
        else:
            smooth = (turns - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
            scaled.append((1 - smooth) * frequency / rope["factor"] + smooth * frequency)
    return np.array(scaled)


def _norm(x: Array, weight: Array, eps: float) -> Array:
    return np.asarray(x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + eps) * weight)


def _rope(model: ReferenceModel, x_NTD: Array) -> Array:
    """Turn each pair, read as a complex number, by position times frequency."""
    turn = np.exp(1j * np.arange(x_NTD.shape[1])[:, None] * model.frequencies)
    if model.interleaved:
        turned = (x_NTD[..., 0::2] + 1j * x_NTD[..., 1::2]) * turn
        return np.stack([turned.real, turned.imag], axis=-1).reshape(x_NTD.shape)
    first, second = np.split(x_NTD, 2, axis=-1)
    turned = (first + 1j * second) * turn
    return np.concatenate([turned.real, turned.imag], axis=-1)


def _softmax(x: Array) -> Array:
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(x / x.sum(axis=-1, keepdims=True))


def _attention(model: ReferenceModel, prefix: str, x_TH: Array) -> Array:
    def heads(name: str, count: int) -> Array:
        out = x_TH @ model.weights[f"{prefix}{name}.weight"].T
        bias = model.weights.get(f"{prefix}{name}.bias")
        out = out if bias is None else out + bias
        return np.asarray(out.reshape(len(x_TH), count, -1).transpose(1, 0, 2))

    def turned(name: str, count: int) -> Array:
        out_NTD, weight = heads(name, count), model.weights.get(f"{prefix}{name}_norm.weight")
        return _rope(model, out_NTD if weight is None else _norm(out_NTD, weight, model.rms_eps))

    q_NTD, k_KTD = turned("attn_q", model.num_heads), turned("attn_k", model.num_kv_heads)
    v_KTD = heads("attn_v", model.num_kv_heads)
    mixed_TND = reference_attention(q_NTD, k_KTD, v_KTD, np.zeros(len(x_TH), np.int64))
    return mixed_TND.reshape(len(x_TH), -1) @ model.weights[f"{prefix}attn_output.weight"].T


def reference_attention(q_NTD: Array, k_KTD: Array, v_KTD: Array, starts_T: NDArray[np.integer[Any]]) -> Array:
    """Return softmax(q k' / sqrt(D)) v, float64 ``[T, N, D]``: query head n reads key-value head n // (N / K).

    A query reads the keys that are not behind it, from the first position of its document on, which is ``starts_T``.
    """
    groups, places = len(q_NTD) // len(k_KTD), np.arange(q_NTD.shape[1])
    is_read_TS = (places <= places[:, None]) & (places >= starts_T[:, None])
    mask = np.where(is_read_TS, 0.0, -np.inf)
    mixed = [
        _softmax(q_TD @ k_KTD[head // groups].T / np.sqrt(q_TD.shape[-1]) + mask) @ v_KTD[head // groups]
        for head, q_TD in enumerate(q_NTD)
    ]
    return np.stack(mixed, axis=1)


def reference_logits(model: ReferenceModel, ids: NDArray[np.integer[Any]]) -> Array:
    """Return float64 logits ``[T, V]`` of integer ids ``[T]``."""
    weights = model.weights
    x_TH = weights["token_embd.weight"][ids]
    for layer in range(model.num_layers):
        prefix = f"blk.{layer}."
        normed = _norm(x_TH, weights[f"{prefix}attn_norm.weight"], model.rms_eps)
        x_TH = x_TH + _attention(model, prefix, normed)
        normed = _norm(x_TH, weights[f"{prefix}ffn_norm.weight"], model.rms_eps)
        gate = normed @ weights[f"{prefix}ffn_gate.weight"].T
        up = normed @ weights[f"{prefix}ffn_up.weight"].T
        x_TH = x_TH + (gate / (1 + np.exp(-gate)) * up) @ weights[f"{prefix}ffn_down.weight"].T
    final = _norm(x_TH, weights["output_norm.weight"], model.rms_eps)
    return np.asarray(final @ weights.get("output.weight", weights["token_embd.weight"]).T)


def log_softmax(x: Array) -> Array:
    """Return log-probabilities over the last axis."""
    shifted = x - x.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


@dataclass(frozen=True)
class ReferenceLoss:
    """Mean loss, its two parts, and the gradient with respect to the student's logits ``[M, V]``."""

    loss: float
    ce: float
    kd: float
    grad_logits: Array


def reference_loss(
    student_MV: Array,
    teacher_MV: Array,
    labels: NDArray[np.integer[Any]],
    *,
    alpha: float,
    temperature: float,
    divergence: str,
    beta: float = 0.5,
) -> ReferenceLoss:
    """Return L = alpha CE + (1 - alpha) T^2 D over all rows, with gradients through the softmax Jacobian.

    D's derivative is taken with respect to the student's probabilities and carried through
    dq/ds = (diag(q) - q q^T) / T, so it shares no formula with the trainer's closed forms.
    """
    rows = np.arange(len(labels))
    log_1 = log_softmax(student_MV)
    ce = -log_1[rows, labels].mean()
    grad = np.exp(log_1)
    grad[rows, labels] -= 1
    log_p, log_q = log_softmax(teacher_MV / temperature), log_softmax(student_MV / temperature)
    p, q = np.exp(log_p), np.exp(log_q)
    if divergence == "forward_kl":
        values, slope = (p * (log_p - log_q)).sum(-1), -p / q
    elif divergence == "reverse_kl":
        values, slope = (q * (log_q - log_p)).sum(-1), log_q - log_p + 1
    else:
        mixture = beta * p + (1 - beta) * q
        log_m = np.log(mixture)
        values = beta * (p * (log_p - log_m)).sum(-1) + (1 - beta) * (q * (log_q - log_m)).sum(-1)
        slope = -beta * p * (1 - beta) / mixture + (1 - beta) * (log_q - log_m + 1 - (1 - beta) * q / mixture)
    through = q * (slope - (q * slope).sum(-1, keepdims=True)) / temperature
    kd = temperature**2 * values.mean()
    total = alpha * grad + (1 - alpha) * temperature**2 * through
    return ReferenceLoss(float(alpha * ce + (1 - alpha) * kd), float(ce), float(kd), total / len(labels))
