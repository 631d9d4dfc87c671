"""When a pass is captured and when it is replayed, with a stand-in for CUDA's graphs."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import q4kd.trainer.teacher.cuda.graphs as graphs_module
from q4kd.trainer.teacher.cuda.graphs import PassGraphs


class Device:
    """Counts passes that are launched, captured and replayed; a replay runs on the captured input and output."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.capturing = False
        self.fails = False

    def run(self, ids: torch.Tensor) -> torch.Tensor:
        if self.capturing and self.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.log.append(f"{'capture' if self.capturing else 'launch'} {ids.shape[1]}")
        return ids * 2

    @contextmanager
    def graph(self, _graph: object, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    passes: list[PassGraphs] = []

    class Graph:
        def replay(self) -> None:
            captured = next(entry for entry in passes[0]._graphs.values() if entry.graph is self)
            device.log.append(f"replay {captured.ids.shape[1]}")
            captured.out.copy_(captured.ids * 2)

    monkeypatch.setattr(graphs_module.torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(graphs_module.torch.cuda, "graph", device.graph)
    device.passes = PassGraphs(device.run)
    passes.append(device.passes)
    return device


def use(device: Device, *lengths: int) -> None:
    for place, length in enumerate(lengths):
        ids = torch.arange(length)[None] + place
        assert torch.equal(device.passes(ids), ids * 2)


def test_the_second_pass_of_a_shape_is_captured_and_the_rest_replayed(device: Device) -> None:
    use(device, 5, 5, 5)
    assert device.log == ["launch 5", "capture 5", "replay 5", "replay 5"]


def test_an_output_is_not_written_by_a_later_replay(device: Device) -> None:
    use(device, 5, 5)
    first = device.passes(torch.ones(1, 5, dtype=torch.long))
    device.passes(torch.zeros(1, 5, dtype=torch.long))
    assert torch.equal(first, torch.full((1, 5), 2))


def test_many_shapes_in_turn_are_not_captured_again_and_again(device: Device) -> None:
    use(device, *[3, 4, 5, 6] * 50)
    assert sum(line.startswith("capture") for line in device.log) == 2
    assert device.passes.shapes == [(1, 3), (1, 4)]


def test_a_shape_used_far_more_often_takes_the_place_of_another(device: Device) -> None:
    use(device, 3, 3, 3, 4, 4, *[5] * 5)
    assert device.passes.shapes == [(1, 3), (1, 5)]


def test_a_capture_that_fails_is_said_once_and_passes_go_on(device: Device) -> None:
    device.fails = True
    with pytest.warns(RuntimeWarning, match="not captured"):
        use(device, 5, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        use(device, 5, 5)
    assert device.log == ["launch 5"] * 4
