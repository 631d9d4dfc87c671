"""A run deletes and replaces what runs made, and refuses whatever else lies under its names."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from run_settings import settings

from q4kd.trainer.demo import student_path, teacher_path
from q4kd.trainer.errors import InputError
from q4kd.trainer.files import write_json
from q4kd.trainer.made import LEDGER, MadeThings
from q4kd.trainer.train.run.folder import check_own_paths


def _tree(root: Path) -> dict[str, bytes | str]:
    return {
        path.relative_to(root).as_posix(): str(path.readlink()) if path.is_symlink() else path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def _model_of_somebody(out: Path) -> None:
    (out / "model").mkdir()
    (out / "model" / "thesis.txt").write_text("years")


def _model_with_one_more(out: Path) -> None:
    made = MadeThings(out)
    made.begin(".model.tmp").mkdir()
    (out / ".model.tmp" / "config.json").write_text("{}")
    made.publish(".model.tmp", "model")
    (out / "model" / "notes").mkdir()
    (out / "model" / "notes" / "thesis.txt").write_text("years")


def _model_changed(out: Path) -> None:
    _model_with_one_more(out)
    shutil.rmtree(out / "model" / "notes")
    (out / "model" / "config.json").write_text('{"tuned": 1}')


def _adapter_link(out: Path) -> None:
    (out / "elsewhere").mkdir()
    (out / "adapter").symlink_to(out / "elsewhere")


def _record_of_somebody(out: Path) -> None:
    write_json(out / "run.json", {"marathon": 42})


def _summary_is_no_json(out: Path) -> None:
    (out / "summary.json").write_text("my summary")


def _record_is_a_link(out: Path) -> None:
    write_json(out / "other.json", {"config": {}, "data_sha256": ""})
    (out / "run.json").symlink_to("other.json")


def _step_with_notes(out: Path) -> None:
    folder = out / "checkpoints" / ".step-000002.tmp"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("years")


def _step_of_somebody(out: Path) -> None:
    (out / "checkpoints" / "step-000002").mkdir(parents=True)
    (out / "checkpoints" / "step-000002" / "model.safetensors").write_bytes(b"x")


def _step_is_a_link(out: Path) -> None:
    (out / "elsewhere").mkdir()
    (out / "checkpoints").mkdir()
    (out / "checkpoints" / "step-000002").symlink_to(out / "elsewhere")


def _draft_of_somebody(out: Path) -> None:
    (out / ".model.tmp").write_text("mine")


def _ledger_is_none(out: Path) -> None:
    write_json(out / LEDGER, {"version": 1, "made": {"model": "x"}})


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (_model_of_somebody, "model: expected nothing, or what q4kd made, got a folder that q4kd did not make"),
        (_model_with_one_more, "thesis.txt: expected nothing, or what q4kd made, got a file that q4kd did not make"),
        (_model_changed, "config.json: expected nothing, or what q4kd made, got a file that was changed since"),
        (_adapter_link, "adapter: expected nothing, or what q4kd made, got a link"),
        (_record_of_somebody, "run.json: expected nothing, or that of an earlier run, got other JSON"),
        (_summary_is_no_json, "summary.json: expected nothing, or that of an earlier run"),
        (_record_is_a_link, "run.json: expected nothing, or that of an earlier run, got a link"),
        (_step_with_notes, "notes.txt: expected nothing but checkpoints of a run"),
        (_step_of_somebody, "step-000002: expected nothing but checkpoints of a run"),
        (_step_is_a_link, "step-000002: expected nothing but checkpoints of a run, got a link"),
        (_draft_of_somebody, ".model.tmp: expected nothing, or what q4kd made, got a file that q4kd did not make"),
        (_ledger_is_none, "expected a ledger of version 1, got a listing that is none"),
    ],
)
def test_what_no_run_made_is_refused_and_left(tmp_path: Path, prepare: Callable[[Path], None], said: str) -> None:
    prepare(tmp_path)
    before = _tree(tmp_path)
    with pytest.raises(InputError) as caught:
        check_own_paths(settings(out=str(tmp_path)))
    assert said in str(caught.value)
    assert _tree(tmp_path) == before


@pytest.mark.parametrize("place", ["model", "adapter", "model/inner", "checkpoints/step-000004", "."])
def test_a_student_where_the_run_writes_is_refused(tmp_path: Path, place: str) -> None:
    shutil.copytree(student_path(), tmp_path / "run" / place, dirs_exist_ok=True)
    before = _tree(tmp_path)
    with pytest.raises(InputError, match="--student"):
        check_own_paths(settings(out=str(tmp_path / "run"), student=str(tmp_path / "run" / place)))
    assert _tree(tmp_path) == before


def test_a_student_behind_links_is_found(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    shutil.copytree(student_path(), tmp_path / "kept")
    (tmp_path / "real" / "model").symlink_to(tmp_path / "kept")
    (tmp_path / "run").symlink_to("real")
    for student in ("kept", "run/model", "real/model"):
        with pytest.raises(InputError, match=r"--student .*expected a place of its own"):
            check_own_paths(settings(out=str(tmp_path / "run"), student=str(tmp_path / student)))


@pytest.mark.parametrize("option", ["teacher", "data", "held_out"])
def test_other_inputs_where_the_run_writes_are_refused(tmp_path: Path, option: str) -> None:
    (tmp_path / "model").mkdir()
    shutil.copy(teacher_path(), tmp_path / "model" / "input")
    with pytest.raises(InputError, match=rf"--{option.replace('_', '-')} .*expected a place of its own"):
        check_own_paths(settings(out=str(tmp_path), **{option: str(tmp_path / "model" / "input")}))


def test_a_folder_that_also_holds_the_student_may_hold_the_run(tmp_path: Path) -> None:
    shutil.copytree(student_path(), tmp_path / "student")
    (tmp_path / "thesis.txt").write_text("years")
    check_own_paths(settings(out=str(tmp_path), student=str(tmp_path / "student")))
