"""Runs whose folder holds somebody's files, and resumed runs whose inputs are others by then: all must be refused."""

import importlib
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from q4kd.harness.records.json_types import JsonObject
from q4kd.harness.runs.probes import probe
from q4kd.harness.subjects.robustness.probes import _fork, _wait, _warm_up, _with_own_events
from q4kd.trainer.files import sha256_file, write_json

# What a run writes in its folder before it refuses.
_OWN = (".lock",)


def _files(root: Path) -> dict[str, str]:
    """Return the digest of each file below a folder, links among them, that is not one of a run's own."""
    return {
        path.relative_to(root).as_posix(): f"link to {path.readlink()}" if path.is_symlink() else sha256_file(path)
        for path in sorted(root.rglob("*"))
        if (path.is_symlink() or path.is_file()) and path.name not in _OWN
    }


def _end(argv: list[str], names: tuple[str, ...] = ()) -> str | None:
    """Run a command in a fork; return None for exit code 0, else the code, and whether its line names what it must."""
    log = Path("child.log")
    code = _wait(_fork(argv, log))
    said = log.read_text(encoding="utf-8", errors="replace")
    if code == 0:
        return None
    return f"exit {code}{'' if all(name in said for name in names) else ' unexplained'}"


def _replaced(argv: Sequence[str], **places: str) -> list[str]:
    """Return the command with other values of some of its options, and a file of its own for its events."""
    found = _with_own_events(tuple(argv))
    for option, value in places.items():
        found[found.index(f"--{option}") + 1] = value
    return found


@probe("foreign-files")
def foreign_files(*words: str, out: Path) -> None:
    """Start runs in folders that hold what no run made; record how each ended, and what of it is gone.

    The twin is a run over the model of an earlier leg, which it may replace.
    """
    with tempfile.TemporaryDirectory(prefix="q4kd-foreign-") as root:
        write_json(out, {"cases": _foreign_cases(words, Path(root))})


def _foreign_cases(words: tuple[str, ...], root: Path) -> list[JsonObject]:
    _warm_up()
    student = Path(words[words.index("--student") + 1])
    kept = Path("kept")
    shutil.copytree(student, kept)
    made = _end(_replaced(words, out="whole"))
    shutil.rmtree("whole/checkpoints", ignore_errors=True)

    def student_in_it(folder: Path) -> list[str]:
        shutil.copytree(kept, folder / "model")
        return ["--student", str(folder / "model")]

    def student_is_its_model(folder: Path) -> list[str]:
        shutil.copytree("whole", folder, dirs_exist_ok=True, copy_function=shutil.copy2)
        return ["--student", str(folder / "model")]

    def file_of_somebody(folder: Path) -> list[str]:
        (folder / "model").mkdir()
        (folder / "model" / "thesis.txt").write_text("years of work\n", encoding="utf-8")
        return []

    def link(folder: Path) -> list[str]:
        (folder / "model").symlink_to(kept.resolve())
        return []

    def file_added(folder: Path) -> list[str]:
        shutil.copytree("whole", folder, dirs_exist_ok=True, copy_function=shutil.copy2)
        (folder / "model" / "thesis.txt").write_text("years of work\n", encoding="utf-8")
        return []

    cases: dict[str, Callable[[Path], list[str]]] = {
        "the student at model": student_in_it,
        "the model of an earlier run as student": student_is_its_model,
        "a file at model": file_of_somebody,
        "a link at model": link,
        "a file added to the model of an earlier run": file_added,
    }
    twin = made or _end(_replaced(words, out="whole"))
    shutil.rmtree("whole/checkpoints", ignore_errors=True)  # else it is refused for these
    records: list[JsonObject] = []
    for number, (case, prepare) in enumerate(cases.items()):
        # Not in the folder of the recorded run: a link there would be refused by whoever reads the bundle meanwhile.
        folder = root / f"case-{number}"
        folder.mkdir()
        argv = [*_replaced(words, out=str(folder)), *prepare(folder)]
        before = _files(folder) | _files(kept)
        error = _end(argv, (str(folder),))
        after = _files(folder) | _files(kept)
        lost = next((name for name in before if after.get(name) != before[name]), None)
        error = error if lost is None else f"{error or 'exit 0'}, lost {lost}"
        records.append({"case": case, "error": error, "message": "", "twin": "its own model", "twin_error": twin})
    return records


def _lacking_everything() -> None:
    """Let the preflight find something missing, so that a night sweeps its folder and then ends."""
    from q4kd.harness.doctor import Line

    night: Any = importlib.import_module("q4kd.harness.nightly.night")
    night.preflight = lambda *_arguments: [Line("disk", "missing", "0 GiB", "free it")]


@probe("night-in-a-project")
def night_in_a_project(contracts: Path, out: Path) -> None:
    """Start nights in folders that hold other files; record their exit codes, what is lost, and what they remove.

    A night of another kind, begun before, leaves work that the next one must remove: the sweep is under way.
    """
    import q4kd.harness.nightly.night  # noqa: F401 - before the forks

    # A night that runs this experiment holds the lock of the machine.
    Path("runtime").mkdir(mode=0o700)
    os.environ["XDG_RUNTIME_DIR"] = str(Path("runtime").resolve())

    def night(folder: Path, *words: str) -> int | None:
        argv = ["nightly", "--profile", "cpu", "--contracts", str(contracts), "--keep", "1", "--out", str(folder)]
        return _wait(_fork([*argv, *words], Path("child.log"), _lacking_everything))

    found: dict[str, object] = {}
    for name, place in {"work, logs and bundles": ".", "site": "site", "kills": "kills"}.items():
        folder = Path(f"project-{place.strip('.')}")
        files = ["work/thesis/a.txt", "logs/app1.log", "logs/app2.log", "bundles/backup1.tar.gz", "bundles/b2.tar.xz"]
        for file in [*files, *([f"{place}/index.html"] if place != "." else [])]:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / file).write_text("years of work\n", encoding="utf-8")
        before = _files(folder)
        codes = [night(folder, "--sabotage", kind) for kind in ("all", "none")]
        after = _files(folder)
        lost = [file for file in before if after.get(file) != before[file]]
        found[f"{name}: exit codes"] = ", ".join(map(str, codes))
        found[f"{name}: lost"] = ", ".join(lost) or "nothing"
        found[f"{name}: nights with work"] = len(list((folder / "work").glob("*-cpu")))
    write_json(out, {"tables": {"night": found}})


# Names that q4kd and pytest import, of the standard library and of others.
_IMPORTED = ("yaml", "pytest", "json", "torch", "numpy", "jinja2", "q4kd")


@probe("hostile-folder")
def hostile_folder(contracts: Path, out: Path) -> None:
    """Start falsify, and a stage of a night, in a folder whose Python files say that they were run; record which."""
    folder, ran = Path("hostile").resolve(), Path("ran.txt").resolve()
    folder.mkdir()
    for name in _IMPORTED:
        (folder / f"{name}.py").write_text(f"open({str(ran)!r}, 'a').write('{name} ')\n", encoding="utf-8")
    bundle, log = Path("bundle").resolve(), Path("night.log").resolve()

    def start_stage() -> None:
        from q4kd.harness.nightly.stage import StageRunner

        os.chdir(folder)
        words = ["one::FT-1", "--contracts", str(contracts)]
        StageRunner(log.with_suffix(".lock"), log).spawn("show", words, ("contracts", "show"))

    argv = ["falsify", "--contracts", str(contracts), "--profile", "cpu", "--out", str(bundle)]
    code = _wait(_fork([*argv, "--isolation", "process"], Path("child.log"), start_stage))
    table = {
        "exit code of falsify": code,
        "falsify came to its findings": (bundle / "findings.json").is_file(),
        "the stage did its work": log.is_file() and "] FT-1  a rule" in log.read_text(encoding="utf-8"),
        "files of the folder that were run": ran.read_text(encoding="utf-8").strip() if ran.is_file() else "none",
    }
    write_json(out, {"tables": {"hostile": table}})


@probe("other-inputs")
def other_inputs(*words: str, out: Path) -> None:
    """Resume a run with LoRA after a file at one of its paths was replaced, and after none was.

    An error is recorded as its exit code, and as unexplained where its line does not name the input and the remedy.
    """
    _warm_up()
    teacher, student = (Path(words[words.index(f"--{option}") + 1]) for option in ("teacher", "student"))
    own_teacher, own_student = Path("teacher.gguf"), Path("student")
    shutil.copyfile(teacher, own_teacher)
    shutil.copytree(student, own_student)
    argv = _replaced(words, teacher=str(own_teacher), student=str(own_student))
    made = _end([*argv, "--max-steps", "2"])
    found: list[tuple[str, str | None]] = []

    def resume(case: str, *names: str) -> None:
        folder = f"run-{len(found)}"
        shutil.copytree("run", folder)
        found.append((case, _end([*_replaced(argv, out=folder), "--resume", "--max-steps", "3"], names)))

    if made is None:
        replaced = {"another teacher": own_teacher, "other weights of the student": own_student / "model.safetensors"}
        for case, path in replaced.items():
            what, original = "teacher" if path == own_teacher else "student", path.read_bytes()
            path.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
            resume(case, f"the {what} of that run, sha256", f"put that {what} back")
            path.write_bytes(original)
    resume("the same inputs")
    (_, twin) = found.pop()
    cases: list[JsonObject] = [
        {"case": case, "error": error, "message": "", "twin": "the same inputs", "twin_error": made or twin}
        for case, error in found
    ]
    write_json(out, {"cases": cases})
