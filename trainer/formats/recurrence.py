"""The layers of a hybrid decoder that keep a state in place of keys and values: gated delta nets (Qwen3.5, Qwen3.6).

A file states their sizes under the names that Mamba's have. Value heads lie tiled: head v reads key head ``v % K``,
where transformers' models have those of one key head beside each other (llama.cpp's ``conversion/qwen.py`` reorders
them). Behind the last layer a file may hold blocks that predict further tokens, which no forward pass runs.

Letters in shapes: H hidden size, K key heads, V value heads, D head size, W taps of the convolution.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from q4kd.trainer.formats.families import Family
from q4kd.trainer.formats.values import Values

_MAX_HEADS, _MAX_HEAD_DIM, _MAX_TAPS = 4096, 1024, 16
_REMEDY = "use another teacher; value heads of another size than key heads are not implemented"
_UNROTATED = "use another teacher: pairs that no position of a text turns would make it silently wrong"


@dataclass(frozen=True, kw_only=True)
class Recurrence:
    """The sizes of a model's gated delta nets.

    Attributes:
        key_heads: K; queries have as many.
        value_heads: V, a multiple of K; each has a state ``[D, D]``.
        head_dim: D, of keys and values alike.
        taps: W, how many positions the convolution before a layer's heads reads, its own among them.
        layers: for each layer, whether it is recurrent; the others attend.
    """

    key_heads: int
    value_heads: int
    head_dim: int
    taps: int
    layers: tuple[bool, ...]

    @property
    def key_size(self) -> int:
        """Elements of a token's keys, ``K * D``."""
        return self.key_heads * self.head_dim

    @property
    def value_size(self) -> int:
        """Elements of a token's values, ``V * D``."""
        return self.value_heads * self.head_dim

    @property
    def conv_size(self) -> int:
        """Channels of the convolution: queries, keys and values."""
        return 2 * self.key_size + self.value_size


def read_layers(found: Values, family: Family) -> tuple[int, int]:
    """Return how many layers a model runs, and how many blocks behind them predict further tokens."""
    blocks = found.integer("block_count", 1024)
    if not family.has_recurrence:
        return blocks, 0
    predictors = found.integer("nextn_predict_layers", blocks - 1, 0, low=0)
    return blocks - predictors, predictors


def read_recurrence(found: Values, family: Family, layers: int, predictors: int) -> Recurrence | None:
    """Return the sizes of a model's gated delta nets; None for a family without them.

    Raises:
        InputError: for a value that is missing, of another type, or out of bounds.
    """
    if not family.has_recurrence:
        return None
    head_dim = found.integer("ssm.state_size", _MAX_HEAD_DIM)
    value_heads = found.integer("ssm.time_step_rank", _MAX_HEADS)
    key_heads = found.integer("ssm.group_count", value_heads)
    if value_heads % key_heads:
        raise found.refusal("ssm.time_step_rank", f"a multiple of the {key_heads} key heads", str(value_heads))
    inner = found.integer("ssm.inner_size", _MAX_HEADS * _MAX_HEAD_DIM)
    if inner != value_heads * head_dim:
        expected = f"{value_heads} value heads of {head_dim} elements, {value_heads * head_dim}"
        raise found.refusal("ssm.inner_size", expected, str(inner), _REMEDY)
    return Recurrence(
        key_heads=key_heads,
        value_heads=value_heads,
        head_dim=head_dim,
        taps=found.integer("ssm.conv_kernel", _MAX_TAPS),
        layers=_read_pattern(found, layers, predictors),
    )


def _read_pattern(found: Values, layers: int, predictors: int) -> tuple[bool, ...]:
    """Return which layers are recurrent: those that the file lists, or all but one of so many."""
    key = "attention.recurrent_layers"
    stated = found.get(key)
    if stated is None:
        interval = found.integer("full_attention_interval", 1024, 4)
        return tuple((layer + 1) % interval != 0 for layer in range(layers))
    listed = list(stated)[: layers + predictors + 1] if _is_listed(stated) else []
    if len(listed) != layers + predictors or not all(isinstance(is_one, bool) for is_one in listed):
        raise found.refusal(key, f"{layers + predictors} booleans", repr(stated)[:80])
    return tuple(listed[:layers])


def _is_listed(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def check_sections(found: Values, family: Family, rotary_dim: int) -> None:
    """Check that the sections in which pairs of a head follow time, height and width cover all pairs.

    A text has one position for all three, so that which is whose does not matter; a pair in none of them would follow
    a fourth, which is 0 for a text (llama.cpp's ``ggml_rope_multi``, interleaved).

    Raises:
        InputError: for sections that are not four whole numbers, or leave a pair out.
    """
    key = "rope.dimension_sections"
    stated = found.get(key)
    if not family.has_recurrence or stated is None:
        return
    sections = list(stated)[:5] if _is_listed(stated) else []
    are_numbers = all(isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in sections)
    if len(sections) != 4 or not are_numbers:
        raise found.refusal(key, "four whole numbers", repr(stated)[:80])
    # Pairs follow time, height and width in turn, each as long as its section lasts.
    left_out = [pair for pair in range(rotary_dim // 2) if pair // 3 >= sections[pair % 3]]
    if left_out or sum(sections) != rotary_dim // 2:
        expected = f"sections that cover the {rotary_dim // 2} pairs which are rotated"
        raise found.refusal(key, expected, str(sections), _UNROTATED)


def recurrent_shapes(recurrence: Recurrence, hidden: int) -> dict[str, tuple[int, ...]]:
    """Return name and shape of the tensors that a recurrent layer has in place of an attention's."""
    heads = recurrence.value_heads
    return {
        "attn_qkv.weight": (recurrence.conv_size, hidden),
        "attn_gate.weight": (recurrence.value_size, hidden),
        "ssm_alpha.weight": (heads, hidden),
        "ssm_beta.weight": (heads, hidden),
        "ssm_conv1d.weight": (recurrence.conv_size, recurrence.taps),
        "ssm_dt.bias": (heads,),
        "ssm_a": (heads,),
        "ssm_norm.weight": (recurrence.head_dim,),
        "ssm_out.weight": (hidden, recurrence.value_size),
    }
