"""Sizes that differ from layer to layer, and experts beside a dense feed-forward: what Gemma 4's files say of both.

Layers with a sliding window have a head size and a number of key-value heads of their own. The others may do without a
value projection: their values are then their keys, before the norms of both. Keys and names are those of llama.cpp's
converter (``conversion/gemma.py``) and of its ``src/models/gemma4.cpp``.
"""

from collections.abc import Collection, Sequence
from typing import TypedDict

from q4kd.trainer.formats.families import FAMILIES, Family
from q4kd.trainer.formats.values import Values

_TWO_SIZES = "use another teacher; rotating a part of the heads of a window is not implemented"
_FUSED, _APART = "ffn_gate_up_exps.weight", ("ffn_gate_exps.weight", "ffn_up_exps.weight")


class LayerSizes(TypedDict, total=False):
    """Sizes of a ``TeacherConfig`` that differ between its layers."""

    window_head_dim: int
    keys_as_values: bool
    fused_experts: bool


def read_kv_heads(found: Values, family: Family, layers: int, heads: int) -> tuple[int, tuple[int, ...]]:
    """Return the key-value heads of the layer that has the most, and those of each layer where they are listed.

    Raises:
        InputError: for a number out of bounds, or a list that does not name one for each layer, each of which divides
            the query heads.
    """
    key = "attention.head_count_kv"
    stated = found.get(key)
    if not family.layer_sizes or not isinstance(stated, Sequence) or isinstance(stated, str):
        return found.integer(key, heads, heads), ()
    listed = list(stated)[: layers + 1]
    is_whole = all(isinstance(count, int) and not isinstance(count, bool) for count in listed)
    if len(listed) != layers or not is_whole or not all(1 <= count <= heads and heads % count == 0 for count in listed):
        raise found.refusal(key, f"{layers} numbers that divide {heads} query heads", repr(listed)[:80])
    return max(listed), tuple(listed)


def read_layer_sizes(found: Values, family: Family, windows: Sequence[int], tensors: Collection[str]) -> LayerSizes:
    """Return the head size of layers with a window, and in which of two forms a file has values and experts.

    A file that has some of the tensors of either form is found by ``check_tensors``, which names those that it lacks.

    Raises:
        InputError: for a window or size that is missing or out of bounds, or a value size or rotated part that differs
            from the size.
    """
    if not family.layer_sizes:
        return {}
    if not windows:
        key = "attention.sliding_window"
        raise found.refusal(key, "a number of positions", repr(found.get(key))[:80])
    size = found.integer("attention.key_length_swa", 4096)
    for key in ("attention.value_length_swa", "rope.dimension_count_swa"):
        if found.integer(key, 4096, size) != size:
            raise found.refusal(key, f"the head size {size} of layers with a window", str(found.get(key)), _TWO_SIZES)
    if size % 2:
        raise found.refusal("attention.key_length_swa", "an even number", str(size))
    full = [layer for layer, window in enumerate(windows) if not window]
    shared = bool(full) and not any(f"blk.{layer}.attn_v.weight" in tensors for layer in full)
    return {"window_head_dim": size, "keys_as_values": shared, "fused_experts": any(map(_is_fused, tensors))}


def _is_fused(name: str) -> bool:
    return name.endswith(_FUSED)


def beside_experts_shapes(count: int, size: int, hidden: int, *, is_fused: bool) -> dict[str, tuple[int, ...]]:
    """Return name and shape of what a layer holds for experts beside its dense feed-forward.

    Gate and up of the experts are one tensor, as transformers has them, or two.
    """
    norms = ("pre_ffw_norm_2.weight", "post_ffw_norm_1.weight", "post_ffw_norm_2.weight")
    gate_up = {_FUSED: (count, 2 * size, hidden)} if is_fused else dict.fromkeys(_APART, (count, size, hidden))
    return {
        "ffn_gate_inp.weight": (count, hidden),
        "ffn_gate_inp.scale": (hidden,),
        **dict.fromkeys(norms, (hidden,)),
        **gate_up,
        "ffn_down_exps.weight": (count, hidden, size),
        "ffn_down_exps.scale": (count,),
    }


def own_scales(architecture: str) -> tuple[str, ...]:
    """Return the ends of names of vectors that are called scales and belong to no NVFP4 matrix."""
    return ("ffn_gate_inp.scale", "ffn_down_exps.scale") if FAMILIES[architecture].dense_beside_experts else ()
