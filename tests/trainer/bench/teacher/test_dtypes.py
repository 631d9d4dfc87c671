"""float32 beside bfloat16: what is timed, and which size follows from it."""

from pathlib import Path
from typing import Any

import pytest
import torch

from q4kd.trainer.bench.synthetic import write_large_teacher
from q4kd.trainer.bench.teacher.dtypes import compare_dtypes, implementation, pays_from, table
from q4kd.trainer.kernels.gemm import multiply


def shape(positions: int, low: float) -> dict[str, Any]:
    return {"positions": positions, "speedup": {"low": low}}


@pytest.mark.parametrize(
    ("speedups", "expected"),
    [
        ({1: 0.8, 32: 1.1, 256: 1.5}, 32),
        ({256: 1.5, 1: 0.8, 32: 1.1}, 32),  # in any order
        ({1: 1.2, 32: 0.9, 256: 1.5}, 256),  # faster once more below the crossover does not count
        ({1: 1.2, 256: 1.0}, None),
    ],
)
def test_it_pays_where_it_is_faster_at_every_larger_size(speedups: dict[int, float], expected: int | None) -> None:
    assert pays_from([shape(positions, low) for positions, low in speedups.items()]) == expected


def test_both_dtypes_are_timed_and_taken_apart(tmp_path: Path) -> None:
    model = tmp_path / "small.gguf"
    write_large_teacher(model, layers=1, hidden=256, ffn=512, vocab=256, kv_heads=2)
    said: list[str] = []
    before = torch.get_num_threads()
    try:
        found = compare_dtypes(model, [1, 3], rounds=2, threads=1, announce=said.append)
    finally:
        torch.set_num_threads(before)
    assert [one["positions"] for one in found["shapes"]] == [1, 3]
    assert len(said) == 4
    for one in found["shapes"]:
        seconds = one["seconds"]
        assert {name: len(values) for name, values in seconds.items()} == {"float32": 2, "bfloat16": 2}
        ratios = [slow / fast for slow, fast in zip(seconds["float32"], seconds["bfloat16"], strict=True)]
        assert min(ratios) <= one["speedup"]["median"] <= max(ratios)
        assert {"float32", "bfloat16"} <= set(one["parts"])
        assert all(one["parts"][name]["decode_ms"] > 0 for name in seconds)
        assert all(part["product_ms"] > 0 for part in one["parts"].values())
    assert any("3 positions: float32" in line for line in table(found))


def test_the_implementation_is_the_one_that_ran(capfd: pytest.CaptureFixture[str]) -> None:
    x, weight = torch.ones(8, 64), torch.ones(32, 64)
    print("before", flush=True)
    found = implementation(lambda: torch.mkldnn_max_pool2d(torch.rand(1, 1, 8, 8).to_mkldnn(), 2))
    assert "jit" in found or "ref" in found
    assert "brg" not in implementation(lambda: None)
    assert isinstance(implementation(lambda: multiply(x, weight)), str)
    # Standard output is given back.
    print("after", flush=True)
    assert capfd.readouterr().out == "before\nafter\n"
