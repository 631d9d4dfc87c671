"""What a teacher computes, read from its file: dimensions, windows, rotary embedding, experts, and its tensors.

``families.py`` says what each architecture does; anything that neither says is refused by name.

Letters in shapes: V vocabulary, H hidden size, F feed-forward size, N query heads, K key-value heads, D head size,
E experts.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from q4kd.trainer.errors import InputError
from q4kd.trainer.formats.families import FAMILIES, Family, RopeLayout
from q4kd.trainer.formats.particulars import (
    TWO_SIZES,
    read_experts,
    read_ffn_size,
    read_rotary_dim,
    read_scales,
    read_window_rope_base,
    read_windows,
    shared_shapes,
)
from q4kd.trainer.formats.recurrence import Recurrence, check_sections, read_layers, read_recurrence, recurrent_shapes
from q4kd.trainer.formats.rope_scaling import LONG_FACTORS, SHORT_FACTORS, RopeScaling, read_rope_scaling
from q4kd.trainer.formats.values import CONVERT, Values

VECTOR_TYPES = ("F16", "BF16", "F32")
ROPE_FACTORS = "rope_freqs.weight"
_MAX_DIMENSION = 1 << 22
_DOWNLOAD = "download the file again"


@dataclass(frozen=True, kw_only=True)
class TeacherConfig:
    """Dimensions of a decoder-only transformer, read from the file's metadata and tensors.

    Attributes:
        head_dim: elements of one head; not always ``hidden_size / num_heads``.
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
        """Outputs of the query projection, ``N * D``."""
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Outputs of the key and of the value projection, ``K * D``."""
        return self.num_kv_heads * self.head_dim


class _Tensor(Protocol):
    @property
    def type(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


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
        num_kv_heads=integer("attention.head_count_kv", heads, heads),
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
    )


def expected_shapes(config: TeacherConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor a file with this config may hold (optional ones included)."""
    hidden = config.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (config.vocab_size, hidden),
        "output_norm.weight": (hidden,),
    }
    if not config.tied_head:
        shapes["output.weight"] = (config.vocab_size, hidden)
    half = (config.rotary_dim or config.head_dim) // 2
    if config.rope_scaling is not None and config.rope_scaling.kind == "long":
        shapes |= {LONG_FACTORS: (half,), SHORT_FACTORS: (half,)}
    elif config.family.rope_factors:
        shapes[ROPE_FACTORS] = (half,)
    for layer in range(config.num_layers):
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in _layer_shapes(config, layer).items()}
    return shapes


def _layer_shapes(config: TeacherConfig, layer: int) -> dict[str, tuple[int, ...]]:
    """Return name and shape of the tensors of one layer."""
    hidden, family, recurrence = config.hidden_size, config.family, config.recurrence_of(layer)
    shapes = _feed_forward_shapes(config)
    if family.pre_norms:
        shapes |= {"attn_norm.weight": (hidden,), f"{family.ffn_norm}.weight": (hidden,)}
    if family.post_norms:
        shapes |= {"post_attention_norm.weight": (hidden,), "post_ffw_norm.weight": (hidden,)}
    return shapes | (_attention_shapes(config) if recurrence is None else recurrent_shapes(recurrence, hidden))


def _attention_shapes(config: TeacherConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of the tensors of a layer's attention."""
    hidden, family = config.hidden_size, config.family
    qkv = {"attn_q": config.q_size, "attn_k": config.kv_size, "attn_v": config.kv_size}
    rows_cols = {name: (rows, hidden) for name, rows in qkv.items()}
    if family.fused_qkv:
        rows_cols = {"attn_qkv": (sum(qkv.values()), hidden)}
    if family.gated_attention:
        rows_cols["attn_q"] = (2 * config.q_size, hidden)
    rows_cols["attn_output"] = (hidden, config.q_size)
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in rows_cols.items()}
    if family.biases:
        shapes |= {f"{name}.bias": (count,) for name, count in qkv.items()}
    if family.head_norms == "each":
        shapes |= {f"{name}.weight": (config.head_dim,) for name in ("attn_q_norm", "attn_k_norm")}
    elif family.head_norms == "all":
        shapes |= {"attn_q_norm.weight": (config.q_size,), "attn_k_norm.weight": (config.kv_size,)}
    return shapes


def _feed_forward_shapes(config: TeacherConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of the matrices of a layer's feed-forward; experts are the outermost dimension."""
    hidden, ffn = config.hidden_size, config.ffn_size
    if config.num_experts:
        count, size = config.num_experts, config.expert_ffn_size
        shapes: dict[str, tuple[int, ...]] = {
            "ffn_gate_inp.weight": (count, hidden),
            "ffn_gate_exps.weight": (count, size, hidden),
            "ffn_up_exps.weight": (count, size, hidden),
            "ffn_down_exps.weight": (count, hidden, size),
        }
        return shapes | (shared_shapes(config.shared_ffn_size, hidden) if config.shared_ffn_size else {})
    if config.family.fused_gate_up:
        return {"ffn_up.weight": (2 * ffn, hidden), "ffn_down.weight": (hidden, ffn)}
    return {"ffn_gate.weight": (ffn, hidden), "ffn_up.weight": (ffn, hidden), "ffn_down.weight": (hidden, ffn)}


def check_tensors(path: Path, config: TeacherConfig, tensors: Mapping[str, _Tensor]) -> None:
    """Check that a file holds exactly the tensors of its architecture, in the shapes of its config.

    Raises:
        InputError: naming the first tensor that is unknown, missing, or of another shape or type.
    """
    if config.num_heads % config.num_kv_heads or config.head_dim % 2:
        expected = "query heads a multiple of key-value heads and an even head size"
        got = f"{config.num_heads}, {config.num_kv_heads} and {config.head_dim}"
        raise InputError(str(path), expected=expected, got=got, remedy=CONVERT)
    if config.num_layers > len(tensors):
        expected = f"the tensors of {config.num_layers} layers"
        raise InputError(str(path), expected=expected, got=f"{len(tensors)} tensors", remedy=_DOWNLOAD)
    shapes = expected_shapes(config)
    for name, tensor in tensors.items():
        subject = f"{path}: tensor {name}"
        if name not in shapes:
            remedy = "use a model without it; ignoring a weight would make the teacher silently wrong"
            expected = f"only the tensors of {config.architecture}"
            raise InputError(subject, expected=expected, got="a tensor that would be ignored", remedy=remedy)
        if tensor.shape != shapes[name]:
            remedy = f"{CONVERT}: its metadata and tensors disagree"
            raise InputError(subject, expected=f"shape {shapes[name]}", got=f"{tensor.shape}", remedy=remedy)
        if len(tensor.shape) == 1 and tensor.type not in VECTOR_TYPES:
            raise InputError(subject, expected="an F32, F16 or BF16 vector", got=tensor.type, remedy=CONVERT)
    # Either all biases are there or none is: a file that lost one would be silently wrong.
    has_biases = not config.family.biases or any(name.endswith(".bias") for name in tensors)
    optional = (ROPE_FACTORS,) if has_biases else (ROPE_FACTORS, ".bias")
    missing = sorted(name for name in shapes if name not in tensors and not name.endswith(optional))
    if missing:
        expected, got = f"tensor {missing[0]}", f"{len(missing)} missing"
        raise InputError(str(path), expected=expected, got=got, remedy=_DOWNLOAD)
