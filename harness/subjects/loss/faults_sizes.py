"""Faults that only the loss's own chunks and tiles meet: what comes after the first of them is left out."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from q4kd.harness.runs.faults import Call, patch

if TYPE_CHECKING:
    from torch import Tensor

    from q4kd.trainer.loss.sums import LossInputs

_FAST = "q4kd.trainer.loss.fused:run_fast"
_DEVICE = "q4kd.trainer.loss.cuda.fused:run_on_cuda"
_TILES = "q4kd.trainer.loss.tiled:_Walks.tiles"
_WALKS = "q4kd.trainer.loss.tiled:_Walks.__init__"
_TOPK = "q4kd.trainer.loss.topk:topk_kd_loss"
_SUM_ROWS = "q4kd.trainer.loss.divergence:sum_rows"
FIRST_TOKENS, FIRST_COLUMNS, LOW_TOKENS = 1024, 8192, 256


@patch("loss", "fast-first-chunk-only", "mode fast leaves out the tokens after the first 1,024", _FAST)
@patch("loss", "device-first-slice-only", "the loss on a device leaves out the tokens after the first 1,024", _DEVICE)
def _first_chunk_only(original: Call, sums: object, inputs: "LossInputs", *rest: object) -> object:
    return original(sums, dataclasses.replace(inputs, positions=inputs.positions[:FIRST_TOKENS]), *rest)


@patch("loss", "low-first-tile-only", "mode low leaves out the columns after the first 8,192", _TILES)
def _first_tile_only(original: Callable[..., Iterator[Any]], self: object) -> Iterator[Any]:
    return (tile for tile in original(self) if tile.columns.start < FIRST_COLUMNS)


@patch("loss", "low-first-tokens-only", "mode low leaves out the tokens after the first 256", _WALKS)
def _first_tokens_only(original: Call, self: Any, *given: object) -> None:
    original(self, *given)
    self.chunks = [chunk for chunk in self.chunks if chunk.start < LOW_TOKENS]


@patch(
    "loss", "topk-first-chunk-only", "the loss against a cached teacher leaves out what is after 1,024 tokens", _TOPK
)
def _topk_first_chunk_only(
    original: Call, hidden: object, weight: object, labels: "Tensor", **options: object
) -> object:
    from q4kd.trainer.loss.sums import target_positions

    return original(hidden, weight, labels, **options | {"positions_P": target_positions(labels)[:FIRST_TOKENS]})


@patch("loss", "sums-first-part-only", "sums in float64 leave out the rows after the first half million", _SUM_ROWS)
def _first_part_only(original: Call, values: "Tensor", *weights: object) -> object:
    found: Tensor = original(values, *weights)  # type: ignore[assignment]
    found[(1 << 19) // values.shape[1] :] = 0
    return found
