"""The parts of the CUDA bench that need no GPU: the dense twin, the floor, the table."""

import dataclasses
import json

import pytest
import torch

pytest.importorskip("transformers")

from reference_kernels import ReferenceKernels, widening_multiply

import q4kd.trainer.teacher.cuda.forward as forward_module
import q4kd.trainer.teacher.cuda.parts as parts_module
from q4kd.trainer.bench.interleave import Series, Shape, compare
from q4kd.trainer.bench.load import load_table, run_arm
from q4kd.trainer.bench.synthetic_7b import make_tensors, qwen2_5_7b
from q4kd.trainer.bench.teacher.cuda import CudaArm, floor_seconds, twin_arm
from q4kd.trainer.bench.teacher.cuda_errors import compare_errors, probe_errors, probe_logits, row_errors
from q4kd.trainer.bench.teacher.cuda_table import speed_line, speed_row, table
from q4kd.trainer.bench.teacher.dense_twin import build_twin
from q4kd.trainer.teacher.cuda.forward import CudaForward

TINY = dataclasses.replace(
    qwen2_5_7b(2), hidden_size=256, ffn_size=512, num_heads=2, num_kv_heads=1, vocab_size=300, context_length=64
)
IDS = torch.arange(2 * 12).view(2, 12) * 11


@pytest.fixture(autouse=True)
def product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward_module, "multiply", widening_multiply)
    monkeypatch.setattr(parts_module, "multiply", widening_multiply)


def packed(dtype: torch.dtype) -> CudaArm:
    tensors = make_tensors(TINY, torch.device("cpu"))
    forward = CudaForward(TINY, tensors, "q4k", ReferenceKernels(), dtype=dtype, overlap=False, graphs=False)
    return CudaArm("q4k", forward.hidden, forward.head_logits)


@pytest.mark.parametrize("tile", [1000, 1 << 24])
def test_the_dense_twin_is_the_same_model(monkeypatch: pytest.MonkeyPatch, tile: int) -> None:
    monkeypatch.setattr("q4kd.trainer.bench.teacher.dense_twin._TILE_WEIGHTS", tile)
    twin = build_twin(TINY, make_tensors(TINY, torch.device("cpu")), torch.float32)
    with torch.no_grad():
        exact = twin(input_ids=IDS, use_cache=False).logits.flatten(0, 1)
    assert row_errors(packed(torch.float32).logits(IDS), exact).max() <= 1e-5
    assert exact.std() > 0.1


def test_errors_are_root_mean_squares_of_each_position() -> None:
    twin = build_twin(TINY, make_tensors(TINY, torch.device("cpu")), torch.bfloat16)
    ids, columns = torch.randint(0, 300, (24, 12), generator=torch.Generator().manual_seed(3)), torch.arange(0, 300, 3)
    exact = list(probe_logits(packed(torch.float32).logits, ids, columns))
    arms = {"q4k": packed(torch.bfloat16), "dense": twin_arm("dense", twin)}
    errors = {name: probe_errors(arm.logits, ids, columns, exact) for name, arm in arms.items()}
    found = compare_errors(errors, "dense")
    assert found["dense"]["worst_ratio"] == found["dense"]["median_ratio"] == 1.0
    assert 1e-4 < found["q4k"]["rms"] < 2e-2
    assert found["q4k"]["median_ratio"] < 1
    assert found["q4k"]["worst_ratio"] <= 1.2
    assert len(found["q4k"]["rms_by_position"]) == 12
    planted = {"a": torch.tensor([[1.0, 3.0], [7.0, 3.0]]), "b": torch.tensor([[5.0, 1.0], [5.0, 1.0]])}
    assert compare_errors(planted, "b")["a"]["rms_by_position"] == [5.0, 3.0]
    assert compare_errors(planted, "b")["a"]["worst_ratio"] == 3.0


def test_the_load_table_says_what_was_held() -> None:
    held = dict.fromkeys(("nvml_process", "torch_reserved"), 5_000_000_000)
    stages = ("context_bytes", "loaded_bytes", "after_hidden_bytes", "after_head_bytes")
    sizes = (
        "resident_weight_bytes",
        "scratch_bytes",
        "head_scratch_bytes",
        "torch_peak_in_hidden",
        "torch_peak_in_head",
    )
    answer = {"arm": "q4k", "seconds": 0.5, "tokens": 8192, "resident_ratio": 1.0}
    answer |= dict.fromkeys(stages, held) | dict.fromkeys(sizes, 1_000_000)
    dense = {"arm": "transformers", "seconds": 55.0, "loaded_bytes": held | {"nvml_process": None}}
    text = "\n".join(load_table({"file_bytes": 10, "q4k": [answer, answer | {"seconds": 0.7}], "transformers": dense}))
    for words in ("0.60 s (median of 0.50, 0.70)", "after load", "5,000 MB by NVML", "55.00 s, then unknown"):
        assert words in text


def test_the_floor_is_that_of_the_roofline() -> None:
    # 6.525e9 weights outside the head, 0.545e9 in it: 115.8 TFLOP for 8,192 tokens, and 0.42 of causal attention.
    seconds = floor_seconds(qwen2_5_7b(), Shape(32, 256), with_head=True, rate=1e12, bandwidth=1e15)
    assert seconds == pytest.approx(115.8 + 0.42, abs=0.1)
    few = floor_seconds(qwen2_5_7b(), Shape(1, 1), with_head=False, rate=1e15, bandwidth=1e9)
    assert few == pytest.approx(3.92, abs=0.02)


def test_lines_say_which_arm_is_faster() -> None:
    series = [
        Series("q4k", Shape(1, 256), (0.2, 0.2, 0.4)),
        Series("dense-transformers", Shape(1, 256), (0.1, 0.1, 0.1)),
    ]
    ratio = compare(series)[0]
    row = speed_row(series[1], ratio, floor=0.05, with_head=True)
    assert "q4k runs at 0.500 of it" in speed_line(row)
    assert row["floor_fraction"] == 0.5
    json.dumps(row, allow_nan=False)
    found = {
        "environment": {"device": "none", "torch": "0"},
        "speed": [row],
        "errors": {"q4k": {"rms": 1e-3, "worst_single_ratio": 1.5, "worst_ratio": 1.1, "median_ratio": 0.9}},
        "utilisation": {"sm_percent": None, "device_percent": [99]},
        "host_copies": [{"kind": "Memcpy DtoH (Device -> Pinned)", "bytes": 8}],
        "bnb-nf4": "not run",
    }
    assert "1 to the host (8 bytes)" in "\n".join(table(found))


def test_a_load_that_fails_or_takes_too_long_is_said(tmp_path) -> None:
    failed = run_arm(tmp_path / "none.gguf", "q4k", 60.0)
    assert failed["failed"].startswith("exit 1")
    late = run_arm(tmp_path / "none.gguf", "q4k", 0.01)
    assert late == {"failed": "not ready after 0 s"}
    assert any("not ready" in line for line in load_table({"file_bytes": 1, "q4k": [failed], "transformers": late}))
