"""Arranges a model's tensors for the forward pass on the CPU: matrices, packed or decoded, and vectors in float32."""

import math
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from q4kd.trainer.formats.architecture import TeacherConfig
from q4kd.trainer.formats.model_file import ModelFile
from q4kd.trainer.formats.recurrence import Recurrence
from q4kd.trainer.formats.rope_scaling import LONG_FACTORS, SHORT_FACTORS
from q4kd.trainer.formats.tensor_shapes import ROPE_FACTORS
from q4kd.trainer.teacher.cpu.dense_and_experts import DenseAndExperts
from q4kd.trainer.teacher.cpu.experts import Biases, Experts
from q4kd.trainer.teacher.cpu.recurrent import DeltaNet, build_delta_net
from q4kd.trainer.teacher.cpu.shared_expert import SharedExpert, build_shared_expert
from q4kd.trainer.teacher.cpu.weights import Matrix, Scratch, build_matrix, decode_vector
from q4kd.trainer.teacher.rope import RopeFactors


@dataclass(frozen=True)
class FeedForward:
    """The feed-forward of a dense layer."""

    gate_up: tuple[Matrix, ...]  # two, or one that holds their rows
    down: Matrix


@dataclass(frozen=True)
class Layer:
    """Weights of one block; norms that its family has not are None."""

    attn_norm: Tensor | None
    qkv: tuple[Matrix, ...]  # three, or one that holds their rows, or two where values are keys
    attn_output: Matrix
    recurrent: DeltaNet | None
    biases: tuple[Tensor | None, Tensor | None, Tensor | None]
    output_bias: Tensor | None
    sinks: Tensor | None  # float32, one for each query head
    q_norm: Tensor | None
    k_norm: Tensor | None
    attn_post_norm: Tensor | None
    ffn_norm: Tensor | None
    feed_forward: FeedForward | Experts | DenseAndExperts
    shared_expert: SharedExpert | None
    ffn_post_norm: Tensor | None
    output_scale: float  # what the states behind the layer are multiplied by
    head_dim: int
    kv_heads: int
    window: int  # keys that a query reads; 0 for all
    is_rotated: bool


class ModelWeights:
    """Every weight of a model; a tied head is the embedding.

    Args:
        model: an opened file; its tensors stay views of the memory map.
        backend: ``q4k`` keeps the blocks, ``dense`` decodes every matrix.
        dtype: dtype of the matrix products, float32 or bfloat16.
    """

    def __init__(self, model: ModelFile, backend: str, dtype: torch.dtype) -> None:
        self._model, self._backend, self._dtype = model, backend, dtype
        self._config: TeacherConfig = model.config
        self.scratch = Scratch()
        self.matrices: dict[str, Matrix] = {}
        self.vector_bytes: Counter[str] = Counter()
        self.embedding = self._matrix("token_embd.weight")
        self.layers = [self._load_layer(index) for index in range(self._config.num_layers)]
        # A scale of the logits is one of the states that the head reads.
        self.output_norm = self._vector("output_norm.weight") * self._config.logit_scale
        self.head = self.embedding if self._config.tied_head else self._matrix("output.weight")
        self.rope_factors = RopeFactors(*map(self._optional, (ROPE_FACTORS, SHORT_FACTORS, LONG_FACTORS)))

    def _matrix(self, name: str, dtype: torch.dtype | None = None) -> Matrix:
        tensor = self._model.tensors[name]
        self.matrices[name] = build_matrix(self._backend, tensor, self.scratch, dtype or self._dtype)
        return self.matrices[name]

    def _vector(self, name: str) -> Tensor:
        vector = decode_vector(self._model.tensors[name])
        self.vector_bytes["F32"] += vector.numel() * 4
        return vector

    def _optional(self, name: str) -> Tensor | None:
        return self._vector(name) if name in self._model.tensors else None

    def _load_layer(self, index: int) -> Layer:
        prefix, config, family = f"blk.{index}.", self._config, self._config.family
        recurrence = config.recurrence_of(index)
        is_fused = family.fused_qkv or recurrence is not None
        qkv: tuple[str, ...] = ("attn_qkv",) if is_fused else ("attn_q", "attn_k", "attn_v")
        if config.shares_keys(index):
            qkv = qkv[:2]
        output = "attn_output" if recurrence is None else "ssm_out"
        scale = self._optional(prefix + "layer_output_scale.weight")

        def norm(name: str) -> Tensor | None:
            return self._optional(f"{prefix}{name}.weight")

        return Layer(
            attn_norm=norm("attn_norm"),
            qkv=tuple(self._matrix(f"{prefix}{name}.weight") for name in qkv),
            attn_output=self._matrix(f"{prefix}{output}.weight"),
            recurrent=self._load_recurrent(prefix, recurrence),
            biases=(
                self._optional(prefix + "attn_q.bias"),
                self._optional(prefix + "attn_k.bias"),
                self._optional(prefix + "attn_v.bias"),
            ),
            output_bias=self._optional(prefix + "attn_output.bias"),
            sinks=norm("attn_sinks"),
            q_norm=norm("attn_q_norm"),
            k_norm=norm("attn_k_norm"),
            attn_post_norm=norm("post_attention_norm") if family.post_norms else None,
            ffn_norm=norm(family.ffn_norm),
            feed_forward=self._load_experts(prefix) if config.num_experts else self._load_feed_forward(prefix),
            shared_expert=build_shared_expert(prefix, self._matrix, self._vector) if config.shared_ffn_size else None,
            ffn_post_norm=norm("post_ffw_norm"),
            output_scale=1.0 if scale is None else float(scale),
            head_dim=config.head_dim_of(index),
            kv_heads=config.kv_heads_of(index),
            window=config.window(index),
            is_rotated=config.is_rotated(index),
        )

    def _load_recurrent(self, prefix: str, sizes: Recurrence | None) -> DeltaNet | None:
        if sizes is None:
            return None
        taps = self._vector(prefix + "ssm_conv1d.weight").T.contiguous()
        return build_delta_net(prefix, sizes, self._matrix, self._vector, taps)

    def _load_feed_forward(self, prefix: str) -> FeedForward:
        names = ("ffn_up",) if self._config.family.fused_gate_up else ("ffn_gate", "ffn_up")
        gate_up = tuple(self._matrix(f"{prefix}{name}.weight") for name in names)
        return FeedForward(gate_up, self._matrix(prefix + "ffn_down.weight"))

    def _load_experts(self, prefix: str) -> Experts | DenseAndExperts:
        # The router is multiplied in float32 whatever the dtype, since a rounded product chooses other experts.
        router = self._matrix(prefix + "ffn_gate_inp.weight", torch.float32)
        config, is_fused = self._config, self._config.fused_experts
        gate = self._matrix(f"{prefix}ffn_{'gate_up' if is_fused else 'gate'}_exps.weight")
        up = None if is_fused else self._matrix(prefix + "ffn_up_exps.weight")
        down = self._matrix(prefix + "ffn_down_exps.weight")
        biases = None
        if config.family.all_biases:
            names = ("gate_inp", "gate_exps", "up_exps", "down_exps")
            biases = Biases(*(self._vector(f"{prefix}ffn_{name}.bias") for name in names))
        experts = Experts(router, gate, up, down, config.num_experts, config.experts_per_token, biases)
        if not config.family.dense_beside_experts:
            return experts
        return DenseAndExperts(
            gate=self._matrix(prefix + "ffn_gate.weight"),
            up=self._matrix(prefix + "ffn_up.weight"),
            down=self._matrix(prefix + "ffn_down.weight"),
            dense_post_norm=self._vector(prefix + "post_ffw_norm_1.weight"),
            experts=experts,
            router_scale=self._vector(prefix + "ffn_gate_inp.scale") / math.sqrt(config.hidden_size),
            experts_norm=self._vector(prefix + "pre_ffw_norm_2.weight"),
            experts_post_norm=self._vector(prefix + "post_ffw_norm_2.weight"),
            expert_scales=self._vector(prefix + "ffn_down_exps.scale"),
        )
