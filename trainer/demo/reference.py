"""A float64 qwen2 forward in NumPy over ``gguf.quants.dequantize``: plain, and independent of the trainer's loader."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

Doubles = npt.NDArray[np.float64]


class ReferenceModel:
    """The weights of a qwen2 GGUF as float64, by GGUF name, with the hyperparameters the forward needs."""

    def __init__(self, path: Path) -> None:
        reader = gguf.GGUFReader(path)
        self.layers = int(_field(reader, "qwen2.block_count"))
        self.heads = int(_field(reader, "qwen2.attention.head_count"))
        self.kv_heads = int(_field(reader, "qwen2.attention.head_count_kv"))
        self.eps = float(_field(reader, "qwen2.attention.layer_norm_rms_epsilon"))
        self.theta = float(_field(reader, "qwen2.rope.freq_base"))
        self.weights: dict[str, Doubles] = {
            tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
            for tensor in reader.tensors
        }

    def logits(self, ids_T: npt.NDArray[np.int32]) -> Doubles:
        """Return float64 logits ``[T, vocab]`` for token ids ``[T]``, causal, positions from 0."""
        w = self.weights
        x_TC = w["token_embd.weight"][ids_T]
        for layer in range(self.layers):
            x_TC = x_TC + self._attention(layer, self._norm(x_TC, w[f"blk.{layer}.attn_norm.weight"]))
            h_TC = self._norm(x_TC, w[f"blk.{layer}.ffn_norm.weight"])
            gate_TF = h_TC @ w[f"blk.{layer}.ffn_gate.weight"].T
            up_TF = h_TC @ w[f"blk.{layer}.ffn_up.weight"].T
            silu_TF = gate_TF / (1 + np.exp(-gate_TF))
            x_TC = x_TC + (silu_TF * up_TF) @ w[f"blk.{layer}.ffn_down.weight"].T
        head_VC = w.get("output.weight", w["token_embd.weight"])
        result: Doubles = self._norm(x_TC, w["output_norm.weight"]) @ head_VC.T
        return result

    def _norm(self, x_TC: Doubles, weight_C: Doubles) -> Doubles:
        """RMSNorm: ``x / sqrt(mean(x^2) + eps) * weight``."""
        result: Doubles = x_TC / np.sqrt((x_TC * x_TC).mean(axis=-1, keepdims=True) + self.eps) * weight_C
        return result

    def _rotate(self, x_THD: Doubles) -> Doubles:
        """RoPE in the NEOX layout: dimension i turns with dimension i + D/2, by ``position * theta^(-2i/D)``."""
        length, _heads, size = x_THD.shape
        angle = np.arange(length)[:, None] * self.theta ** (-np.arange(0, size, 2) / size)[None, :]
        cos, sin = np.cos(angle)[:, None, :], np.sin(angle)[:, None, :]
        left, right = x_THD[..., : size // 2], x_THD[..., size // 2 :]
        return np.concatenate([left * cos - right * sin, right * cos + left * sin], axis=-1)

    def _attention(self, layer: int, h_TC: Doubles) -> Doubles:
        w, length = self.weights, len(h_TC)

        def project(part: str, heads: int) -> Doubles:
            flat: Doubles = h_TC @ w[f"blk.{layer}.attn_{part}.weight"].T + w[f"blk.{layer}.attn_{part}.bias"]
            return flat.reshape(length, heads, -1)

        q_THD = self._rotate(project("q", self.heads))
        group = self.heads // self.kv_heads
        k_THD = np.repeat(self._rotate(project("k", self.kv_heads)), group, axis=1)
        v_THD = np.repeat(project("v", self.kv_heads), group, axis=1)
        scores_HTS = np.einsum("thd,shd->hts", q_THD, k_THD) / np.sqrt(q_THD.shape[-1])
        scores_HTS = np.where(np.tril(np.ones((length, length), dtype=bool)), scores_HTS, -np.inf)
        weights_HTS = np.exp(scores_HTS - scores_HTS.max(axis=-1, keepdims=True))
        weights_HTS /= weights_HTS.sum(axis=-1, keepdims=True)
        mixed_TC = np.einsum("hts,shd->thd", weights_HTS, v_THD).reshape(length, -1)
        result: Doubles = mixed_TC @ w[f"blk.{layer}.attn_output.weight"].T
        return result


def _field(reader: gguf.GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    assert field is not None, key
    return field.contents()
