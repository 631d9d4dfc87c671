"""Files that we write, read by llama.cpp: run by ``nox -s parity``, which builds that engine; skipped without it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from teachers import load_quietly

from q4kd.trainer.demo import data_path, golden_path, student_path, teacher_path
from q4kd.trainer.formats.gguf.writer import write_gguf_from_folder
from q4kd.trainer.student.model import load_student, load_tokenizer

llama_cpp = pytest.importorskip("llama_cpp", reason="the independent engine; nox -s parity builds it")

from llamacpp_engine import their_logits  # noqa: E402


def our_logits(path: Path, ids: np.ndarray) -> np.ndarray:
    teacher = load_quietly(path, dtype="float32")
    return teacher.logits(torch.from_numpy(ids).long()[None])[0].double().numpy()


def compare(path: Path, ids: np.ndarray) -> tuple[float, float]:
    """Return the worst cosine and the worst relative error of llama.cpp against ours over positions."""
    ours, theirs = our_logits(path, ids), their_logits(path, ids)
    norms = np.linalg.norm(ours, axis=1)
    cosine = (ours * theirs).sum(1) / norms / np.linalg.norm(theirs, axis=1)
    return float(cosine.min()), float((np.linalg.norm(ours - theirs, axis=1) / norms).max())


def golden_ids() -> np.ndarray:
    with np.load(golden_path(), allow_pickle=False) as arrays:
        return arrays["ids"]


def test_the_demo_teacher_means_the_same_to_llama_cpp() -> None:
    cosine, error = compare(teacher_path(), golden_ids())
    print(f"demo teacher, Q4_K_M by our quantiser: worst cosine {cosine:.6f}, llama.cpp off by {error:.2%}")
    assert cosine >= 0.999


@pytest.mark.parametrize(("recipe", "bound"), [("f32", 0.999999), ("f16", 0.9999)])
def test_a_written_student_means_the_same_to_llama_cpp(tmp_path: Path, recipe: str, bound: float) -> None:
    load_student(student_path(), seed=3).save_pretrained(tmp_path / "model")
    load_tokenizer(student_path()).save_pretrained(tmp_path / "model")
    write_gguf_from_folder(tmp_path / "s.gguf", model=tmp_path / "model", recipe=recipe, name="student")
    cosine, error = compare(tmp_path / "s.gguf", golden_ids())
    print(f"fresh student, {recipe}: worst cosine {cosine:.7f}, llama.cpp off by {error:.2e}")
    assert cosine >= bound


def test_the_tokenizer_in_the_file_is_the_students() -> None:
    engine = llama_cpp.Llama(str(teacher_path()), vocab_only=True, verbose=False)
    tokenizer = load_tokenizer(student_path())
    for name in ("json/decoder.py", "textwrap.py", "ipaddress.py"):
        text = (data_path() / name).read_text()
        ours = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        assert engine.tokenize(text.encode(), add_bos=False, special=False) == ours
