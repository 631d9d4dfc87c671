"""Which tensors a file of a teacher holds, in which shapes; and whether it does.

Letters in shapes: V vocabulary, H hidden size, F feed-forward size, N query heads, K key-value heads, D head size,
E experts.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from q4kd.trainer.errors import InputError
from q4kd.trainer.formats.architecture import TeacherConfig
from q4kd.trainer.formats.layer_sizes import beside_experts_shapes
from q4kd.trainer.formats.particulars import shared_shapes
from q4kd.trainer.formats.recurrence import recurrent_shapes
from q4kd.trainer.formats.rope_scaling import LONG_FACTORS, SHORT_FACTORS
from q4kd.trainer.formats.values import CONVERT

VECTOR_TYPES = ("F16", "BF16", "F32")
ROPE_FACTORS = "rope_freqs.weight"
_DOWNLOAD = "download the file again"


class _Tensor(Protocol):
    @property
    def type(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


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
    if family.layer_scale:
        shapes["layer_output_scale.weight"] = (1,)
    return shapes | (_attention_shapes(config, layer) if recurrence is None else recurrent_shapes(recurrence, hidden))


def _attention_shapes(config: TeacherConfig, layer: int) -> dict[str, tuple[int, ...]]:
    """Return name and shape of the tensors of a layer's attention."""
    hidden, family, head_dim = config.hidden_size, config.family, config.head_dim_of(layer)
    q_size, kv_size = config.num_heads * head_dim, config.kv_heads_of(layer) * head_dim
    qkv = {"attn_q": q_size, "attn_k": kv_size} | ({} if config.shares_keys(layer) else {"attn_v": kv_size})
    rows_cols = {name: (rows, hidden) for name, rows in qkv.items()}
    if family.fused_qkv:
        rows_cols = {"attn_qkv": (sum(qkv.values()), hidden)}
    if family.gated_attention:
        rows_cols["attn_q"] = (2 * q_size, hidden)
    rows_cols["attn_output"] = (hidden, q_size)
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": shape for name, shape in rows_cols.items()}
    if family.biases:
        shapes |= {f"{name}.bias": (count,) for name, count in qkv.items()}
    if family.all_biases:
        shapes["attn_output.bias"] = (hidden,)
    if family.sinks:
        shapes["attn_sinks.weight"] = (config.num_heads,)
    if family.head_norms == "each":
        shapes |= {f"{name}.weight": (head_dim,) for name in ("attn_q_norm", "attn_k_norm")}
    elif family.head_norms == "all":
        shapes |= {"attn_q_norm.weight": (q_size,), "attn_k_norm.weight": (kv_size,)}
    return shapes


def _feed_forward_shapes(config: TeacherConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of the matrices of a layer's feed-forward; experts are the outermost dimension."""
    hidden, ffn = config.hidden_size, config.ffn_size
    dense: dict[str, tuple[int, ...]] = {f"ffn_{name}.weight": (ffn, hidden) for name in ("gate", "up")}
    dense["ffn_down.weight"] = (hidden, ffn)
    if config.num_experts and config.family.dense_beside_experts:
        sizes = config.num_experts, config.expert_ffn_size, hidden
        return dense | beside_experts_shapes(*sizes, is_fused=config.fused_experts)
    if config.num_experts:
        count, size = config.num_experts, config.expert_ffn_size
        shapes: dict[str, tuple[int, ...]] = {
            "ffn_gate_inp.weight": (count, hidden),
            "ffn_gate_exps.weight": (count, size, hidden),
            "ffn_up_exps.weight": (count, size, hidden),
            "ffn_down_exps.weight": (count, hidden, size),
        }
        if config.shared_ffn_size:
            shapes |= shared_shapes(config.shared_ffn_size, hidden)
        return shapes | (_expert_bias_shapes(config) if config.family.all_biases else {})
    if config.family.fused_gate_up:
        return {"ffn_up.weight": (2 * ffn, hidden), "ffn_down.weight": (hidden, ffn)}
    return dense


def _expert_bias_shapes(config: TeacherConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of the biases of a layer's router and experts, a row for each expert."""
    count, size = config.num_experts, config.expert_ffn_size
    return {
        "ffn_gate_inp.bias": (count,),
        "ffn_gate_exps.bias": (count, size),
        "ffn_up_exps.bias": (count, size),
        "ffn_down_exps.bias": (count, config.hidden_size),
    }


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
        if (len(tensor.shape) == 1 or name.endswith(".bias")) and tensor.type not in VECTOR_TYPES:
            raise InputError(subject, expected="an F32, F16 or BF16 vector", got=tensor.type, remedy=CONVERT)
    # Either all biases of Q, K and V are there or none is, and all scales of layers: a file that lost one would be
    # silently wrong. Biases of other tensors are never left out.
    kinds = (".bias",) if config.family.biases and not config.family.all_biases else ()
    optional = tuple(
        kind for kind in (*kinds, ".layer_output_scale.weight") if not any(name.endswith(kind) for name in tensors)
    )
    if not config.family.layer_sizes:  # where the divisors say which part of a head is rotated
        optional += (ROPE_FACTORS,)
    missing = sorted(name for name in shapes if name not in tensors and not name.endswith(optional))
    if missing:
        expected, got = f"tensor {missing[0]}", f"{len(missing)} missing"
        raise InputError(str(path), expected=expected, got=got, remedy=_DOWNLOAD)
