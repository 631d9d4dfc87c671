"""Large mixtures: the file that is written at the disk's speed, and that both sizes are one run."""

import dataclasses
import resource
from pathlib import Path

import numpy as np
import pytest

from q4kd.harness.inputs.models.large_mixture import write_large_mixture
from q4kd.harness.inputs.synthetic_students import read_tokens
from q4kd.harness.runs.experiment import Inputs, get_experiment
from q4kd.harness.subjects.mixtures import large
from q4kd.trainer.bench.synthetic_30b_a3b import qwen3_30b_a3b, tensor_types
from q4kd.trainer.demo import teacher_path
from q4kd.trainer.formats.open import open_model

TINY = dataclasses.replace(
    qwen3_30b_a3b(8),
    hidden_size=256,
    num_heads=2,
    num_kv_heads=1,
    vocab_size=300,
    context_length=64,
    num_experts=6,
    experts_per_token=2,
    expert_ffn_size=256,
)


def test_the_file_has_the_models_dimensions_types_and_live_experts(tmp_path: Path) -> None:
    write_large_mixture(tmp_path / "m.gguf", TINY, tokens=["a", "b"], tile_blocks=1009)
    model = open_model(tmp_path / "m.gguf")
    assert dataclasses.replace(model.config, rms_eps=TINY.rms_eps) == TINY  # files hold float32
    assert {name: tensor.type for name, tensor in model.tensors.items()} == tensor_types(TINY)
    assert list(model.tokens[:3]) == ["a", "b", "[PAD 2]"] and len(model.tokens) == 300
    gate = model.tensors["blk.0.ffn_gate_exps.weight"].data.reshape(6, -1)
    assert len({expert.tobytes() for expert in gate}) == 6


def test_logits_of_a_written_mixture_are_alive_and_differ_by_token(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from teachers import load_quietly

    write_large_mixture(tmp_path / "m.gguf", TINY, tile_blocks=1009)
    logits = load_quietly(tmp_path / "m.gguf", dtype="float32").logits(torch.arange(40)[None])[0]
    assert 0.1 < float(logits.std()) < 10
    assert len(set(logits.argmax(-1).tolist())) > 20


def test_memory_is_bounded_by_the_tiles_and_not_by_the_file(tmp_path: Path) -> None:
    config = dataclasses.replace(large.SMALL.teacher, num_layers=6)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    write_large_mixture(tmp_path / "m.gguf", config, tile_blocks=1009)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert (tmp_path / "m.gguf").stat().st_size > 180e6 > 3 * grown


def test_both_sizes_are_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large, "write_large_mixture", lambda path, **_options: path.write_bytes(b"GGUF"))
    inputs = Inputs(tmp_path / "inputs", "h200")
    words = {name: get_experiment(name).arms[0].argv(inputs) for name in ("cuda-distill-30b", "distill-mixture")}
    options = {
        name: [word for word in found if word.startswith("--") or "steps=" in word] for name, found in words.items()
    }
    assert options["cuda-distill-30b"] == [word for word in options["distill-mixture"] if word != "dtype=float32"][:-1]
    assert "steps=20" in words["cuda-distill-30b"] and "cuda" in words["cuda-distill-30b"]
    settings = dict(word.split("=") for word in words["cuda-distill-30b"] if "=" in word)
    assert int(settings["batch_size"]) * int(settings["accumulation"]) * int(settings["seq_len"]) == 8192


def test_the_teachers_tokens_begin_with_the_students(tmp_path: Path) -> None:
    small = dataclasses.replace(large.SMALL, teacher=dataclasses.replace(TINY, vocab_size=2100))
    path = large.mixture_teacher(Inputs(tmp_path, "cpu"), small)
    demo = read_tokens(teacher_path())
    assert read_tokens(path)[: len(demo)] == demo


def test_the_plan_of_the_large_one_is_that_of_its_claim() -> None:
    from q4kd.trainer.formats.blocks.layout import block_format
    from q4kd.trainer.formats.tensor_shapes import expected_shapes

    shapes = expected_shapes(large.LARGE.teacher)
    tensor_bytes = sum(
        int(np.prod(shapes[name][:-1])) * block_format(kind).row_bytes(shapes[name][-1])
        for name, kind in tensor_types(large.LARGE.teacher).items()
    )
    assert tensor_bytes == 18_550_716_416
