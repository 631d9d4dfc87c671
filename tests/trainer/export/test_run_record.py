"""What a run folder says of the model in it. The folders are made here, file by file."""

import shutil
from pathlib import Path

import pytest
from made_runs import make_model_folder, make_run

from q4kd.trainer.errors import InputError
from q4kd.trainer.export.run_record import find_source, read_record
from q4kd.trainer.train.kept_checkpoints import prune_checkpoints


def test_a_model_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = make_model_folder(tmp_path / 'a "model"')
    source = find_source(folder)
    assert (source.folder, source.checkpoint, source.record, source.title) == (folder, None, None, "a-model")
    with pytest.raises(InputError, match="leave --checkpoint out"):
        find_source(folder, "last")


def test_a_finished_run_is_its_model(tmp_path: Path) -> None:
    source = find_source(make_run(tmp_path / "run"))
    assert source.folder == tmp_path / "run/model"
    assert source.checkpoint is None
    assert source.record is not None
    assert (source.record.step, source.record.steps) == (6, 6)
    assert source.record.held_out == {"loss": 2.8, "kl": 0.4, "agreement": 0.7, "tokens": 64.0}
    assert source.record.teacher == {"file": "t.gguf", "sha256": "ab", "bytes": 7}
    assert source.record.data_sha256 == "d1"
    assert source.record.config == {"student": "student", "teacher": "t.gguf", "lr": 0.1}
    assert source.record.missing == ()


@pytest.mark.parametrize(
    ("metric", "name"),
    [(None, "step-000004"), ("kl", "step-000004"), ("loss", "step-000006"), ("agreement", "step-000006")],
)
def test_the_best_checkpoint_is_the_runs_own_best(tmp_path: Path, metric: str | None, name: str) -> None:
    run = make_run(tmp_path / "run", config={"best_metric": metric} if metric else {})
    source = find_source(run, "best")
    assert source.checkpoint == run / "checkpoints" / name
    assert source.record is not None
    assert source.record.step == int(name[5:])


def test_last_and_named_checkpoints(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert find_source(run, "last").checkpoint == run / "checkpoints/step-000006"
    source = find_source(run, "step-000002")
    assert source.title == "run-step-000002"
    assert source.record is not None
    assert source.record.held_out is not None
    assert source.record.held_out["kl"] == 0.9
    for wrong in ("step-000003", "../model", "step-2"):
        with pytest.raises(InputError, match="best, last or one of step-000002, step-000004, step-000006"):
            find_source(run, wrong)


def test_best_weights_are_found_beside_the_newest_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    prune_checkpoints(run, 1, "kl")
    source = find_source(run, "best")
    assert source.checkpoint == run / "checkpoints" / "best-000004"
    assert source.record is not None and source.record.step == 4
    assert find_source(run, "last").checkpoint == run / "checkpoints" / "step-000006"
    shutil.rmtree(run / "checkpoints" / "step-000006")
    shutil.rmtree(run / "model")
    make_model_folder(tmp_path / "student")
    assert find_source(run, "best").checkpoint == run / "checkpoints" / "best-000004"


def test_best_needs_an_evaluation(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=(3, 5))
    with pytest.raises(InputError, match="none among step-000003, step-000005"):
        find_source(run, "best")
    for hostile in ('{"checkpoint": "../../model"}', '{"checkpoint": ["step-000003"]}', "[]"):
        (run / "checkpoints/best.json").write_text(hostile)
        with pytest.raises(InputError, match="none among"):
            find_source(run, "best")


def test_an_unfinished_run_needs_a_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", model=False)
    with pytest.raises(InputError, match=r"no final model, and 3 checkpoint\(s\) up to step-000006.*--checkpoint last"):
        find_source(run)
    with pytest.raises(InputError, match="name it with --student"):
        find_source(run, "last")
    make_model_folder(tmp_path / "student")
    assert find_source(run, "last").folder == tmp_path / "student"
    moved = make_model_folder(tmp_path / "moved")
    assert find_source(run, "last", moved).folder == moved
    with pytest.raises(InputError, match="--student"):
        find_source(run, "last", tmp_path / "nowhere")


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    weights = run / "checkpoints/step-000006/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    with pytest.raises(InputError, match=r"model\.safetensors with the digest"):
        find_source(run, "last")


def test_folders_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither config"):
        find_source(tmp_path)
    run = make_run(tmp_path / "run")
    (run / "model/model.safetensors").unlink()
    with pytest.raises(InputError, match="no weights as safetensors"):
        find_source(run)
    (run / "model/adapter_config.json").write_text("{}")
    for place in (run, run / "model"):
        with pytest.raises(InputError, match=r"a LoRA adapter alone.*merge"):
            find_source(place)
    (run / "model/config.json").unlink()
    with pytest.raises(InputError, match=r"a LoRA adapter alone.*merge"):
        find_source(run / "model")


def test_what_is_not_recorded_is_said(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", written=False)
    (run / "events.jsonl").unlink()
    record = read_record(run, None)
    assert record.teacher == {"file": "t.gguf"}
    assert record.data_sha256 == "d1"
    assert record.held_out is None
    assert [line.split(",")[0] for line in record.missing] == [
        "this run has no run.json",
        "no held-out evaluation is recorded",
    ]


def test_malformed_records_are_missing_not_guessed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "run.json").write_text('{"teacher": ["x"], "config": "y", "data_sha256": 3, "steps": "many"}')
    record = read_record(run, None)
    assert (record.teacher, record.config, record.steps) == ({}, {}, None)
    (run / "run.json").write_text("[1]")
    assert read_record(run, None).missing
    (run / "run.json").write_text('{"a": NaN}')
    with pytest.raises(InputError, match="strict JSON"):
        read_record(run, None)
