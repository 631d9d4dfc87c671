"""Predicted memory against what a process really takes, measured from its own kernel counters."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from q4kd.trainer.bench.synthetic import write_large_teacher
from q4kd.trainer.bench.synthetic_7b import qwen2_5_7b
from q4kd.trainer.formats.blocks import decode as quant
from q4kd.trainer.formats.open import open_model
from q4kd.trainer.formats.recurrence import Recurrence
from q4kd.trainer.kernels import attention, gemm
from q4kd.trainer.teacher import delta_rule
from q4kd.trainer.teacher.cpu import footprint, weights
from q4kd.trainer.teacher.cpu.footprint import predict_footprint

LENGTH = 512
_CHILD = """
import json, sys
from pathlib import Path
import numpy, torch
from q4kd.trainer.events import EventLog
from q4kd.trainer.device.placement import place_teacher
from q4kd.trainer.teacher.teacher import load_teacher

def status(key):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024

torch.set_num_threads(1)
torch.nn.functional.linear(torch.ones(4, 4), torch.ones(4, 4))
baseline = status("VmRSS")
placement = place_teacher(Path(sys.argv[1]), dtype=sys.argv[2])
teacher = load_teacher(placement, events=EventLog(None), announce=lambda line: None)
logits = teacher.logits(torch.arange(int(sys.argv[3]))[None])
assert torch.isfinite(logits[0, -1]).all()
print(json.dumps({"taken": status("VmHWM") - baseline, "file": teacher.model.file_bytes}))
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("footprint") / "large.gguf"
    write_large_teacher(path, layers=8, hidden=768, ffn=3072, vocab=65536, tied=True)
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_process_takes_the_file_and_what_was_predicted(model: Path, dtype: str) -> None:
    predicted = predict_footprint(open_model(model).config, 1, LENGTH, dtype=dtype)
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, str(model), dtype, str(LENGTH)], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    print(dtype, found, predicted)
    assert found["file"] >= 80e6
    assert found["taken"] <= 1.25 * found["file"] + predicted.total
    # Not vacuous: what is left when the file and the scratch are taken away is at least half of the prediction.
    assert found["taken"] - found["file"] - predicted.scratch >= 0.5 * predicted.activations


_RECURRENT_CHILD = """
import json, sys
from pathlib import Path
import torch
from q4kd.trainer.formats.recurrence import Recurrence
from q4kd.trainer.kernels.gemm import keep_freed_memory
from q4kd.trainer.teacher.cpu.recurrent import DeltaNet, mix

def status(key):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024

class Given:
    def __init__(self, *shape):
        self.made = torch.randn(*shape)

    def product(self, _x):
        return self.made

keep_freed_memory()
torch.set_num_threads(1)
sizes = Recurrence(key_heads=16, value_heads=32, head_dim=128, taps=4, layers=(True,))
batch, length = int(sys.argv[1]), int(sys.argv[2])
tokens = batch * length
torch.linalg.solve_triangular(torch.eye(4), torch.eye(4), upper=False)
gates = Given(tokens, sizes.value_size), Given(tokens, 32), Given(tokens, 32)
net = DeltaNet(sizes, *gates, torch.randn(4, sizes.conv_size), torch.zeros(32), -torch.ones(32), torch.ones(128))
qkv, states, starts = torch.randn(tokens, sizes.conv_size), torch.randn(tokens, 64), torch.zeros(batch, length).long()
starts[:, 100:] = 100
before = status("VmRSS")
assert torch.isfinite(mix(net, qkv, states, batch, starts, 1e-6)).all()
print(json.dumps({"taken": status("VmHWM") - before, "given": sum(gate.made.nbytes for gate in gates) + qkv.nbytes}))
"""


@pytest.mark.parametrize(("batch", "length"), [(1, 1024), (2, 1024)])
def test_a_recurrent_layer_takes_no_more_than_was_predicted(batch: int, length: int) -> None:
    sizes = Recurrence(key_heads=16, value_heads=32, head_dim=128, taps=4, layers=(True,))
    command = [sys.executable, "-c", _RECURRENT_CHILD, str(batch), str(length)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    predicted = footprint._recurrent_bytes(sizes, batch * length, length) - found["given"]
    print(found, predicted)
    assert predicted / 2 <= found["taken"] <= predicted


def test_what_a_family_copies_is_counted() -> None:
    plain = qwen2_5_7b(2)
    as_family = {name: dataclasses.replace(plain, architecture=name) for name in ("qwen2", "gemma2", "phi3")}
    own = {name: predict_footprint(config, 1, 4096, logits=False).activations for name, config in as_family.items()}
    assert own["gemma2"] - own["qwen2"] == 4 * 4096 * plain.ffn_size
    assert own["phi3"] - own["qwen2"] == 2 * 4 * 4096 * plain.ffn_size
    bases = predict_footprint(dataclasses.replace(plain, window_rope_base=1e4), 1, 4096, logits=False).activations
    assert bases - own["qwen2"] == 3 * 4 * 4096 * plain.head_dim


def test_what_experts_with_biases_and_clamps_copy_is_counted() -> None:
    """gpt-oss beside the same sizes as a qwen3moe: a copy of the gates, and in bfloat16 of more in float32."""
    from q4kd.trainer.bench.synthetic_gpt_oss import gpt_oss_20b

    own = dataclasses.replace(gpt_oss_20b(2), expert_ffn_size=11520)  # so that the experts are the peak
    plain = dataclasses.replace(own, architecture="qwen3moe")
    for dtype, copies in (("float32", 4), ("bfloat16", 14)):
        found = [predict_footprint(c, 1, 4096, dtype=dtype, logits=False).activations for c in (own, plain)]
        assert found[0] - found[1] == copies * 4096 * 11520


def test_the_constants_are_those_of_the_code() -> None:
    assert footprint.SCRATCH_BYTES == weights.DEFAULT_SCRATCH_BYTES
    assert footprint.TILE_ROWS == weights._TILE_ROWS
    assert (footprint.SCORE_BLOCK, footprint.SCORE_FLOATS) == (attention._BLOCK, attention._SCORES)
    assert footprint.LARGEST_KEPT == gemm._LARGEST_KEPT
    assert footprint.DECODED_AT_ONCE == quant._WEIGHTS_AT_ONCE
    assert footprint.CHUNK == delta_rule.CHUNK


def test_logits_and_the_feed_forward_grow_with_the_tokens(model: Path) -> None:
    config = open_model(model).config
    one, two = (predict_footprint(config, batch, LENGTH).activations for batch in (1, 2))
    assert one < two <= 2 * one
    assert one > 4 * LENGTH * config.vocab_size
    without = predict_footprint(config, 1, LENGTH, logits=False).activations
    assert 2 * 4 * LENGTH * config.ffn_size < without < one / 2
