"""The padded teachers and the students that are teachers differ from the demo's in the one way that they state."""

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from q4kd.harness.inputs.synthetic_students import (
    NOISE,
    Twin,
    read_tokens,
    write_padded_teacher,
    write_teacher_as_student,
)
from q4kd.harness.oracles.reference import from_hugging_face, read_gguf, reference_logits
from q4kd.trainer.demo import student_path, teacher_path
from q4kd.trainer.files import read_json
from q4kd.trainer.formats.open import open_model

IDS = np.arange(40, 52)


def test_padding_adds_rows_and_tokens_and_changes_no_other_byte(tmp_path: Path) -> None:
    path = tmp_path / "padded.gguf"
    write_padded_teacher(path, teacher_path(), 2080)
    native, padded = open_model(teacher_path()), open_model(path)
    assert (padded.config.vocab_size, len(padded.tokens)) == (2080, 2080)
    assert list(padded.tokens[:2048]) == list(native.tokens) == read_tokens(teacher_path())
    assert len(set(padded.tokens)) == 2080
    for name, tensor in native.tensors.items():
        assert padded.tensors[name].data[: len(tensor.data)].tobytes() == tensor.data.tobytes()
    exact, longer = (reference_logits(read_gguf(source), IDS) for source in (teacher_path(), path))
    assert longer.shape == (len(IDS), 2080)
    np.testing.assert_array_equal(longer[:, :2048], exact)
    # A padding row weighs as much as a real token: a softmax that takes it in is another.
    np.testing.assert_array_equal(longer[:, 2048:], exact[:, :32])


def test_exchanged_tokens_change_places_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "exchanged.gguf"
    write_padded_teacher(path, teacher_path(), 2048, exchanged=(7, 1000))
    before, after = read_tokens(teacher_path()), read_tokens(path)
    assert (after[7], after[1000]) == (before[1000], before[7])
    assert [index for index in range(2048) if before[index] != after[index]] == [7, 1000]


def test_a_file_without_tokens_gets_those_that_are_given(tmp_path: Path) -> None:
    from q4kd.trainer.bench.synthetic import write_large_teacher

    bare, named = tmp_path / "bare.gguf", tmp_path / "named.gguf"
    write_large_teacher(bare, layers=1, hidden=256, ffn=256, vocab=300, kv_heads=1)
    write_padded_teacher(named, bare, 300, tokens=["a", "b"])
    assert read_tokens(named)[:3] == ["a", "b", "[PAD 2]"]
    assert open_model(named).config.vocab_size == 300
    assert open_model(named).tensor_bytes == open_model(bare).tensor_bytes


@pytest.mark.parametrize(("twin", "close"), [("exact", True), ("permuted", True), ("noisy", False)])
def test_a_student_that_is_its_teacher_computes_the_same(tmp_path: Path, twin: Twin, close: bool) -> None:
    folder = tmp_path / "student"
    write_teacher_as_student(folder, teacher_path(), student_path(), twin)
    tensors, teacher = load_file(folder / "model.safetensors"), read_gguf(teacher_path())
    student = from_hugging_face(tensors, read_json(folder / "config.json"))
    expected, found = reference_logits(teacher, IDS), reference_logits(student, IDS)
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert bool(error < 1e-12) is close
    mine, theirs = tensors["model.embed_tokens.weight"], teacher.weights["token_embd.weight"]
    distance = float(np.linalg.norm(mine - theirs) / np.linalg.norm(theirs))
    assert distance == pytest.approx({"exact": 0, "permuted": 2**0.5, "noisy": NOISE}[twin], abs=0.05)
