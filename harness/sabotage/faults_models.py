"""Faults in reading model files: an architecture half implemented, a check left out, two tensors exchanged."""

import functools
from collections.abc import Callable
from typing import Any

from q4kd.harness.sabotage.faults_quant import replace_decoder
from q4kd.harness.sabotage.registry import declare, replace

_FORWARD = "q4kd.trainer.forward"


def _rope_layout_swapped() -> None:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def rotate(x: Any, cos: Any, sin: Any, layout: str) -> Any:
            return original(x, cos, sin, "interleaved" if layout == "split_halves" else "split_halves")

        return rotate

    replace(f"{_FORWARD}:rotate", make)


def _vector_ignored(part: str) -> None:
    """Load a model as if its optional vectors with ``part`` in their name were not there."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, name: None if part in name else original(self, name)

    replace(f"{_FORWARD}:CpuForward._optional", make)


def _q5_k_high_bits() -> None:
    def make(original: Callable[[Any, Any], None]) -> Callable[[Any, Any], None]:
        def decode(packed: Any, out: Any) -> None:
            low = packed.clone()
            low[:, 16:48] = 0  # qh: the fifth bit of every weight
            original(low, out)

        return decode

    replace_decoder("Q5_K", "decode_q5_k", make)


def _apr_gate_up_swapped() -> None:
    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def rename(*arguments: Any) -> Any:
            name = original(*arguments)
            swap = {"ffn_gate": "ffn_up", "ffn_up": "ffn_gate"}
            parts = str(name).split(".")
            return ".".join(swap.get(part, part) for part in parts)

        return rename

    replace("q4kd.trainer.tensor_names:gguf_name", make)


def _unchecked(target: str, answer: Any = None) -> None:
    replace(target, lambda _original: lambda *_arguments, **_options: answer)


declare(
    "dispatch",
    "rope-layout-swapped",
    "interleaved rotary embedding is applied as split halves, and the other way round",
    _rope_layout_swapped,
    f"{_FORWARD}:rotate",
)
for _name, _part, _title in (
    ("qk-norm-skipped", "_norm.weight", "the norms of query and key heads are left out"),
    ("rope-factors-ignored", "rope_freqs", "the rotary divisors of Llama 3.1 are left out"),
    ("biases-dropped", ".bias", "the biases of Q, K and V are left out"),
):
    declare("dispatch", _name, _title, functools.partial(_vector_ignored, _part), f"{_FORWARD}:CpuForward._optional")
declare(
    "quantisation",
    "q5k-high-bits-dropped",
    "the fifth bit of every Q5_K weight is taken as zero",
    _q5_k_high_bits,
    "q4kd.trainer.quant:decode_q5_k",
    "q4kd.trainer.quant:DECODERS",
)
declare(
    "dispatch",
    "apr-gate-up-swapped",
    "gate and up projections of .apr files are exchanged",
    _apr_gate_up_swapped,
    "q4kd.trainer.tensor_names:gguf_name",
)
for _name, _title, _target in (
    ("tensors-unchecked", "unknown tensors are ignored in silence", "q4kd.trainer.architecture:check_tensors"),
    ("metadata-unchecked", "metadata that change the model are ignored", "q4kd.trainer.gguf_file:_refuse_unsupported"),
    ("scales-unchecked", "NaN scales are loaded like any other", "q4kd.trainer.scales:check_scales"),
    ("footer-unchecked", "the checksum of .apr data is not compared", "q4kd.trainer.apr_header:check_footer"),
):
    declare("dispatch", _name, _title, functools.partial(_unchecked, _target, 0), _target)
