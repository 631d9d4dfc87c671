"""Predicts from dimensions alone what a forward pass on the CPU will allocate beside the file's own pages.

Activations are counted where they peak: in attention, in the feed-forward or with the logits, whichever is largest.
Buffers live as long as ``forward.py`` and ``attention.py`` keep them; ``gemm.py`` says what the allocator keeps.

Letters: B sequences, T positions, M = B * T tokens, H hidden size, F feed-forward size, Q and C outputs of the query
and of the key projection, V vocabulary, E experts.
"""

from dataclasses import dataclass

from q4kd.trainer.formats.architecture import TeacherConfig
from q4kd.trainer.formats.recurrence import Recurrence

_FLOAT = 4
# ``weights.py``, ``attention.py``, ``gemm.py``, ``delta_rule.py`` and ``blocks/decode.py`` have these constants too,
# but need torch; a test holds them equal.
SCRATCH_BYTES = 16 << 20
TILE_ROWS = 1024
SCORE_BLOCK = 128
SCORE_FLOATS = 4 << 20
DECODED_AT_ONCE = 4096 * 256
LARGEST_KEPT = 31 << 20
CHUNK = 64
# A decoder's temporaries take so many bytes per weight: nibbles copied, split, joined, and one float32 buffer.
_DECODER_BYTES = 8
# oneDNN blocks a copy of the weights that it multiplies by.
_PRODUCT_COPIES = 1


@dataclass(frozen=True)
class Footprint:
    """Predicted bytes of one pass."""

    activations: int  # largest sum of live activations, logits included when asked for
    scratch: int  # the weight tile, the decoders' temporaries and the product's own buffer

    @property
    def total(self) -> int:
        """Sum of both."""
        return self.activations + self.scratch


def predict_footprint(
    config: TeacherConfig, batch: int, length: int, *, dtype: str = "float32", logits: bool = True
) -> Footprint:
    """Predict the memory of ``Teacher.logits``, or of ``Teacher.hidden`` without ``logits``, on the CPU.

    Args:
        config: the teacher's dimensions.
        batch: B.
        length: T.
        dtype: dtype of the matrix products, float32 or bfloat16.
        logits: whether logits of every position are made at once, as the ``logits`` command does.
    """
    tokens = batch * length
    size = 2 if dtype == "bfloat16" else _FLOAT
    stream = _FLOAT * tokens * config.hidden_size
    normed = size * tokens * config.hidden_size
    queries = _FLOAT * tokens * config.q_size
    keys = _FLOAT * tokens * config.kv_size
    part = size * tokens * TILE_ROWS
    groups = config.num_heads // min((config.num_kv_heads, *config.layer_kv_heads))
    block = min(SCORE_BLOCK, max(1, SCORE_FLOATS // (groups * length)), length)
    scores = _FLOAT * length * (groups * block + max(config.head_dim, config.window_head_dim))
    # One product of Q, K and V lives until the last of them is copied; halves of one of gate and up are copied too, and
    # GELU is not computed in place; heads of values that are normalised are copied once more.
    fused = queries + 2 * keys if config.family.fused_qkv else keys if config.family.value_norm else 0
    # A bias is added to the output of attention in float32.
    biased = stream if config.family.all_biases and size != _FLOAT else 0
    # Gates lie behind queries until what heads mix is multiplied by their sigmoid, another copy.
    gates = 2 * queries if config.family.gated_attention else 0
    attention = stream + normed + 3 * queries + 2 * keys + fused + gates + scores + biased
    if config.recurrence is not None:
        attention = max(attention, stream + normed + _recurrent_bytes(config.recurrence, tokens, length))
    widths = 2 + 2 * config.family.fused_gate_up + (config.family.activation != "silu")
    feed_forward = stream + normed + widths * size * tokens * config.ffn_size + part
    parts = [attention, feed_forward]
    if config.num_experts:
        mixture = stream + _mixture_bytes(config, tokens, size)
        # A dense part, in the compute dtype and normalised, waits for the experts beside it.
        is_beside = config.family.dense_beside_experts
        parts = [attention, feed_forward, mixture + normed + stream] if is_beside else [attention, mixture]
    # The allocator keeps what the layers have freed while the logits are made, and takes the part from it. Blocks of
    # attention and of the feed-forward differ in size, so that the holes of the one do not all serve the other.
    kept = min(len(parts) * LARGEST_KEPT, sum(parts) - len(parts) * (stream + normed))
    head = stream + normed + _FLOAT * tokens * config.vocab_size + max(part, kept) if logits else 0
    tables = 3 * _FLOAT * length * config.head_dim * (2 if config.window_rope_base else 1)
    if config.rope_scaling is not None and config.rope_scaling.kind == "long":
        tables *= batch  # documents differ in their divisors
    ffn_size = config.expert_ffn_size or config.ffn_size
    if config.family.dense_beside_experts:
        ffn_size = max(ffn_size, config.ffn_size)
    tile = max(SCRATCH_BYTES, _FLOAT * max(config.hidden_size, ffn_size, config.q_size))
    scratch = tile * (1 + _PRODUCT_COPIES) + _DECODER_BYTES * DECODED_AT_ONCE
    return Footprint(max(*parts, head) + tables, scratch)


def _mixture_bytes(config: TeacherConfig, tokens: int, size: int) -> int:
    """Return the bytes of a layer of experts beside the residual stream, where all tokens are given to one of them.

    Such an expert reads a copy of all states and has their gates, products and outputs; that the tokens of a text
    divide among the experts is likely, and no bound.
    """
    states, chosen = tokens * config.hidden_size, tokens * config.experts_per_token
    # Normalised states in float32 and in the compute dtype, the sum, and what one expert reads and returns.
    held = states * (_FLOAT + (size if size != _FLOAT else 0) + _FLOAT)
    widths = 2 + 2 * config.fused_experts + (config.family.activation == "gelu_tanh")
    expert = states * (2 * size + (_FLOAT if size != _FLOAT else 0)) + widths * size * tokens * config.expert_ffn_size
    if config.family.activation == "clamped_swiglu":  # which takes float32 copies, and the gate's share of itself
        expert += tokens * config.expert_ffn_size * (_FLOAT if size == _FLOAT else 3 * _FLOAT + size)
    # Shares of all experts while they are chosen; then numbers, weights and order of those that are.
    routing = max(2 * _FLOAT * tokens * config.num_experts, chosen * (8 + _FLOAT + 8) + 2 * 8 * tokens)
    # One expert's activations are gone when the shared one begins.
    shared = states * (2 * size + _FLOAT) + 2 * size * tokens * config.shared_ffn_size if config.shared_ffn_size else 0
    return held + max(routing, shared, expert + chosen * (8 + _FLOAT + 8))


def _recurrent_bytes(sizes: Recurrence, tokens: int, length: int) -> int:
    """Return the bytes of a gated delta net beside the residual stream and the normalised states.

    Queries, keys and values before the convolution, the gates, and what heads read live for all tokens; the rest of one
    sequence at a time: convolved channels with a copy of them, then these, queries and keys of unit length with a copy
    of one, and what heads read. The allocator keeps what one sequence freed, whose blocks do not all serve the next.
    """
    held = _FLOAT * tokens * (sizes.conv_size + 2 * sizes.value_size + 3 * sizes.value_heads)
    row = _FLOAT * length * (sizes.conv_size + max(sizes.conv_size, 3 * sizes.key_size + sizes.value_size))
    places = min(CHUNK, length)
    # Products of keys with keys and queries with keys, decays and their differences in float64; then values, keys and
    # queries of a chunk, both sides of its system, and a state with the next one.
    chunk = sizes.value_heads * _FLOAT * (places * (6 * places + 10 * sizes.head_dim) + 2 * sizes.head_dim**2)
    return held + row + chunk + 2 * LARGEST_KEPT
