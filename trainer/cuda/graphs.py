"""CUDA graphs of whole passes, one per shape: a short pass is bound by the host's launches, a replay launches once.

A graph is captured the second time a shape is seen, so a shape that comes once costs nothing. A replay reads weights,
scratch and tables where they were at capture: all of them live as long as the forward pass object.
"""

import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_GRAPHS = 2
_MAX_SEEN = 64


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    ids: Tensor  # int64 [B, T], read by the replay
    out: Tensor  # written by it


class PassGraphs:
    """Runs a pass, by replaying it where its shape has been seen before.

    Args:
        run: the pass: int64 ids ``[B, T]`` on the device to its output; it must launch the same work for equal shapes
            and read nothing back. Each graph keeps the activations of its pass allocated; ``MAX_GRAPHS`` are kept.
    """

    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        self._run = run
        self._seen: OrderedDict[tuple[int, ...], None] = OrderedDict()
        self._graphs: OrderedDict[tuple[int, ...], _Captured] = OrderedDict()
        self._works = True

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes that have a graph, the last used one at the end."""
        return list(self._graphs)

    def __call__(self, ids_BT: Tensor) -> Tensor:
        """Return the pass's output: a tensor of its own, whatever is replayed later."""
        shape = tuple(ids_BT.shape)
        if shape not in self._graphs and not (self._works and shape in self._seen and self._capture(ids_BT)):
            self._seen[shape] = None
            self._seen.move_to_end(shape)
            if len(self._seen) > _MAX_SEEN:
                self._seen.popitem(last=False)
            return self._run(ids_BT)
        self._graphs.move_to_end(shape)
        captured = self._graphs[shape]
        captured.ids.copy_(ids_BT)
        captured.graph.replay()
        return captured.out.clone()

    def _capture(self, ids_BT: Tensor) -> bool:
        if len(self._graphs) >= MAX_GRAPHS:
            self._graphs.popitem(last=False)
        static, graph = ids_BT.clone(), torch.cuda.CUDAGraph()
        try:
            # Other threads (a data loader's pinning one) may go on calling CUDA meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                out = self._run(static)
        except RuntimeError as error:
            self._works = False
            warnings.warn(f"passes are not captured as CUDA graphs: {error}", RuntimeWarning, stacklevel=2)
            return False
        self._graphs[tuple(ids_BT.shape)] = _Captured(graph, static, out)
        return True
