"""Faults in reading model files: an architecture half implemented, a check left out, two tensors exchanged."""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from q4kd.harness.runs.faults import Call, declare, patch, replace

if TYPE_CHECKING:
    from torch import Tensor

_FORWARD = "q4kd.trainer.teacher.cpu.forward"
_WEIGHTS = "q4kd.trainer.teacher.cpu.layers:ModelWeights"
_GGUF_NAME = "q4kd.trainer.formats.tensor_names:gguf_name"


@patch(
    "dispatch",
    "rope-layout-swapped",
    "interleaved rotary embedding is applied as split halves, and the other way round",
    f"{_FORWARD}:rotate",
)
def _rope_layout_swapped(original: Call, x: object, cos: object, sin: object, layout: str) -> object:
    return original(x, cos, sin, "interleaved" if layout == "split_halves" else "split_halves")


def _vector_ignored(part: str) -> None:
    """Load a model as if its optional vectors with ``part`` in their name were not there."""

    def make(original: Call) -> Call:
        return lambda self, name: None if part in name else original(self, name)

    replace(f"{_WEIGHTS}._optional", make)


for _name, _part, _title in (
    ("qk-norm-skipped", "_norm.weight", "the norms of query and key heads are left out"),
    ("rope-factors-ignored", "rope_freqs", "the rotary divisors of Llama 3.1 are left out"),
    ("biases-dropped", ".bias", "the biases of Q, K and V are left out"),
):
    declare("dispatch", _name, _title, functools.partial(_vector_ignored, _part), f"{_WEIGHTS}._optional")


@patch(
    "quantisation",
    "q5k-high-bits-dropped",
    "the fifth bit of every Q5_K weight is taken as zero",
    "q4kd.trainer.formats.blocks.decode:decode_q5_k",
    "q4kd.trainer.formats.blocks.decode:DECODERS",
)
def _q5_k_high_bits(original: Call, packed: "Tensor", out: "Tensor") -> None:
    low = packed.clone()
    low[:, 16:48] = 0  # qh: the fifth bit of every weight
    original(low, out)


@patch("dispatch", "apr-gate-up-swapped", "gate and up projections of .apr files are exchanged", _GGUF_NAME)
def _apr_gate_up_swapped(original: Callable[..., str | None], *arguments: object) -> str:
    swap = {"ffn_gate": "ffn_up", "ffn_up": "ffn_gate"}
    return ".".join(swap.get(part, part) for part in str(original(*arguments)).split("."))


@patch(
    "vocabulary",
    "gguf-strings-shifted",
    "the strings of a GGUF's arrays are read one entry late",
    "q4kd.trainer.formats.gguf.metadata:string_ends",
)
def _strings_shifted(original: Callable[..., Any], data: memoryview, start: int, count: int) -> Any:
    return original(data, start, count)[[*range(1, count), count - 1]] if count else original(data, start, count)


@patch(
    "quantisation",
    "gguf-data-shifted",
    "the data of a GGUF's tensors are looked for 8 bytes early, as without the padding behind the header",
    "q4kd.trainer.formats.gguf.header:read_header",
)
def _data_shifted(original: Callable[..., Any], *arguments: object) -> Any:
    header = original(*arguments)
    return dataclasses.replace(header, data_start=header.data_start - 8)


@patch(
    "dispatch",
    "shards-left-out",
    "of a split model only the file that was named is read",
    "q4kd.trainer.formats.gguf.split:open_shards",
)
def _shards_left_out(original: Callable[..., Any], path: object) -> Any:
    return tuple(shard for shard in original(path) if shard.path == path)


@patch(
    "dispatch",
    "first-reason-only",
    "inspect names the first part of a file that is not supported, and no other",
    "q4kd.trainer.formats.gguf.unsupported:find_unsupported",
)
def _first_reason_only(original: Callable[..., list[Any]], path: object) -> list[Any]:
    return original(path)[:1]


def _unchecked(target: str, answer: object) -> None:
    replace(target, lambda _original: lambda *_arguments, **_options: answer)


for _name, _title, _target in (
    ("tensors-unchecked", "unknown tensors are ignored in silence", "q4kd.trainer.formats.tensor_shapes:check_tensors"),
    (
        "metadata-unchecked",
        "metadata that change the model are ignored",
        "q4kd.trainer.formats.gguf.reader:refuse_unsupported",
    ),
    (
        "layout-unchecked",
        "tensors are read wherever the header says, on the bytes of others too",
        "q4kd.trainer.formats.gguf.reader:check_layout",
    ),
    ("scales-unchecked", "NaN scales are loaded like any other", "q4kd.trainer.formats.blocks.scales:check_scales"),
    (
        "split-total-unchecked",
        "shards are taken together however many tensors they hold",
        "q4kd.trainer.formats.gguf.split:check_total",
    ),
    (
        "split-model-unchecked",
        "what a later shard says of its model is not compared with the first one",
        "q4kd.trainer.formats.gguf.split:_check_same_model",
    ),
    ("footer-unchecked", "the checksum of .apr data is not compared", "q4kd.trainer.formats.apr.header:check_footer"),
):
    declare("dispatch", _name, _title, functools.partial(_unchecked, _target, 0), _target)
