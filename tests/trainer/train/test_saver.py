"""Checkpoints beside the steps: of the state as it was, one at a time, waited for, and heard of when they fail."""

import errno
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import q4kd.trainer.train.checkpoint as checkpoint
from q4kd.trainer.errors import RunFolderError
from q4kd.trainer.events import EventLog
from q4kd.trainer.files import read_json
from q4kd.trainer.train.checkpoint import CheckpointState, list_checkpoints, read_state
from q4kd.trainer.train.saver import CheckpointSaver

CPU = torch.device("cpu")


def make_saver(run: Path, *, copies: bool = True, events: EventLog | None = None, **settings: Any) -> CheckpointSaver:
    config: Any = SimpleNamespace(**{"out": run, "keep": 2, "best_metric": "kl", "best_resumable": False, **settings})
    return CheckpointSaver(config, events or EventLog(None), CPU, copies=copies)


def save(saver: CheckpointSaver, step: int, weights: torch.Tensor, *, is_last: bool = False, **figures: float) -> None:
    held = saver.hold({"model": [("w", weights)], "optimizer": [("w|exp_avg", weights * 2)]}, is_last=is_last)
    state = CheckpointState(step, {}, "d", figures or None)
    saver.save(state, held, {"cpu": torch.zeros(1, 4)}, kind="everything", lost={"copy_s": 0.5})


class Gate:
    """Holds every file of a checkpoint back until it is opened, and counts those that came."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.came, self.opened, original = threading.Semaphore(0), threading.Event(), checkpoint.write_tensors

        def write(*arguments: Any) -> str:
            self.came.release()
            assert self.opened.wait(30)
            return original(*arguments)

        monkeypatch.setattr(checkpoint, "write_tensors", write)


def test_later_steps_do_not_reach_what_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, weights = Gate(monkeypatch), torch.ones(3)
    with make_saver(tmp_path) as saver:
        save(saver, 2, weights)
        assert gate.came.acquire(timeout=30)
        assert saver.has(2) and not list_checkpoints(tmp_path)
        weights += 1  # a step
        gate.opened.set()
        saver.finish()
        (path,) = list_checkpoints(tmp_path)
        assert load_file(path / "model.safetensors")["w"].tolist() == [1, 1, 1]
        # The memory of the copy serves the next one.
        save(saver, 4, weights)
    assert load_file(list_checkpoints(tmp_path)[-1] / "model.safetensors")["w"].tolist() == [2, 2, 2]


def test_the_next_checkpoint_waits_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    with make_saver(tmp_path) as saver:
        save(saver, 2, torch.ones(3))
        assert gate.came.acquire(timeout=30)
        while gate.came.acquire(timeout=0.3):  # Files are written beside each other, as many as there are cores for.
            pass
        second = threading.Thread(target=save, args=(saver, 4, torch.ones(3)))
        second.start()
        second.join(0.3)
        assert second.is_alive() and not gate.came.acquire(blocking=False)
        gate.opened.set()
        second.join(30)
        assert [path.name for path in list_checkpoints(tmp_path)][:1] == ["step-000002"]
    assert [read_state(path).step for path in list_checkpoints(tmp_path)] == [2, 4]


def full(*_arguments: Any) -> str:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_what_fails_there_is_raised_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with make_saver(tmp_path) as saver:
        save(saver, 2, torch.ones(3))
        saver.finish()
        saver.check()
        monkeypatch.setattr(checkpoint, "write_tensors", full)
        save(saver, 4, torch.ones(3))
        saver.settle()
        with pytest.raises(RunFolderError, match=r"step 4: the checkpoint .* \(No space left .*kept: step-000002;"):
            saver.check()
    with pytest.raises(RunFolderError, match="step 4"), make_saver(tmp_path) as saver:
        save(saver, 4, torch.ones(3))


def test_figures_of_a_checkpoint_that_failed_do_not_hide_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(RunFolderError, match=r"step 4: .* \(No space left"), make_saver(tmp_path) as saver:
        save(saver, 4, torch.ones(3))
        saver.record(4, {"kl": 0.5, "loss": 1.0, "agreement": 0.5})
        saver.settle()
        saver.check()


def test_an_error_waits_for_the_checkpoint_and_stays_the_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = Gate(monkeypatch)
    threading.Timer(0.3, gate.opened.set).start()
    with pytest.raises(ZeroDivisionError), make_saver(tmp_path) as saver:
        save(saver, 2, torch.ones(3))
        raise ZeroDivisionError
    assert [read_state(path).step for path in list_checkpoints(tmp_path)] == [2]
    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(ZeroDivisionError), make_saver(tmp_path) as saver:
        save(saver, 4, torch.ones(3))
        raise ZeroDivisionError
    assert "step 4: the checkpoint cannot be written (No space left on device)" in capsys.readouterr().err


def test_a_long_wait_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("q4kd.trainer.train.saver._QUIET_S", 0.05)
    gate = Gate(monkeypatch)
    with make_saver(tmp_path) as saver:
        save(saver, 2, torch.ones(3))
        threading.Timer(0.3, gate.opened.set).start()
        saver.finish(say=True)
    assert capsys.readouterr().out == "Waiting for the checkpoint of step 2 to be written\n"


def test_without_memory_for_a_copy_the_steps_wait(tmp_path: Path) -> None:
    weights = torch.ones(3)
    with make_saver(tmp_path, copies=False) as saver:
        save(saver, 2, weights)
        weights += 1
        assert [read_state(path).step for path in list_checkpoints(tmp_path)] == [2]
    assert load_file(list_checkpoints(tmp_path)[0] / "model.safetensors")["w"].tolist() == [1, 1, 1]


def test_the_last_checkpoint_of_a_cpu_is_written_of_the_weights_themselves(tmp_path: Path) -> None:
    weights = torch.ones(3)
    with make_saver(tmp_path) as saver:
        held = saver.hold({"model": [("w", weights)]}, is_last=True)
        assert held["model"]["w"] is weights
        held = saver.hold({"model": [("w", weights)]}, is_last=False)
        assert held["model"]["w"].data_ptr() != weights.data_ptr()


def test_figures_that_come_while_it_is_written_are_kept_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    with make_saver(tmp_path, keep=1) as saver:
        save(saver, 2, torch.ones(3))
        assert saver.is_better({"kl": 2.0})
        saver.record(2, {"kl": 2.0})
        # The best so far is known before it is on the disk.
        assert not saver.is_better({"kl": 2.0}) and saver.is_better({"kl": 1.9})
        gate.opened.set()
        save(saver, 4, torch.ones(3))
        saver.record(4, {"kl": 3.0})
    assert read_json(tmp_path / "checkpoints" / "best.json")["checkpoint"] == "best-000002"
    assert read_state(tmp_path / "checkpoints" / "best-000002").evaluation == {"kl": 2.0}
    assert read_state(list_checkpoints(tmp_path)[0]).evaluation == {"kl": 3.0}
    # A resumed run knows it, too.
    assert not make_saver(tmp_path).is_better({"kl": 2.0}) and make_saver(tmp_path).has(4)


def test_the_event_says_what_each_part_took(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events, told = EventLog(None), []
    events.listen(lambda name, fields: told.append((name, fields)))
    slow = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: (threading.Event().wait(0.02), slow(descriptor))[1])
    with make_saver(tmp_path, events=events) as saver:
        save(saver, 2, torch.ones(1000))
    ((name, fields),) = told
    assert name == "checkpoint" and (fields["step"], fields["path"]) == (2, "step-000002")
    sizes = [path.stat().st_size for path in (tmp_path / "checkpoints" / "step-000002").glob("*.safetensors")]
    assert fields["bytes"] == sum(sizes) > 8000
    assert fields["sync_s"] >= 3 * 0.02 and fields["copy_s"] == 0.5
    assert fields["seconds"] >= fields["sync_s"] + fields["write_s"] > 0 < fields["digest_s"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says where an open folder is")
@pytest.mark.parametrize("is_replaced", [False, True])
def test_a_folder_that_is_renamed_gets_the_checkpoint_and_no_twin(tmp_path: Path, is_replaced: bool) -> None:
    out, moved = tmp_path / "run", tmp_path / "moved"
    out.mkdir()
    words = f"was renamed to {moved} while the run wrote to it; step-000004 is there: continue with --resume --out"
    with pytest.raises(RunFolderError, match=words) as caught, make_saver(out) as saver:
        save(saver, 2, torch.ones(3))
        saver.finish()
        out.rename(moved)
        if is_replaced:
            out.mkdir()
        save(saver, 4, torch.ones(3))
        saver.finish()
    assert caught.value.exit_code == 74
    assert [read_state(path).step for path in list_checkpoints(moved)] == [2, 4]
    assert not any(out.iterdir()) if is_replaced else not out.exists()


def test_a_folder_that_is_removed_is_not_made_again(tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    with pytest.raises(RunFolderError, match="was removed or replaced"), make_saver(out) as saver:
        out.rmdir()
        save(saver, 4, torch.ones(3))
        saver.finish()
    assert not out.exists()
