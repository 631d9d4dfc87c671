"""A run knows its teacher and its student by what is in their files."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from q4kd.trainer.demo import student_path, teacher_path
from q4kd.trainer.errors import InputError
from q4kd.trainer.files import sha256_file
from q4kd.trainer.formats.open import open_model
from q4kd.trainer.train.run.identity import InputDigests, digest_student, explain_other_input


def _change_config(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05'))


def _add_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"weights")


def _change_tokenizer(folder: Path) -> None:
    (folder / "tokenizer_config.json").write_text("{}")


def _add_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages }}")


@pytest.mark.parametrize("change", [_change_config, _add_weights, _change_tokenizer, _add_template])
def test_what_a_run_reads_of_a_student_is_bound(tmp_path: Path, change: Callable[[Path], None]) -> None:
    folder = shutil.copytree(student_path(), tmp_path / "student")
    before = InputDigests(None, folder).as_settings()
    (folder / "README.md").write_text("not read")
    assert InputDigests(None, folder).as_settings() == before == {"student_sha256": digest_student(folder)}
    change(folder)
    assert InputDigests(None, folder).as_settings() != before


def test_the_refusal_names_both_digests_and_the_remedy() -> None:
    new = InputDigests(open_model(teacher_path()), student_path()).as_settings()
    assert new["teacher_sha256"] == sha256_file(teacher_path())
    assert explain_other_input(Path("c"), {**new, "lr": 1.0}, new) is None
    error = explain_other_input(Path("c"), {**new, "teacher_sha256": "abc"}, new)
    assert error is not None
    said = f"the teacher of that run, sha256 abc, got another, sha256 {new['teacher_sha256']}; put that teacher back"
    assert said in str(error)


def test_a_teacher_that_is_replaced_is_the_one_that_was_opened(tmp_path: Path) -> None:
    path = tmp_path / "t.gguf"
    shutil.copyfile(teacher_path(), path)
    model = open_model(path)
    (tmp_path / "other").write_bytes(b"another file")
    (tmp_path / "other").replace(path)
    assert InputDigests(model, student_path()).as_settings()["teacher_sha256"] == sha256_file(teacher_path())


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copyfile(teacher_path(), tmp_path / "t.gguf")
    model = open_model(tmp_path / "t.gguf")

    def failing(*_arguments: object) -> str:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("q4kd.trainer.mapped.file_digest", failing)
    with pytest.raises(InputError, match=r"t.gguf: expected a readable file, got Input/output error"):
        InputDigests(model, student_path()).as_settings()
