"""Runs that are killed, starved, stopped or stalled from outside, each in a fork of one warmed-up process.

The parent never trains: it forks a child that runs ``q4kd distill``, watches the files it writes, does to it what the
experiment says, and records how it ended. Forking saves the imports of each leg; a planted fault is inherited.
"""

import functools
import os
import random
import re
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from q4kd.harness.records.json_types import JsonObject
from q4kd.harness.runs.load import CpuClock
from q4kd.harness.runs.probes import probe
from q4kd.trainer.files import read_json, write_json

if TYPE_CHECKING:
    from q4kd.trainer.data.batch import Batch
    from q4kd.trainer.train.run.assembly import Run

CHILD_EVENTS = "child.jsonl"
_DEADLINE_S = 240.0
_PATIENCE_S = 60.0
_POLL_S = 0.0005
_LOOK_EVERY_S = 0.2
_HEADROOM = 60 << 20
_SLOW_S, _LATER_STEP_S = 0.01, 0.3
_END_BYTES = 4096


def _warm_up() -> None:
    """Import what a run imports, and start no thread that a fork would lose."""
    import accelerate  # noqa: F401
    from transformers import AutoModelForCausalLM  # noqa: F401
    from transformers.models.qwen2 import modeling_qwen2  # noqa: F401

    import q4kd.trainer.distill  # noqa: F401


def _fork(argv: list[str], log: Path, prepare: Callable[[], None] | None = None) -> int:
    """Run the command in a fork whose output goes to ``log``; return its process id."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 3
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        if prepare is not None:
            prepare()
        from q4kd.harness.__main__ import main

        code = main(argv)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _ended(pid: int) -> int | None:
    """Return the exit code (minus the signal, when killed) of a child that has ended, else None."""
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def _wait(pid: int, until: Callable[[], bool] = lambda: False, patience_s: float = _DEADLINE_S) -> int | None:
    """Wait until the child has ended (its exit code) or ``until`` is true (None); kill it when neither happens.

    The patience is for what the child does, not for the cores that it waits for.
    """
    begun, clock, looked = time.monotonic(), CpuClock(), 0.0
    while (now := time.monotonic()) < begun + patience_s + clock.waited_s:
        if now - looked > _LOOK_EVERY_S:
            clock.look([pid])
            looked = now
        code = _ended(pid)
        if code is not None:
            return code
        if until():
            return None
        time.sleep(_POLL_S)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _count_steps(path: Path) -> int:
    return path.read_bytes().count(b'"event": "step"') if path.exists() else 0


def _has_steps(path: Path, count: int) -> bool:
    return _count_steps(path) >= count


def _written_step(out: Path) -> int | None:
    """Return the step whose checkpoint is being written: there is a temporary folder, or one that is not complete."""
    folder = out / "checkpoints"
    for path in folder.iterdir() if folder.is_dir() else ():
        name = re.fullmatch(r"(\.?)step-(\d+)(\.tmp)?", path.name)
        if name and (name[1] or not (path / "state.json").exists()):
            return int(name[2])
    return None


def _last_step(events: Path) -> int:
    """Return the last step that an event in the end of the file names, 0 for none."""
    if not events.exists():
        return 0
    with events.open("rb") as file:
        file.seek(max(0, events.stat().st_size - _END_BYTES))
        found = re.findall(rb'"event": "step".*?"step": (\d+)', file.read())
    return int(found[-1]) if found else 0


def _is_writing_behind(out: Path, events: Path) -> bool:
    """Say whether a checkpoint is being written of an earlier step than the last that was taken."""
    step = _written_step(out)
    return step is not None and step < _last_step(events)


def _stopped_while_writing(pid: int, out: Path, events: Path) -> bool:
    """Stop the child when it writes a checkpoint behind its steps, so that however late one looks, it still does."""
    if not _is_writing_behind(out, events):
        return False
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
    if _is_writing_behind(out, events):
        return True
    os.kill(pid, signal.SIGCONT)
    return False


def _slow_disk(events: Path) -> None:
    """Let a checkpoint wait for a slow disk: it begins to be written when a later step is taken, and takes a while.

    The last one has no later step, so the wait is bounded.
    """
    from q4kd.trainer.train import checkpoint

    module: Any = checkpoint
    original = module.write_tensors

    def write(path: Path, *rest: object) -> object:
        step, begun = int(re.sub(r"\D", "", path.parent.name)), time.monotonic()
        while _last_step(events) <= step and time.monotonic() < begun + _LATER_STEP_S:
            time.sleep(4 * _POLL_S)
        time.sleep(_SLOW_S)
        return original(path, *rest)

    module.write_tensors = write


@probe("killed-runs")
def killed_runs(case: Path, out: Path) -> None:
    """Run to the end once; run again with SIGKILL at seeded points, resuming each time, and record both event files.

    The runs that are killed have a slow disk, so that their checkpoints are written while later steps are taken.
    ``--case`` is a JSON file: ``{"argv": […], "kills": n, "writing": of which while a checkpoint is written, "seed"}``.
    The command's ``--out run`` and ``--events events.jsonl`` are replaced.
    """
    given = read_json(case)
    _warm_up()

    def argv(name: str, *more: str) -> list[str]:
        places = {"run": name, "events.jsonl": f"{name}.jsonl"}
        return [places.get(word, word) for word in given["argv"]] + list(more)

    whole = _wait(_fork(argv("whole"), Path("whole.log")))
    draw = random.Random(given["seed"])  # noqa: S311 - where to kill, not a secret
    kinds = [number < given["writing"] for number in range(given["kills"])]
    draw.shuffle(kinds)
    run, events, counts = Path("killed"), Path("killed.jsonl"), {"killed": 0, "writing": 0}
    ended: int | None = None
    for while_writing in kinds:
        resume = ["--resume"] if any(run.glob("checkpoints/step-*")) else []
        pid = _fork(argv("killed", *resume), Path("killed.log"), functools.partial(_slow_disk, events))
        wanted = _count_steps(events) + draw.randint(1, 4)
        reached = (
            functools.partial(_stopped_while_writing, pid, run, events)
            if while_writing
            else functools.partial(_has_steps, events, wanted)
        )
        ended = _wait(pid, reached)
        if ended is not None:
            break
        if not while_writing:
            time.sleep(draw.uniform(0, 0.03))
        caught = _is_writing_behind(run, events)
        os.kill(pid, signal.SIGKILL)
        code = _wait(pid)
        counts["killed"] += code == -signal.SIGKILL
        counts["writing"] += while_writing and caught
    if ended is None:
        ended = _wait(_fork(argv("killed", "--resume"), Path("killed.log")))
    table = {"exit code of the run left alone": whole, "SIGKILLs": counts["killed"]}
    said = "of them while a checkpoint was written behind later steps"
    table |= {said: counts["writing"], "exit code of the last leg": ended}
    write_json(out, {"tables": {"legs": table}})
    print(Path("killed.log").read_text(encoding="utf-8", errors="replace")[-2000:])


def _with_own_events(argv: tuple[str, ...]) -> list[str]:
    """Return the command with another file for its events, since ``events.jsonl`` is the recorded process's own."""
    return [CHILD_EVENTS if word == "events.jsonl" else word for word in argv]


_Deed = Literal["nothing", "SIGINT", "SIGTERM", "SIGHUP", "stall", "starve", "fill"]


@probe("ended-run")
def ended_run(*words: str, do: _Deed, out: Path) -> None:
    """Run once and do to it from outside what ``--do`` says; record how it ended and what it left."""
    _warm_up()
    events, log = Path(CHILD_EVENTS), Path("child.log")
    prepare = {"stall": _stall_data, "SIGHUP": _close_readers}.get(do)
    pid = _fork(_with_own_events(words), log, prepare)
    code = None
    if do in ("SIGINT", "SIGTERM", "SIGHUP"):
        code = _wait(pid, lambda: _count_steps(events) >= 3)
        if code is None:
            os.kill(pid, getattr(signal, do))
    elif do == "starve":
        code = _wait(pid, lambda: _count_steps(events) >= 1)
        if code is None:
            # The limit is little more than it has: the next large block is refused, and the explanation has room.
            size = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
            resource.prlimit(pid, resource.RLIMIT_AS, (size + _HEADROOM, size + _HEADROOM))
    elif do == "fill":
        code = _wait(pid, lambda: Path("run/checkpoints/step-000002").is_dir())
        if code is None:
            # No file grows past half a megabyte any more, as on a full disk.
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (1 << 19, 1 << 19))
    if code is None:
        # What was done to it must end it soon; a run that does not notice is killed.
        code = _wait(pid, patience_s=_DEADLINE_S if do == "nothing" else _PATIENCE_S)
    write_json(out, {"ended": {"code": code, "said": log.read_text(encoding="utf-8", errors="replace")[-6000:]}})


def _close_readers() -> None:
    """Let nobody read the run's output, as after a terminal or a connection was closed."""
    read, write = os.pipe()
    os.close(read)
    os.dup2(write, 1)
    os.dup2(write, 2)


def _stall_data() -> None:
    """Let the data source fall silent at the third batch, as a network file system does."""
    from q4kd.trainer.train.run import assembly as run

    original = run.Run.batch
    asked = []

    def batch(self: "Run", step: int) -> "Batch":
        asked.append(step)
        if len(asked) == 4:  # the guards before step 1 ask for one
            _silent_source()
        return original(self, step)

    run.Run.batch = batch  # type: ignore[method-assign]


def _silent_source() -> None:
    time.sleep(3600)


@probe("damaged-resumes")
def damaged_resumes(*words: str, out: Path) -> None:
    """Make a run with checkpoints; resume it with each part of the newest damaged, with other settings, and intact.

    An error is recorded as its exit code, and as unexplained where the one line does not name what it must.
    """
    _warm_up()
    argv, log, newest = _with_own_events(words), Path("child.log"), Path("run/checkpoints/step-000004")
    made = _wait(_fork([*argv, "--max-steps", "4"], log))

    def outcome(*more: str, names: tuple[str, ...] = ()) -> str | None:
        code = _wait(_fork([*argv, "--resume", "--max-steps", "5", *more], log))
        said = log.read_text(encoding="utf-8", errors="replace")
        if code == 0:
            return None
        return f"exit {code}{'' if all(name in said for name in names) else ' unexplained'}"

    found: list[tuple[str, str | None]] = []
    for name in ("model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json") if made == 0 else ():
        original = (newest / name).read_bytes()
        (newest / name).write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
        found.append((f"damaged {name}", outcome(names=(name, "delete this checkpoint"))))
        (newest / name).write_bytes(original)
    if made == 0:
        different = outcome("--set", "temperature=3", names=("temperature: 1.0 → 3.0",))
        found.append(("another temperature", different))
    twin = outcome()
    cases: list[JsonObject] = [
        {"case": name, "error": error, "message": "", "twin": "intact", "twin_error": twin} for name, error in found
    ]
    write_json(out, {"cases": cases})
