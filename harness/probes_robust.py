"""Runs that are killed, starved, stopped or stalled from outside, each in a fork of one warmed-up process.

The parent never trains: it forks a child that runs ``q4kd distill``, watches the files it writes, does to it what the
experiment says, and records how it ended. Forking saves the imports of each leg; a planted fault is inherited.
"""

import argparse
import functools
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from q4kd.trainer.files import read_json, write_json

CHILD_EVENTS = "child.jsonl"
_DEADLINE_S = 240.0
_PATIENCE_S = 60.0
_POLL_S = 0.0005
_HEADROOM = 60 << 20


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
    """Wait until the child has ended (its exit code) or ``until`` is true (None); kill it when neither happens."""
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline:
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


def _is_writing(out: Path) -> bool:
    """Whether a checkpoint is being written: a temporary folder, or a final one that is not complete."""
    folder = out / "checkpoints"
    if not folder.is_dir():
        return False
    names = [path.name for path in folder.iterdir()]
    return any(name.endswith(".tmp") for name in names) or any(
        name.startswith("step-") and not (folder / name / "state.json").exists() for name in names
    )


def killed_runs(arguments: list[str]) -> int:
    """Run to the end once; run again with SIGKILL at seeded points, resuming each time, and record both event files.

    ``--case`` is a JSON file: ``{"argv": […], "kills": n, "writing": of which while a checkpoint is written, "seed"}``.
    The command's ``--out run`` and ``--events events.jsonl`` are replaced.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)
    case = read_json(args.case)
    _warm_up()

    def argv(name: str, *more: str) -> list[str]:
        places = {"run": name, "events.jsonl": f"{name}.jsonl"}
        return [places.get(word, word) for word in case["argv"]] + list(more)

    whole = _wait(_fork(argv("whole"), Path("whole.log")))
    draw = random.Random(case["seed"])  # noqa: S311 - where to kill, not a secret
    kinds = [number < case["writing"] for number in range(case["kills"])]
    draw.shuffle(kinds)
    out, events, counts = Path("killed"), Path("killed.jsonl"), {"killed": 0, "writing": 0}
    ended: int | None = None
    for while_writing in kinds:
        resume = ["--resume"] if (out / "checkpoints").is_dir() and any((out / "checkpoints").glob("step-*")) else []
        pid = _fork(argv("killed", *resume), Path("killed.log"))
        wanted = _count_steps(events) + draw.randint(1, 4)
        reached = (
            functools.partial(_is_writing, out) if while_writing else functools.partial(_has_steps, events, wanted)
        )
        ended = _wait(pid, reached)
        if ended is not None:
            break
        if not while_writing:
            time.sleep(draw.uniform(0, 0.03))
        caught = _is_writing(out)
        os.kill(pid, signal.SIGKILL)
        code = _wait(pid)
        counts["killed"] += code == -signal.SIGKILL
        counts["writing"] += while_writing and caught
    if ended is None:
        ended = _wait(_fork(argv("killed", "--resume"), Path("killed.log")))
    table = {"exit code of the run left alone": whole, "SIGKILLs": counts["killed"]}
    table |= {"of them while a checkpoint was written": counts["writing"], "exit code of the last leg": ended}
    write_json(args.out, {"tables": {"legs": table}})
    print(Path("killed.log").read_text(encoding="utf-8", errors="replace")[-2000:])
    return 0


def _with_own_events(argv: list[str]) -> list[str]:
    """Return the command with another file for its events: those of a run's record are of the recorded process."""
    return [CHILD_EVENTS if word == "events.jsonl" else word for word in argv]


def ended_run(arguments: list[str]) -> int:
    """Run once and do to it from outside what ``--do`` says; record how it ended and what it left."""
    cut = arguments.index("--")
    parser = argparse.ArgumentParser()
    parser.add_argument("--do", required=True, choices=("nothing", "SIGINT", "SIGTERM", "stall", "starve", "fill"))
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments[:cut])
    _warm_up()
    out, events, log = Path("run"), Path(CHILD_EVENTS), Path("child.log")
    pid = _fork(_with_own_events(arguments[cut + 1 :]), log, _stall_data if args.do == "stall" else None)
    code = None
    if args.do in ("SIGINT", "SIGTERM"):
        code = _wait(pid, lambda: _count_steps(events) >= 3)
        if code is None:
            os.kill(pid, getattr(signal, args.do))
    elif args.do == "starve":
        code = _wait(pid, lambda: _count_steps(events) >= 1)
        if code is None:
            # Little more than it has: the next large block is refused, and what explains it has room to.
            size = int(Path(f"/proc/{pid}/statm").read_text().split()[0]) * resource.getpagesize()
            resource.prlimit(pid, resource.RLIMIT_AS, (size + _HEADROOM, size + _HEADROOM))
    elif args.do == "fill":
        code = _wait(pid, lambda: (out / "checkpoints" / "step-000002").is_dir())
        if code is None:
            # As on a full disk: no file grows past half a megabyte any more.
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (1 << 19, 1 << 19))
    if code is None:
        # What was done to it must end it soon; a run that does not notice is killed.
        code = _wait(pid, patience_s=_DEADLINE_S if args.do == "nothing" else _PATIENCE_S)
    write_json(args.out, {"ended": {"code": code, "said": log.read_text(encoding="utf-8", errors="replace")[-6000:]}})
    return 0


def _stall_data() -> None:
    """Let the data source fall silent at the third batch, as a network file system does."""
    from q4kd.trainer import run

    original = run.Run.batch
    asked = []

    def batch(self: Any, step: int) -> Any:
        asked.append(step)
        if len(asked) == 4:  # the guards before step 1 ask for one
            _silent_source()
        return original(self, step)

    run.Run.batch = batch  # type: ignore[method-assign]


def _silent_source() -> None:
    time.sleep(3600)


def damaged_resumes(arguments: list[str]) -> int:
    """Make a run with checkpoints; resume it with each part of the newest damaged, with other settings, and intact.

    An error is recorded as its exit code, and as unexplained where the one line does not name what it must.
    """
    cut = arguments.index("--")
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments[:cut])
    _warm_up()
    argv, log, newest = _with_own_events(arguments[cut + 1 :]), Path("child.log"), Path("run/checkpoints/step-000004")
    made = _wait(_fork([*argv, "--max-steps", "4"], log))

    def outcome(*more: str, words: tuple[str, ...] = ()) -> str | None:
        code = _wait(_fork([*argv, "--resume", "--max-steps", "5", *more], log))
        said = log.read_text(encoding="utf-8", errors="replace")
        if code == 0:
            return None
        return f"exit {code}{'' if all(word in said for word in words) else ' unexplained'}"

    found: list[tuple[str, str | None]] = []
    for name in ("model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json") if made == 0 else ():
        original = (newest / name).read_bytes()
        (newest / name).write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
        found.append((f"damaged {name}", outcome(words=(name, "delete this checkpoint"))))
        (newest / name).write_bytes(original)
    if made == 0:
        different = outcome("--set", "temperature=3", words=("temperature: 1.0 → 3.0",))
        found.append(("another temperature", different))
    twin = outcome()
    cases = [
        {"case": name, "error": error, "message": "", "twin": "intact", "twin_error": twin} for name, error in found
    ]
    write_json(args.out, {"cases": cases})
    return 0
