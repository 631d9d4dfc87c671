"""Faults in what keeps runs and nights from deleting what is not theirs, and runs from going on with other inputs."""

import shutil
from collections.abc import Callable
from typing import Any

from q4kd.harness.runs.faults import Call, fault, patch, replace

_CHECK = "q4kd.trainer.made:MadeThings.check"
_INPUTS = "q4kd.trainer.train.run.folder:_check_inputs"
_PYTEST = "q4kd.harness.falsify:pytest_command"
_STAGE = "q4kd.harness.nightly.stage:COMMAND"
_WRITE = "q4kd.harness.cli.output:GuardedStream.write"
_SWEEP = "q4kd.harness.nightly.night:_Run._sweep"
_OTHER = "q4kd.trainer.train.run.identity:explain_other_input"


@patch("checkpoint", "deleted-unseen", "what lies at the final model's name is deleted, whatever it is", _CHECK)
def _deleted_unseen(_original: Call, _self: object, *_names: object) -> None:
    return


@patch("checkpoint", "inputs-in-run-not-seen", "a run may write where its own inputs lie", _INPUTS)
def _inputs_in_run_not_seen(_original: Call, _config: object) -> None:
    return


@patch("supervision", "night-sweeps-all", "a night removes all work and logs but its own, by their place", _SWEEP)
def _night_sweeps_all(original: Call, self: Any) -> None:
    for path in [*(self.out / "work").iterdir(), *sorted((self.out / "logs").glob("*.log"))[:-1]]:
        if path != self.work:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    original(self)


@patch("supervision", "falsify-imports-here", "falsify imports modules of the current folder first", _PYTEST)
def _falsify_imports_here(original: Callable[..., list[str]], *arguments: object) -> list[str]:
    return [word for word in original(*arguments) if word != "-P"]


@fault("supervision", "stage-imports-here", "a stage of a night imports modules of the current folder first", _STAGE)
def _stage_imports_here() -> None:
    replace(_STAGE, lambda command: tuple(word for word in command if word != "-P"))


@patch("supervision", "reader-ends-run", "a run ends when nobody reads its output any more", _WRITE)
def _reader_ends_run(_original: Call, self: Any, text: str) -> object:
    return self._stream.write(text)


@patch("checkpoint", "inputs-by-path", "a resumed run knows its teacher and student by their paths alone", _OTHER)
def _inputs_by_path(_original: Call, *_arguments: object) -> None:
    return
