"""Replays short passes as CUDA graphs, one per shape: by themselves they are bound by the host's launches.

A graph is captured the second time a shape is seen, so a shape that comes once costs nothing; once all places are
taken, a shape must have come more than twice as often as the one it replaces, so that many shapes in turn are not
captured again and again. A replay reads weights, scratch and tables where they were at capture: all of them live as
long as the forward pass object.
"""

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_GRAPHS = 2


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    ids: Tensor  # int64 [B, T], read by the replay
    out: Tensor  # written by it


class PassGraphs:
    """Runs a pass, by replaying it where its shape has been seen before.

    Args:
        run: pass from int64 ids ``[B, T]`` on the device to its output; it must launch the same work for equal shapes
            and read nothing back. Each graph keeps the activations of its pass allocated; ``MAX_GRAPHS`` are kept.
    """

    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        self._run = run
        self._uses: Counter[tuple[int, ...]] = Counter()
        self._graphs: dict[tuple[int, ...], _Captured] = {}
        self._works = True

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """Shapes that have a graph, in the order of their capture."""
        return list(self._graphs)

    def __call__(self, ids_BT: Tensor) -> Tensor:
        """Return the pass's output as a tensor of its own, which no later replay changes."""
        shape = tuple(ids_BT.shape)
        self._uses[shape] += 1
        if shape not in self._graphs and not (self._is_worth(shape) and self._capture(ids_BT)):
            return self._run(ids_BT)
        captured = self._graphs[shape]
        captured.ids.copy_(ids_BT)
        captured.graph.replay()
        return captured.out.clone()

    def _is_worth(self, shape: tuple[int, ...]) -> bool:
        if not self._works or self._uses[shape] < 2:
            return False
        if len(self._graphs) < MAX_GRAPHS:
            return True
        return self._uses[shape] > 2 * min(self._uses[held] for held in self._graphs)

    def _capture(self, ids_BT: Tensor) -> bool:
        if len(self._graphs) >= MAX_GRAPHS:
            del self._graphs[min(self._graphs, key=self._uses.__getitem__)]
        static, graph = ids_BT.clone(), torch.cuda.CUDAGraph()
        try:
            # Other threads, such as a data loader's pinning thread, may go on calling CUDA meanwhile.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                out = self._run(static)
        except RuntimeError as error:
            self._works = False
            warnings.warn(f"passes are not captured as CUDA graphs: {error}", RuntimeWarning, stacklevel=2)
            return False
        self._graphs[tuple(ids_BT.shape)] = _Captured(graph, static, out)
        return True
