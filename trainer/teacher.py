"""The frozen teacher: a decoder-only transformer forward over packed weights, float32 on the CPU.

Equations: RMSNorm (https://arxiv.org/abs/1910.07467), rotary embedding with split halves ("NEOX",
https://arxiv.org/abs/2104.09864), grouped-query attention (https://arxiv.org/abs/2305.13245), SwiGLU
(https://arxiv.org/abs/2002.05202), in the arrangement of Qwen2.

Letters in shapes: B sequences, T positions, M = B * T tokens, H hidden size, N heads, D head size, V vocabulary.
"""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor

from q4kd.trainer.backend import BackendChoice, backend_override, check_device, choose_backend
from q4kd.trainer.errors import FrozenTeacherError, InputError
from q4kd.trainer.events import EventLog
from q4kd.trainer.formats import FORMATS
from q4kd.trainer.model_file import ModelFile, TeacherConfig, open_model
from q4kd.trainer.weights import DenseMatrix, Matrix, PackedMatrix, Scratch, decode_vector


@dataclass(frozen=True)
class _Layer:
    attn_norm: Tensor
    attn_q: Matrix
    attn_k: Matrix
    attn_v: Matrix
    attn_output: Matrix
    q_bias: Tensor | None
    k_bias: Tensor | None
    v_bias: Tensor | None
    ffn_norm: Tensor
    ffn_gate: Matrix
    ffn_up: Matrix
    ffn_down: Matrix


@dataclass(frozen=True)
class Residency:
    """What the teacher holds in memory.

    Attributes:
        resident_bytes: bytes per GGML type as held (a dense copy of a Q4_K tensor counts under ``F32``).
        dense_bytes_of_quantised: bytes of decoded copies of K-quant tensors.
        scratch_bytes: bytes of the reusable tile buffer.
        tensor_bytes: bytes of the tensors in the file.
    """

    resident_bytes: dict[str, int]
    dense_bytes_of_quantised: int
    scratch_bytes: int
    tensor_bytes: int


def build_matrix(backend: str, tensor_name: str, model: ModelFile, scratch: Scratch) -> Matrix:
    """Make the weight matrix of one tensor for a backend."""
    tensor = model.tensors[tensor_name]
    return PackedMatrix(tensor, scratch) if backend == "q4k" else DenseMatrix(tensor)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square normalisation over the last dimension, float32."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rope_tables(positions: int, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Return cos and sin, float32 ``[positions, head_dim / 2]``, computed in float64."""
    frequency = base ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.outer(torch.arange(positions, dtype=torch.float64), frequency)
    return angle.cos().float(), angle.sin().float()


def rotate_halves(x_BNTD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Apply rotary embedding that pairs element i with element i + D/2."""
    first, second = x_BNTD.chunk(2, dim=-1)
    return torch.cat([first * cos_TD - second * sin_TD, second * cos_TD + first * sin_TD], dim=-1)


class Teacher:
    """A teacher without parameters: not an ``nn.Module``, every output detached, every gradient request refused."""

    def __init__(self, model: ModelFile, choice: BackendChoice) -> None:
        self.model = model
        self.config: TeacherConfig = model.config
        self.choice = choice
        self.scratch = Scratch()
        self._matrices: dict[str, Matrix] = {}
        self._vector_bytes: Counter[str] = Counter()
        self._embedding = self._matrix("token_embd.weight")
        self._layers = [self._load_layer(index) for index in range(self.config.num_layers)]
        self._output_norm = self._vector("output_norm.weight")
        self._head = self._embedding if self.config.tied_head else self._matrix("output.weight")

    def _matrix(self, name: str) -> Matrix:
        self._matrices[name] = build_matrix(self.choice.backend, name, self.model, self.scratch)
        return self._matrices[name]

    def _vector(self, name: str) -> Tensor:
        vector = decode_vector(self.model.tensors[name])
        self._vector_bytes["F32"] += vector.numel() * 4
        return vector

    def _load_layer(self, index: int) -> _Layer:
        prefix = f"blk.{index}."

        def bias(name: str) -> Tensor | None:
            return self._vector(prefix + name) if prefix + name in self.model.tensors else None

        return _Layer(
            attn_norm=self._vector(prefix + "attn_norm.weight"),
            attn_q=self._matrix(prefix + "attn_q.weight"),
            attn_k=self._matrix(prefix + "attn_k.weight"),
            attn_v=self._matrix(prefix + "attn_v.weight"),
            attn_output=self._matrix(prefix + "attn_output.weight"),
            q_bias=bias("attn_q.bias"),
            k_bias=bias("attn_k.bias"),
            v_bias=bias("attn_v.bias"),
            ffn_norm=self._vector(prefix + "ffn_norm.weight"),
            ffn_gate=self._matrix(prefix + "ffn_gate.weight"),
            ffn_up=self._matrix(prefix + "ffn_up.weight"),
            ffn_down=self._matrix(prefix + "ffn_down.weight"),
        )

    @property
    def vocab_size(self) -> int:
        """Rows of the output head."""
        return self._head.rows

    def residency(self) -> Residency:
        """Count the bytes held, from the objects themselves."""
        held = Counter(self._vector_bytes)
        dense = 0
        for matrix in self._matrices.values():
            held["F32" if matrix.is_dense else matrix.source_type] += matrix.resident_bytes
            if matrix.is_dense and FORMATS[matrix.source_type].is_k_quant:
                dense += matrix.resident_bytes
        return Residency(dict(held), dense, self.scratch.num_bytes, self.model.tensor_bytes)

    @torch.no_grad()
    def hidden(self, ids_BT: Tensor) -> Tensor:
        """Return the final, normalised hidden states.

        Args:
            ids_BT: int64 token ids ``[B, T]``, each in ``[0, V)``.

        Returns:
            float32 ``[B, T, H]``, detached.

        Raises:
            InputError: for ids out of range, another rank, or more positions than the context length.
        """
        self._check_ids(ids_BT)
        batch, length = ids_BT.shape
        cos_TD, sin_TD = rope_tables(length, self.config.head_dim, self.config.rope_base)
        x_MH = self.embed(ids_BT.reshape(-1))
        for layer in self._layers:
            normed = rms_norm(x_MH, layer.attn_norm, self.config.rms_eps)
            x_MH = x_MH + self._attend(layer, normed, batch, cos_TD, sin_TD)
            normed = rms_norm(x_MH, layer.ffn_norm, self.config.rms_eps)
            gated = F.silu(layer.ffn_gate.product(normed)).mul_(layer.ffn_up.product(normed))
            x_MH = x_MH + layer.ffn_down.product(gated)
        return rms_norm(x_MH, self._output_norm, self.config.rms_eps).view(batch, length, -1)

    def _attend(self, layer: _Layer, x_MH: Tensor, batch: int, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        config = self.config

        def heads(matrix: Matrix, bias: Tensor | None, count: int) -> Tensor:
            out = matrix.product(x_MH)
            if bias is not None:
                out += bias
            return out.view(batch, -1, count, config.head_dim).transpose(1, 2)

        q_BNTD = rotate_halves(heads(layer.attn_q, layer.q_bias, config.num_heads), cos_TD, sin_TD)
        k_BKTD = rotate_halves(heads(layer.attn_k, layer.k_bias, config.num_kv_heads), cos_TD, sin_TD)
        v_BKTD = heads(layer.attn_v, layer.v_bias, config.num_kv_heads)
        groups = config.num_heads // config.num_kv_heads
        mixed_BNTD = F.scaled_dot_product_attention(
            q_BNTD, k_BKTD.repeat_interleave(groups, 1), v_BKTD.repeat_interleave(groups, 1), is_causal=True
        )
        return layer.attn_output.product(mixed_BNTD.transpose(1, 2).reshape(x_MH.shape[0], -1))

    @torch.no_grad()
    def head_logits(self, hidden_MH: Tensor) -> Tensor:
        """Return float32 logits ``[M, V]`` of hidden states ``[M, H]``, detached.

        Raises:
            FrozenTeacherError: when ``hidden_MH`` requires a gradient: none would flow.
        """
        if hidden_MH.requires_grad:
            raise FrozenTeacherError("teacher logits of hidden states that require a gradient")
        return self._head.product(hidden_MH)

    @torch.no_grad()
    def embed(self, row_ids: Tensor) -> Tensor:
        """Return float32 embedding rows ``[n, H]`` of int64 ids ``[n]``."""
        return self._embedding.gather(row_ids)

    def logits(self, ids_BT: Tensor) -> Tensor:
        """Return float32 logits ``[B, T, V]`` of int64 ids ``[B, T]``."""
        hidden_BTH = self.hidden(ids_BT)
        return self.head_logits(hidden_BTH.flatten(0, 1)).view(*ids_BT.shape, -1)

    def _check_ids(self, ids_BT: Tensor) -> None:
        limit = self.config.vocab_size
        if ids_BT.dim() != 2 or ids_BT.numel() == 0:
            raise InputError("ids", expected="[B, T], not empty", got=str(tuple(ids_BT.shape)), remedy="reshape them")
        if ids_BT.shape[1] > self.config.context_length:
            raise InputError(
                "ids",
                expected=f"at most {self.config.context_length} positions",
                got=str(ids_BT.shape[1]),
                remedy="cut the sequences to the teacher's context length",
            )
        low, high = int(ids_BT.min()), int(ids_BT.max())
        if low < 0 or high >= limit:
            raise InputError(
                "ids",
                expected=f"token ids from 0 to {limit - 1}",
                got=f"{low}..{high}",
                remedy="use the same tokenizer",
            )

    def requires_grad_(self, requires_grad: bool = True) -> "Teacher":
        """Accept ``False``, which is always true of a teacher; refuse ``True``."""
        if requires_grad:
            raise FrozenTeacherError("teacher.requires_grad_(True)")
        return self

    def parameters(self) -> NoReturn:
        """Refuse: an optimiser that is handed the teacher is a mistake."""
        raise FrozenTeacherError("teacher.parameters()")

    def backward(self) -> NoReturn:
        """Refuse: there is no backward path."""
        raise FrozenTeacherError("teacher.backward()")


def load_teacher(
    path: Path,
    *,
    backend: str | None = None,
    device: str = "cpu",
    events: EventLog,
    announce: Callable[[str], None] = print,
) -> Teacher:
    """Open a teacher file and load it for a backend, saying which and why.

    Args:
        path: GGUF file.
        backend: ``auto``, ``q4k`` or ``dense``; ``None`` means the environment variable or ``auto``.
        device: ``cpu``.
        events: receives ``teacher_loading``, ``backend_selected`` and ``teacher_ready``.
        announce: receives the log lines.

    Raises:
        InputError: when the file or an option cannot be used.
    """
    check_device(device)
    model = open_model(path)
    choice = choose_backend(backend_override(backend), model.bytes_by_type())
    announce(f"teacher backend: {choice.backend} ({choice.reason})")
    events.emit("backend_selected", backend=choice.backend, device=device, reason=choice.reason)
    events.emit("teacher_loading", file=path.name, file_bytes=model.file_bytes)
    quantised = sum(FORMATS[tensor.type].is_k_quant for tensor in model.tensors.values())
    if choice.backend == "dense" and quantised:
        announce(f"dequantizing {model.config.num_layers} layers to F32 ({quantised} K-quant tensors)")
    started = time.monotonic()
    teacher = Teacher(model, choice)
    held = teacher.residency()
    events.emit("teacher_ready", seconds=time.monotonic() - started, **vars(held))
    announce(
        f"teacher ready: {len(model.tensors)} tensors, {sum(held.resident_bytes.values())} bytes resident of "
        f"{held.tensor_bytes} in the file, {held.dense_bytes_of_quantised} of them dequantised, "
        f"scratch {held.scratch_bytes} bytes"
    )
    return teacher
