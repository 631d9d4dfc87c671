"""What runs may execute: a change of one operator in a copied installation, and what a real run imports."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from q4kd.harness.changed.program import Program
from q4kd.harness.judging.digests import experiment_closure
from q4kd.harness.judging.syntax_trees import Source, SyntaxTrees, read_source
from q4kd.harness.runs.experiment import get_experiment

ROOT = Path(__file__).parents[3]
SCRIPT = """
import json
from q4kd.harness.changed.dependencies import dependencies_now
from q4kd.harness.runs.experiment import EXPERIMENTS
from q4kd.harness.runs.user_inputs import GivenFiles
import q4kd.trainer
place = {"cpu": {"model": "m", "cores_usable": 2}, "gpu": {"names": [], "driver": None},
         "platform": {"machine": "x"}, "memory_bytes": 1 << 30}
words = {name: ["distill"] if name == "distill-run" else [] for name in EXPERIMENTS}
print(json.dumps([q4kd.trainer.__file__, dependencies_now(words, place, GivenFiles()).to_json()]))
"""


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with an installation of its own: its sources are nobody else's."""
    site = tmp_path_factory.mktemp("site")
    for name in ("harness", "trainer", "contracts"):
        shutil.copytree(ROOT / name, site / "q4kd" / name, ignore=shutil.ignore_patterns("__pycache__"))
    return site


def found_by(site: Path) -> Any:
    """Return what an interpreter of its own, without this checkout's editable install, finds there."""
    places = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *places]), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-S", "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    place, value = json.loads(done.stdout)
    assert Path(place).is_relative_to(site)
    return value


def changed_between(before: Any, after: Any) -> set[str]:
    from q4kd.harness.changed.dependencies import Dependencies

    old, new = (Dependencies.from_json(value, "x") for value in (before, after))
    return {name for name in new.experiments if new.differences(old, name)}


def edit(site: Path, name: str, old: str, new: str) -> None:
    path = site / "q4kd" / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def test_one_operator_runs_what_depends_on_it_and_a_comment_runs_nothing(copied: Path) -> None:
    before = found_by(copied)
    everything = set(before["experiments"])

    edit(copied, "trainer/export/to_gguf.py", '"""', '"""In other words. ')
    edit(copied, "trainer/loss/sums.py", "import torch", "import torch  # which computes\n\n# and more of it")
    assert changed_between(before, found_by(copied)) == set()

    edit(copied, "trainer/export/to_gguf.py", "if expected != got:", "if expected == got:")
    exporting = {"exported-models", "refused-exports", "fidelity", "cuda-fidelity", "real-pair", "cuda-real-pair"}
    exporting |= {"exported-families"}
    assert changed_between(before, found_by(copied)) == exporting

    edit(copied, "trainer/teacher/cache/store.py", "start + self.windows_per_shard", "start - self.windows_per_shard")
    after = found_by(copied)
    cached = {"cached-signals", "cached-training", "interrupted-cache", "refused-caches"}
    assert cached <= changed_between(before, after) < everything
    assert not {"kd-loss", "superblock", "decision-tables"} & changed_between(before, after)

    # What is no module counts with the package that reads it.
    edit(copied, "trainer/kernels/src/kd_rows.cuh", "//", "// changed: ")
    sources = changed_between(after, found_by(copied))
    assert "kd-loss" in sources and "decision-tables" not in sources


# --- a small package, read from memory ---

PACKAGE = {
    "acme": "",
    "acme.cli": "def run():\n    from acme.work import main\n    main()\n",
    "acme.work": "import acme.tools\n\n\ndef main():\n    acme.tools.use('acme.plugin')\n",
    "acme.tools": "import importlib\n\n\ndef use(name='acme.usual'):\n    return name\n",
    "acme.usual": "A = 1\n",
    "acme.plugin": "from . import deep\n",
    "acme.deep": "B = 2\n",
    "acme.apart": "C = 3\n",
}


def program(**changes: str) -> Program:
    sources = {**PACKAGE, **{f"acme.{name}": text for name, text in changes.items()}}

    def read(name: str) -> Source | None:
        return Source(sources[name], name == "acme") if name in sources else None

    return Program({"acme"}, SyntaxTrees(read))


def test_imports_are_followed_in_functions_in_texts_and_relative() -> None:
    found = program().reach({"acme.cli"})
    assert found == {"acme", "acme.cli", "acme.work", "acme.tools", "acme.usual", "acme.plugin", "acme.deep"}
    assert program().loaded_by({"acme.work"}) == {"acme", "acme.work", "acme.tools"}
    assert program().loaded_by({"acme.cli"}) == {"acme", "acme.cli"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tools", "import importlib\n\n\ndef use(name='acme.usual'):\n    return not name\n"),
        ("tools", "import importlib\n\n\ndef use(name='acme.other'):\n    return name\n"),
        ("tools", "import importlib.util\n\n\ndef use(name='acme.usual'):\n    return name\n"),
        ("tools", "import importlib\n\n\ndef use(name: str = 'acme.usual'):\n    return name\n"),
    ],
)
def test_what_a_module_says_counts(name: str, text: str) -> None:
    assert program().digest(f"acme.{name}") != program(**{name: text}).digest(f"acme.{name}")


def test_how_a_module_says_it_does_not_count() -> None:
    text = """
        '''Tools.'''
        import importlib  # unused


        def use(
            name="acme.usual",
        ):
            '''Use.'''
            return name
    """
    words = textwrap.dedent(text)
    assert program().digest("acme.tools") == program(tools=words).digest("acme.tools")


def test_what_only_a_run_can_tell_counts_as_everything(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package on disk, because its modules are listed there."""
    folder = copied / "dynamic"
    folder.mkdir()
    for name, text in {"__init__": "", "one": "def f(name):\n    __import__(name)\n", "two": "", "three": ""}.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(copied))
    every = {"dynamic", "dynamic.one", "dynamic.two", "dynamic.three"}
    assert Program({"dynamic"}, SyntaxTrees()).reach({"dynamic.one"}) == every
    (folder / "one.py").write_text("def f():\n    model.eval()\n    __import__('dynamic.two')\n")
    assert Program({"dynamic"}, SyntaxTrees()).reach({"dynamic.one"}) == {"dynamic", "dynamic.one", "dynamic.two"}


IMPORTED = """
import atexit, sys
atexit.register(lambda: print("MODULES", *sorted(name for name in sys.modules if name.startswith("q4kd."))))
from q4kd.harness.child import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("experiment", ["settings-refused", "decision-tables", "teacher-parity"])
def test_all_that_a_real_run_imports_was_found(experiment: str, tmp_path: Path) -> None:
    from q4kd.harness.runs.experiment import Inputs

    found = get_experiment(experiment)
    arm = found.arms[0]
    words = arm.argv(Inputs(tmp_path / "inputs", "cpu"))
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED, "--", *words], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    imported = set(done.stdout.partition("MODULES ")[2].split())
    _, closure = experiment_closure(found)
    expected = Program({"q4kd"}).of_experiment(closure, words)
    # Probes of other subjects are loaded with the one that is asked for; what they define is not run.
    others = {name for name in imported if name.startswith(("q4kd.harness.subjects", "q4kd.harness.inputs"))}
    assert imported - others - expected == set()
    assert read_source(next(iter(imported))) is not None and "q4kd.trainer.errors" in imported
