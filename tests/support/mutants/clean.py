"""What the unchanged sources give: the verdicts, the time and the executed lines of every experiment; tests that pass.

All of it is kept in the session's folder and read again when a session is resumed.
"""

import json
import re
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from mutants.lines import read_lines, start_recording, stop_recording
from mutants.tree import Tree

# Their claims judge the machine's times: what runs beside them can turn them as well as a mutant.
TIMED = {"reporting-cost": "judges a share of time, which other processes change"}
_FIRST_LIMIT_S = 900.0
_FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)


@dataclass(frozen=True)
class CleanExperiment:
    """An experiment on unchanged sources: the claims that it corroborated, its seconds, and lines by module."""

    name: str
    claims: list[str]
    seconds: float
    lines: dict[str, list[int]]
    not_corroborated: dict[str, str]

    @property
    def limit_s(self) -> float:
        """Seconds that an arm may take on changed sources before it counts as endless."""
        return 30.0 + 5.0 * self.seconds

    def reaches(self, module: str, lines: tuple[int, int]) -> bool:
        """Return whether it executes a line between these two of a module."""
        return _between(self.lines, module, lines)


@dataclass(frozen=True)
class CleanTests:
    """A test file on unchanged sources: its seconds, tests that fail there and say nothing of a mutant, and lines."""

    file: str
    seconds: float
    failing: list[str]
    lines: dict[str, list[int]]

    def reaches(self, module: str, lines: tuple[int, int]) -> bool:
        """Return whether it executes a line between these two of a module."""
        return _between(self.lines, module, lines)


@dataclass
class CleanStore:
    """The results on unchanged sources, one JSON file each below ``folder``."""

    folder: Path
    profile: str
    _locks: dict[str, threading.Lock] = field(default_factory=dict)
    _guard: threading.Lock = field(default_factory=threading.Lock)

    def plan(self, tree: Tree) -> tuple[dict[str, list[str]], list[str]]:
        """Return the claims of the profile by experiment, and the modules that planted faults name.

        Raises:
            RuntimeError: when the copy cannot be asked, or ``q4kd`` was not found in it.
        """
        out = self._ask(tree, {"plan": self.profile}, 300.0)
        plan = json.loads(out.read_text(encoding="utf-8"))
        if not plan["origin"].startswith(str(tree.path)):
            raise RuntimeError(f"expected q4kd to be found in {tree.path}, got {plan['origin']}")
        return {name: claims for name, claims in plan["experiments"].items() if name not in TIMED}, plan["named"]

    def experiment(self, tree: Tree, name: str, claims: Sequence[str]) -> CleanExperiment:
        """Return what an experiment gives, running it unless that is known."""
        path = self.folder / "experiments" / f"{name}.json"
        if path.exists():
            return CleanExperiment(**json.loads(path.read_text(encoding="utf-8")))
        with _recording(tree) as lines:
            rows = self.judge(tree, [self.request(name, claims, _FIRST_LIMIT_S)], stop=False)
        if any(row["verdict"] != "corroborated" for row in rows):  # recording takes time, which may have turned it
            rows = self.judge(tree, [self.request(name, claims, _FIRST_LIMIT_S)], stop=False)
        good = [row["claim"] for row in rows if row["verdict"] == "corroborated"]
        bad = dict.fromkeys(claims, f"no verdict: {log_tail(tree.folder / 'judge.log')}")
        bad |= {row["claim"]: f"{row['verdict']} {row['reason']} {row['detail']}" for row in rows}
        seconds = max((row["seconds"] for row in rows), default=0.0)
        found = CleanExperiment(name, good, seconds, lines, {key: why for key, why in bad.items() if key not in good})
        _write(path, asdict(found))
        return found

    def tests(self, tree: Tree, file: str) -> CleanTests:
        """Return what a test file gives, running it unless that is known. ``tree`` must be unchanged."""
        path = self.folder / "tests" / f"{file.replace('/', '--')}.json"
        with self._guard:
            lock = self._locks.setdefault(file, threading.Lock())
        with lock:
            if not path.exists():
                with _recording(tree) as lines:
                    failing, seconds = _run_tests(tree, file)
                if failing:  # recording takes time, which a test may mind
                    failing, seconds = _run_tests(tree, file)
                _write(path, asdict(CleanTests(file, seconds, failing, lines)))
        return CleanTests(**json.loads(path.read_text(encoding="utf-8")))

    @staticmethod
    def request(name: str, claims: Sequence[str], limit_s: float) -> dict[str, object]:
        """Return one experiment as ``judge`` is asked for it."""
        return {"name": name, "claims": list(claims), "limit_s": limit_s, "alarm_s": 2 * limit_s + 60.0}

    def judge(self, tree: Tree, experiments: Sequence[dict[str, object]], *, stop: bool) -> list[dict[str, object]]:
        """Run experiments in a tree as it is now and return the rows of their claims (see ``judge``)."""
        limit_s = 60.0 + sum(float(str(experiment["alarm_s"])) for experiment in experiments)
        work = tree.empty("work")
        request = {"profile": self.profile, "work": str(work), "experiments": list(experiments), "stop": stop}
        request["server"] = str(tree.server.path)
        out = self._ask(tree, request, limit_s)
        rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] if out.exists() else []
        tree.empty("work")
        return rows

    def _ask(self, tree: Tree, request: dict[str, object], limit_s: float) -> Path:
        asked, out = tree.folder / "request.json", tree.folder / "answer.jsonl"
        out.unlink(missing_ok=True)
        asked.write_text(json.dumps(request), encoding="utf-8")
        ended = tree.run(["judge", str(asked), str(out)], limit_s, tree.folder / "judge.log")
        if "plan" in request and (ended.code != 0 or not out.exists()):
            raise RuntimeError((tree.folder / "judge.log").read_text(encoding="utf-8", errors="replace")[-2000:])
        return out


def _between(executed: dict[str, list[int]], module: str, lines: tuple[int, int]) -> bool:
    return any(lines[0] <= line <= lines[1] for line in executed.get(module, ()))


@contextmanager
def _recording(tree: Tree) -> Iterator[dict[str, list[int]]]:
    """Record the lines that commands of the tree execute meanwhile; they are there when the block has ended."""
    record, lines = tree.folder / "lines.txt", dict[str, list[int]]()
    record.unlink(missing_ok=True)
    start_recording(tree.path, record)
    try:
        yield lines
    finally:
        stop_recording(tree.path)
    lines.update(read_lines(record))


def _run_tests(tree: Tree, file: str) -> tuple[list[str], float]:
    """Return the tests of a file that fail, which is the file itself where it cannot be run, and its seconds."""
    log = tree.folder / "tests.log"
    ended = tree.run(pytest_words([file]), _FIRST_LIMIT_S, log)
    failing = sorted(set(failed_tests(log))) if ended.code not in (0, 5) else []
    return (failing or [file]) if ended.code not in (0, 5) else [], round(ended.seconds, 2)


def pytest_words(files: Sequence[str], *more: str) -> list[str]:
    """Return the command that runs test files alone, in order and without records of earlier runs."""
    return ["pytest", "-q", "-rfE", "--tb=no", "-p", "no:cacheprovider", *more, *files]


def log_tail(log: Path) -> str:
    """Return the last line of a command's output."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1][:300] if lines else "ended without a word"


def failed_tests(log: Path) -> list[str]:
    """Return the tests that pytest's output names as failed, in its order."""
    return _FAILED.findall(log.read_text(encoding="utf-8", errors="replace"))


def _write(path: Path, record: dict[str, object]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(record), encoding="utf-8")
    draft.replace(path)
