"""What a teacher computes, read from its file: dimensions, windows, rotary embedding, experts, recurrent layers.

``families.py`` says what each architecture does, ``tensor_shapes.py`` which tensors it has; anything that none of them
says is refused by name.

Letters in shapes: V vocabulary, H hidden size, F feed-forward size, N query heads, K key-value heads, D head size,
E experts.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from q4kd.trainer.errors import InputError
from q4kd.trainer.formats.families import FAMILIES, Family, RopeLayout
from q4kd.trainer.formats.layer_sizes import read_kv_heads, read_layer_sizes
from q4kd.trainer.formats.particulars import (
    TWO_SIZES,
    read_experts,
    read_ffn_size,
    read_rotary_dim,
    read_scales,
    read_window_rope_base,
    read_windows,
)
from q4kd.trainer.formats.recurrence import Recurrence, check_sections, read_layers, read_recurrence
from q4kd.trainer.formats.rope_scaling import RopeScaling, read_rope_scaling
from q4kd.trainer.formats.values import CONVERT, Values

_MAX_DIMENSION = 1 << 22


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Dimensions of a decoder-only transformer, read from the file's metadata and tensors.

    Attributes:
        num_kv_heads, head_dim: key-value heads, and elements of one head (not always ``hidden_size / num_heads``), of
            the layers that ``layer_kv_heads`` and ``window_head_dim`` do not name.
        rope_layout: which elements of a head are rotated together: ``(i, i + D/2)`` or ``(2i, 2i + 1)``.
        qk_norm: whether query and key heads are normalised before they are rotated.
        vocab_size: rows of the embedding, whatever the metadata say.
        tied_head: whether the output head is the embedding.
        windows: for each layer, how many keys a query reads, its own among them; 0 for all, no entries where no layer
            has a window.
        rotary_dim: elements of a head that are rotated, its first ones; 0 for all.
        rope_scaling: what extends the rotary embedding to longer texts.
        window_rope_base: rotary base of the layers with a window, which are never scaled; 0 for that of all layers.
        no_rope_step: each so many layers, one has no rotary embedding; 0 for none.
        attention_scale: what products of queries and keys are multiplied by; 0 for ``1 / sqrt(D)``.
        attention_cap, logit_cap: c of ``c tanh(x / c)``, taken of attention scores and of logits; 0 for none.
        temperature_scale: queries at position p are multiplied by ``1 + scale * ln(1 + floor(p / original_context))``.
        embedding_scale, residual_scale, logit_scale: what embeddings, the outputs of attention and feed-forward, and
            logits before their cap are multiplied by.
        num_experts: experts of every layer, in place of one feed-forward of ``ffn_size``; 0 for a dense model.
        experts_per_token: how many experts a token is given to.
        expert_ffn_size: feed-forward size of an expert.
        window_head_dim: elements of one head in the layers with a window; 0 for those of all layers.
        layer_kv_heads: key-value heads of each layer; no entries where all have as many.
        keys_as_values: whether the values of the layers without a window are their keys.
        fused_experts: whether gate and up of all experts are one matrix, rows of each expert in this order.
        shared_ffn_size: feed-forward size of the expert that every token is given to; 0 for none.
        recurrence: the layers that keep a state in place of keys and values; None where all attend.
        skipped_blocks: blocks behind the last layer that a file holds to predict further tokens, which are not run.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    ffn_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_eps: float
    rope_base: float
    rope_layout: RopeLayout
    qk_norm: bool
    context_length: int
    vocab_size: int
    tied_head: bool
    windows: tuple[int, ...] = ()
    rotary_dim: int = 0
    rope_scaling: RopeScaling | None = None
    window_rope_base: float = 0.0
    no_rope_step: int = 0
    attention_scale: float = 0.0
    attention_cap: float = 0.0
    logit_cap: float = 0.0
    temperature_scale: float = 0.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    num_experts: int = 0
    experts_per_token: int = 0
    expert_ffn_size: int = 0
    window_head_dim: int = 0
    layer_kv_heads: tuple[int, ...] = ()
    keys_as_values: bool = False
    fused_experts: bool = False
    shared_ffn_size: int = 0
    recurrence: Recurrence | None = None
    skipped_blocks: int = 0

    @property
    def family(self) -> Family:
        """What the models of this architecture have in common."""
        return FAMILIES[self.architecture]

    @property
    def query_scale(self) -> float:
        """What products of queries and keys are multiplied by."""
        return self.attention_scale or 1 / math.sqrt(self.head_dim)

    def window(self, layer: int) -> int:
        """Return how many keys a query of a layer reads; 0 for all."""
        return self.windows[layer] if self.windows else 0

    def is_rotated(self, layer: int) -> bool:
        """Return whether a layer has rotary embedding."""
        return not self.no_rope_step or (layer + 1) % self.no_rope_step != 0

    def head_dim_of(self, layer: int) -> int:
        """Return the elements of one head of a layer, D."""
        return self.window_head_dim if self.window_head_dim and self.window(layer) else self.head_dim

    def kv_heads_of(self, layer: int) -> int:
        """Return the key-value heads of a layer, K."""
        return self.layer_kv_heads[layer] if self.layer_kv_heads else self.num_kv_heads

    def shares_keys(self, layer: int) -> bool:
        """Return whether the values of a layer are its keys, both before their norms."""
        return self.keys_as_values and not self.window(layer)

    def recurrence_of(self, layer: int) -> Recurrence | None:
        """Return the sizes of a layer that keeps a state; None for one that attends."""
        return self.recurrence if self.recurrence is not None and self.recurrence.layers[layer] else None

    def is_skipped(self, name: str) -> bool:
        """Return whether a tensor belongs to a block that is not run."""
        layer = name.removeprefix("blk.").partition(".")[0]
        blocks = range(self.num_layers, self.num_layers + self.skipped_blocks)
        return name.startswith("blk.") and layer in map(str, blocks)

    @property
    def q_size(self) -> int:
        """Outputs of the query projection, ``N * D``, of the layer that has the most."""
        return self.num_heads * max(self.head_dim, self.window_head_dim)

    @property
    def kv_size(self) -> int:
        """Outputs of the key and of the value projection, ``K * D``, of the layer that has the most."""
        if not self.family.layer_sizes:
            return self.num_kv_heads * self.head_dim
        return max(self.kv_heads_of(layer) * self.head_dim_of(layer) for layer in range(self.num_layers))


def check_architecture(path: Path, architecture: object, supported: Iterable[str] = FAMILIES) -> str:
    """Return the architecture's name.

    Raises:
        InputError: when it is not implemented.
    """
    if not isinstance(architecture, str) or architecture not in tuple(supported):
        expected, got = f"architecture {', '.join(supported)}", repr(architecture)[:80]
        raise InputError(str(path), expected=expected, got=got, remedy="use a teacher of a supported architecture")
    return architecture


def read_dimensions(
    path: Path, architecture: str, values: Mapping[str, Any], tensors: Mapping[str, Any]
) -> TeacherConfig:
    """Build the config from metadata under GGUF's own key names (without the architecture's prefix) and the tensors.

    Args:
        path: file, for error lines.
        architecture: name of a supported architecture.
        values: metadata such as ``{"embedding_length": 896, "rope.freq_base": 1e6}``; None stands for a missing key.
        tensors: objects with a ``shape``, under GGUF names.

    Raises:
        InputError: for a value that is missing, of another type, or out of bounds.
    """
    found, family = Values(path, architecture, values), FAMILIES[architecture]
    number, integer = found.number, found.integer
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        got = "none" if embedding is None else f"shape {embedding.shape}"
        raise InputError(str(path), expected="a matrix token_embd.weight", got=got, remedy=CONVERT)
    hidden = integer("embedding_length", _MAX_DIMENSION)
    heads = integer("attention.head_count", 4096)
    head_dim = integer("attention.key_length", 4096, max(1, hidden // heads))
    if integer("attention.value_length", 4096, head_dim) != head_dim:
        got = str(found.get("attention.value_length"))
        raise found.refusal("attention.value_length", f"the head size {head_dim}", got, TWO_SIZES)
    (layers, predictors), context = read_layers(found, family), integer("context_length", 1 << 24)
    windows = read_windows(found, family, layers, context)
    kv_heads, layer_kv_heads = read_kv_heads(found, family, layers, heads)
    scaling = read_rope_scaling(found, family, context, tensors)
    ffn_size = read_ffn_size(found, family)
    rotary_dim = read_rotary_dim(found, family, head_dim)
    check_sections(found, family, rotary_dim or head_dim)
    base = float(number("rope.freq_base", 1.0, 1e12, 10_000.0))
    return TeacherConfig(
        architecture=architecture,
        num_layers=layers,
        hidden_size=hidden,
        ffn_size=ffn_size,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_eps=float(number("attention.layer_norm_rms_epsilon", 1e-12, 1e-1)),
        rope_base=base,
        rope_layout=family.rope_layout,
        qk_norm=family.head_norms != "none",
        context_length=context,
        vocab_size=int(embedding.shape[0]),
        tied_head="output.weight" not in tensors,
        windows=windows,
        rotary_dim=rotary_dim,
        rope_scaling=scaling,
        window_rope_base=read_window_rope_base(found, family, base) if windows else 0.0,
        no_rope_step=family.no_rope_step,
        recurrence=read_recurrence(found, family, layers, predictors),
        skipped_blocks=predictors,
        **read_scales(found, architecture, layers, hidden, heads),
        **read_experts(found, family, ffn_size),
        **read_layer_sizes(found, family, windows, tensors),
        layer_kv_heads=layer_kv_heads,
    )
