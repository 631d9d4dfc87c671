"""The harness's own forward pass: float64, NumPy, weights through ``gguf``'s decoder or straight from safetensors.

It shares no code with the trainer. Equations as in the Qwen2 report (https://arxiv.org/abs/2407.10671): pre-norm
blocks, RMSNorm, rotary embedding with split halves, grouped-query attention with QKV bias, SwiGLU.

Letters in shapes: T positions, H hidden size, N query heads, K key-value heads, D head size, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ReferenceModel:
    """Float64 weights under GGUF names, and the dimensions that shapes do not tell."""

    weights: Mapping[str, Array]
    num_heads: int
    num_kv_heads: int
    rms_eps: float
    rope_base: float

    @property
    def num_layers(self) -> int:
        """Count the blocks."""
        return len({name.split(".")[1] for name in self.weights if name.startswith("blk.")})


def read_gguf(path: Path) -> ReferenceModel:
    """Read a qwen2 GGUF, every tensor decoded by the gguf package."""
    reader = gguf.GGUFReader(path)

    def value(key: str) -> Any:
        field = reader.fields[f"qwen2.{key}"]
        return field.contents()

    weights = {}
    for tensor in reader.tensors:
        decoded = gguf.quants.dequantize(np.asarray(tensor.data), tensor.tensor_type)
        weights[tensor.name] = decoded.reshape(tuple(reversed(tensor.shape.tolist()))).astype(np.float64)
    return ReferenceModel(
        weights=weights,
        num_heads=int(value("attention.head_count")),
        num_kv_heads=int(value("attention.head_count_kv")),
        rms_eps=float(value("attention.layer_norm_rms_epsilon")),
        rope_base=float(value("rope.freq_base")),
    )


_HF_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def from_hugging_face(tensors: Mapping[str, NDArray[Any]], config: Mapping[str, Any]) -> ReferenceModel:
    """Rename a Hugging Face qwen2 state dict; ``config`` is its config.json."""
    weights = {}
    for name, tensor in tensors.items():
        if name.startswith("model.layers."):
            _, _, layer, rest = name.split(".", 3)
            module, _, kind = rest.rpartition(".")
            new = f"blk.{layer}.{_HF_NAMES[module]}.{kind}"
        else:
            new = {
                "model.embed_tokens.weight": "token_embd.weight",
                "model.norm.weight": "output_norm.weight",
                "lm_head.weight": "output.weight",
            }[name]
        weights[new] = tensor.astype(np.float64)
    rope: Mapping[str, Any] = config.get("rope_parameters") or config
    return ReferenceModel(
        weights=weights,
        num_heads=int(config["num_attention_heads"]),
        num_kv_heads=int(config["num_key_value_heads"]),
        rms_eps=float(config["rms_norm_eps"]),
        rope_base=float(rope["rope_theta"]),
    )


def _norm(x_TH: Array, weight: Array, eps: float) -> Array:
    return np.asarray(x_TH / np.sqrt(np.mean(x_TH**2, axis=-1, keepdims=True) + eps) * weight)


def _rope(x_NTD: Array, base: float) -> Array:
    half = x_NTD.shape[-1] // 2
    angle = np.arange(x_NTD.shape[1])[:, None] * base ** (-np.arange(half) / half)
    turn = np.exp(1j * angle)
    turned = (x_NTD[..., :half] + 1j * x_NTD[..., half:]) * turn
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

    q_NTD = _rope(heads("attn_q", model.num_heads), model.rope_base)
    k_KTD = _rope(heads("attn_k", model.num_kv_heads), model.rope_base)
    v_KTD = heads("attn_v", model.num_kv_heads)
    groups = model.num_heads // model.num_kv_heads
    mask = np.triu(np.full((len(x_TH), len(x_TH)), -np.inf), 1)
    mixed = [
        _softmax(q_NTD[head] @ k_KTD[head // groups].T / np.sqrt(q_NTD.shape[-1]) + mask) @ v_KTD[head // groups]
        for head in range(model.num_heads)
    ]
    return np.concatenate(mixed, axis=-1) @ model.weights[f"{prefix}attn_output.weight"].T


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
