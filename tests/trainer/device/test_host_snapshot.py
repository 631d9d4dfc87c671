"""Copies of tensors on the host: of what they were, in memory that serves again, beside a GPU's further work."""

import itertools

import pytest
import torch
from torch import nn

from q4kd.trainer.device import host_snapshot
from q4kd.trainer.device.host_snapshot import HostSnapshot
from q4kd.trainer.train.optimizer import MasterWeightOptimizer

NEEDS_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=NEEDS_GPU)]


@pytest.mark.parametrize("device", DEVICES)
def test_a_copy_is_of_its_moment_and_its_memory_serves_again(device: str) -> None:
    snapshot = HostSnapshot(torch.device(device))
    tensors = {
        "a": torch.randn(5, 3, device=device),
        "b": torch.randn(4, 6, device=device).bfloat16().T,
        "empty": torch.zeros(0, device=device),
        "count": torch.tensor(3.0),
    }
    assert snapshot.is_empty
    kept = {name: tensor.cpu().clone() for name, tensor in tensors.items()}
    snapshot.begin()
    copies = snapshot.copy(tensors.items())
    if (copied := snapshot.copied()) is not None:
        copied.synchronize()
    for tensor in tensors.values():
        tensor.add_(1)
    assert not snapshot.is_empty
    for name, copy in copies.items():
        assert copy.device.type == "cpu" and copy.dtype == kept[name].dtype and torch.equal(copy, kept[name]), name
    places = {name: copy.data_ptr() for name, copy in copies.items()}
    again = snapshot.copy(tensors.items())
    if (copied := snapshot.copied()) is not None:
        copied.synchronize()
    assert {name: copy.data_ptr() for name, copy in again.items()} == places
    assert all(torch.equal(copy, tensors[name].cpu()) for name, copy in again.items())
    # Another shape under a name, as of another optimiser, takes memory of its own.
    assert snapshot.copy([("a", torch.ones(7))])["a"].tolist() == [1] * 7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_an_update_on_the_gpu_waits_for_the_copy_and_not_for_the_host() -> None:
    weights = nn.Parameter(torch.ones(64 << 20, device="cuda"))
    optimizer = MasterWeightOptimizer([("w", weights)], lambda groups: torch.optim.SGD(groups, lr=1.0))
    snapshot = HostSnapshot(weights.device)
    snapshot.reserve([("w", weights)])
    assert snapshot.is_pinned
    for _ in range(3):  # the first of them loads kernels
        expected = float(weights[0])
        snapshot.begin()
        copies = snapshot.copy([("w", weights)])
        optimizer.reader = snapshot.copied()
        reader = optimizer.reader
        weights.grad = torch.ones_like(weights)
        optimizer.step()
        assert optimizer.reader is None
        reader.synchronize()
        assert bool((copies["w"] == expected).all())
    assert float(weights[-1]) == -2


def test_blocks_are_cut_without_overlap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_snapshot, "_BLOCK_BYTES", 1024)
    snapshot = HostSnapshot(torch.device("cpu"))
    monkeypatch.setattr(snapshot, "_is_cuda", True)  # memory is cut as for a GPU, and not pinned
    monkeypatch.setattr(snapshot, "is_pinned", False)
    sizes = [100, 1000, 300, 5000, 0, 64, 500]
    parts = [snapshot._cut(size) for size in sizes]
    assert [len(part) for part in parts] == sizes
    spans = sorted((part.data_ptr(), part.data_ptr() + len(part)) for part in parts if len(part))
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert all(start % 64 == spans[0][0] % 64 for start, _ in spans)
    # 100, 300 and 500 share a block; 5,000 takes the next power of two, whose rest serves 64.
    assert sorted(len(block) for block, _ in snapshot._blocks) == [1024, 1024, 8192]
