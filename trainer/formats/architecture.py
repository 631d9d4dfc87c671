"""Architectures that the teacher implements: dimensions, the tensors that each may hold, and what is refused by name.

All are decoder-only transformers with RMSNorm, rotary embedding, grouped-query attention and SwiGLU:

    qwen2   biases on Q, K and V; split-halves rotary embedding
    qwen3   RMSNorm on each query and key head, a head size of its own; split halves
    llama   interleaved rotary embedding (llama.cpp's converter permutes Q and K rows), optional ``rope_freqs``
            divisors (Llama 3.1 and later); Mistral files carry this name too

Letters in shapes: V vocabulary, H hidden size, F feed-forward size, N query heads, K key-value heads, D head size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from q4kd.trainer.errors import InputError

RopeLayout = Literal["split_halves", "interleaved"]
ROPE_LAYOUTS: dict[str, RopeLayout] = {"qwen2": "split_halves", "qwen3": "split_halves", "llama": "interleaved"}
VECTOR_TYPES = ("F16", "BF16", "F32")
ROPE_FACTORS = "rope_freqs.weight"
_MAX_DIMENSION = 1 << 22
_CONVERT = "convert the model again"
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


def check_architecture(path: Path, architecture: object) -> str:
    """Return the architecture's name.

    Raises:
        InputError: when it is not implemented.
    """
    if not isinstance(architecture, str) or architecture not in ROPE_LAYOUTS:
        expected, got = f"architecture {', '.join(ROPE_LAYOUTS)}", repr(architecture)[:80]
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

    def refuse(key: str, expected: str, got: str, remedy: str = _CONVERT) -> InputError:
        return InputError(f"{path}: {architecture}.{key}", expected=expected, got=got, remedy=remedy)

    def number(key: str, low: float, high: float, default: float | None = None) -> float:
        value = values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise refuse(key, f"a number from {low:g} to {high:g}", "nothing" if value is None else repr(value)[:80])
        return value

    def integer(key: str, high: int, default: int | None = None) -> int:
        value = number(key, 1, high, default)
        if value != int(value):
            raise refuse(key, "a whole number", str(value))
        return int(value)

    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        got = "none" if embedding is None else f"shape {embedding.shape}"
        raise InputError(str(path), expected="a matrix token_embd.weight", got=got, remedy=_CONVERT)
    hidden = integer("embedding_length", _MAX_DIMENSION)
    heads = integer("attention.head_count", 4096)
    head_dim = integer("attention.key_length", 4096, max(1, hidden // heads))
    for key in ("attention.value_length", "rope.dimension_count"):
        if integer(key, 4096, head_dim) != head_dim:
            remedy = "use another teacher; partial rotary embedding and heads of two sizes are not implemented"
            raise refuse(key, f"the head size {head_dim}", str(values[key]), remedy)
    return TeacherConfig(
        architecture=architecture,
        num_layers=integer("block_count", 1024),
        hidden_size=hidden,
        ffn_size=integer("feed_forward_length", _MAX_DIMENSION),
        num_heads=heads,
        num_kv_heads=integer("attention.head_count_kv", heads, heads),
        head_dim=head_dim,
        rms_eps=float(number("attention.layer_norm_rms_epsilon", 1e-12, 1e-1)),
        rope_base=float(number("rope.freq_base", 1.0, 1e12, 10_000.0)),
        rope_layout=ROPE_LAYOUTS[architecture],
        qk_norm=architecture == "qwen3",
        context_length=integer("context_length", 1 << 24),
        vocab_size=int(embedding.shape[0]),
        tied_head="output.weight" not in tensors,
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
    if config.architecture == "llama":
        shapes[ROPE_FACTORS] = (config.head_dim // 2,)
    rows_cols = {
        "attn_q": (config.q_size, hidden),
        "attn_k": (config.kv_size, hidden),
        "attn_v": (config.kv_size, hidden),
        "attn_output": (hidden, config.q_size),
        "ffn_gate": (config.ffn_size, hidden),
        "ffn_up": (config.ffn_size, hidden),
        "ffn_down": (hidden, config.ffn_size),
    }
    for layer in range(config.num_layers):
        prefix = f"blk.{layer}."
        shapes |= {f"{prefix}{name}.weight": shape for name, shape in rows_cols.items()}
        shapes |= {f"{prefix}{name}.bias": rows_cols[name][:1] for name in ("attn_q", "attn_k", "attn_v")}
        shapes |= {f"{prefix}attn_norm.weight": (hidden,), f"{prefix}ffn_norm.weight": (hidden,)}
        if config.qk_norm:
            shapes |= {f"{prefix}{name}.weight": (config.head_dim,) for name in ("attn_q_norm", "attn_k_norm")}
    return shapes


def check_tensors(path: Path, config: TeacherConfig, tensors: Mapping[str, _Tensor]) -> None:
    """Check that a file holds exactly the tensors of its architecture, in the shapes of its config.

    Raises:
        InputError: naming the first tensor that is unknown, missing, or of another shape or type.
    """
    if config.num_heads % config.num_kv_heads or config.head_dim % 2:
        expected = "query heads a multiple of key-value heads and an even head size"
        got = f"{config.num_heads}, {config.num_kv_heads} and {config.head_dim}"
        raise InputError(str(path), expected=expected, got=got, remedy=_CONVERT)
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
            remedy = f"{_CONVERT}: its metadata and tensors disagree"
            raise InputError(subject, expected=f"shape {shapes[name]}", got=f"{tensor.shape}", remedy=remedy)
        if len(tensor.shape) == 1 and tensor.type not in VECTOR_TYPES:
            raise InputError(subject, expected="an F32, F16 or BF16 vector", got=tensor.type, remedy=_CONVERT)
    # Either all biases are there or none is: a file that lost one would be silently wrong.
    optional = (ROPE_FACTORS,) if any(name.endswith(".bias") for name in tensors) else (ROPE_FACTORS, ".bias")
    missing = sorted(name for name in shapes if name not in tensors and not name.endswith(optional))
    if missing:
        expected, got = f"tensor {missing[0]}", f"{len(missing)} missing"
        raise InputError(str(path), expected=expected, got=got, remedy=_DOWNLOAD)
