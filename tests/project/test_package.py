"""What a user installs: an sdist, a wheel with everything `q4kd falsify` needs, a base install without torch."""

import ast
import importlib.metadata
import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from copied_sources import copy_sources
from small_contracts import SIZES

from q4kd.harness.requirements import requirements

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # From a copy: a build leaves files beside its sources, and an earlier one's must not get into this one.
    source, out = tmp_path_factory.mktemp("source") / "q4kd", tmp_path_factory.mktemp("sdist")
    copy_sources(ROOT, source)
    code = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, str(out)], cwd=source, check=True, timeout=300, capture_output=True)
    return next(out.glob("q4kd-*.tar.gz"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the wheel that is made from the sdist: what the sdist lacks, the wheel lacks."""
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(out)]
    subprocess.run([*command, str(sdist)], check=True, timeout=300)
    return next(out.glob("q4kd-*.whl"))


@pytest.fixture(scope="module")
def q4kd(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run the installed command in an empty folder, with this environment's packages and none of this checkout."""
    work = tmp_path_factory.mktemp("installed")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "--quiet",
        "--disable-pip-version-check",
        "install",
        "--no-deps",
        "--no-compile",
    ]
    subprocess.run([*pip, "--no-index", "--target", str(work / "site"), str(wheel)], check=True, timeout=120)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(work / "venv")], check=True, timeout=120)
    (work / "empty").mkdir()

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        paths = [str(work / "site"), *[path for path in sys.path if path.endswith("site-packages")]]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join([*paths, sysconfig.get_path("purelib")])}
        command = [str(work / "venv/bin/python"), str(work / "site/bin/q4kd"), *arguments]
        return subprocess.run(command, cwd=work / "empty", env=env, text=True, capture_output=True, timeout=120)

    return run


def test_the_sdist_holds_its_licence_and_nothing_of_ours_alone(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml", "harness/py.typed", "trainer/kernels/src/decode.cu"} <= names
    assert not [name for name in names if name.startswith(("evidence/bundles", "evidence/logs", ".", "runs"))]


def test_the_version_is_written_in_one_place(
    wheel: Path, q4kd: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert wheel.name.split("-")[1] == version == importlib.metadata.version("q4kd")
    assert q4kd("--version").stdout == f"q4kd {version}\n"
    sources = [path for package in ("harness", "trainer") for path in (ROOT / package).rglob("*.py")]
    assert not [
        path for path in sources if f'"{version}"' in path.read_text() and "version" in path.read_text().lower()
    ]


def test_every_package_is_typed(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"q4kd/{package}/py.typed" for package in ("harness", "trainer", "contracts", "evidence")} <= names


def test_doctor_falsify_and_verify_run_from_the_wheel(
    q4kd: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = q4kd("doctor")
    assert done.returncode == 0, done.stdout
    (tmp_path / "size.yaml").write_text(SIZES)
    shared = ("--contracts", str(tmp_path), "--profile", "cpu", "--kills", str(tmp_path / "kills"))
    assert q4kd("sabotage", *shared).returncode == 0
    done = q4kd("falsify", *shared, "--out", str(tmp_path / "bundle"))
    assert done.returncode == 0, done.stdout + done.stderr
    done = q4kd("evidence", "verify", str(tmp_path / "bundle"))
    assert done.returncode == 0 and "1 verdicts recomputed" in done.stdout, done.stdout
    assert str(ROOT) not in (tmp_path / "bundle" / "runs" / "superblock" / "argv.json").read_text()


def test_the_wheel_holds_every_module_and_every_data_file(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in ("harness", "trainer", "contracts", "evidence"):
        for path in (ROOT / package).rglob("*"):
            relative = path.relative_to(ROOT)
            shipped = path.suffix in {
                ".py",
                ".yaml",
                ".json",
                ".gguf",
                ".npz",
                ".j2",
                ".css",
                ".gz",
                ".service",
                ".timer",
                ".cu",
                ".cuh",
            }
            # Bundles and logs are for readers of the repository; an install needs the kill records only.
            apart = {"__pycache__", "bundles", "logs"} & set(relative.parts)
            if path.is_file() and (shipped or path.name == "py.typed") and not apart:
                assert f"q4kd/{relative.as_posix()}" in names
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"q4kd"}
    assert sum(info.file_size for info in zipfile.ZipFile(wheel).infolist()) < 25_000_000


@pytest.mark.parametrize(
    "arguments",
    [
        ["contracts", "validate", str(ROOT / "contracts")],
        ["contracts", "show", "kd-signal-v1"],
        ["inspect", str(ROOT / "trainer/demo/teacher-q4_k_m.gguf")],
        ["doctor"],
        ["--help"],
    ],
)
def test_base_commands_do_not_import_torch(arguments: list[str]) -> None:
    # A base install has no torch: pretend, by making its import an error.
    code = (
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'transformers', 'accelerate', 'safetensors'):\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "from q4kd.harness.__main__ import main\n"
        "try:\n"
        "    code = main(sys.argv[1:])\n"
        "except SystemExit as end:\n"
        "    code = end.code\n"
        "sys.exit(code)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize(
    "command", [["logits", "x.gguf", "--ids", "x.npy", "--out", "y.npy"], ["falsify"], ["sabotage"]]
)
def test_training_commands_name_the_extra_they_need(tmp_path: Path, command: list[str]) -> None:
    code = (
        "import sys, importlib.util as u; real = u.find_spec; sys.modules['torch'] = None\n"
        "u.find_spec = lambda name, *rest: None if name == 'torch' else real(name, *rest)\n"
        "from q4kd.harness.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 2
    assert "q4kd[train]" in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# What a comparison or a tracker imports when the user asks for it by name, and says so when it is not there.
NAMED_BY_THE_USER = {"datasets", "llama_cpp", "tensorboard", "trackio", "trl", "wandb"}


def test_every_package_that_is_imported_is_declared() -> None:
    declared = {name.lower().replace("_", "-") for name, extra in requirements() if extra not in ("dev", "docs")}
    brings = importlib.metadata.packages_distributions()
    missing: dict[str, str] = {}
    for path in [path for package in ("harness", "trainer") for path in (ROOT / package).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for top in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"q4kd", "torch"}:
                found = {name.lower().replace("_", "-") for name in brings.get(top, [top])}
                cupy = top.startswith("cupy") and "cupy-cuda13x" in declared
                if not (found & declared or cupy or top in NAMED_BY_THE_USER):
                    missing[top] = path.name
    assert missing == {}


def test_importing_changes_nothing_in_the_process() -> None:
    # The compiler of torch, which transformers imports, names a cache folder of its own; it is imported beforehand.
    code = (
        "import importlib, os, pkgutil, sys, torch._dynamo, q4kd.harness, q4kd.trainer\n"
        "before, where, absent = dict(os.environ), os.getcwd(), []\n"
        "for package in (q4kd.harness, q4kd.trainer):\n"
        "    for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "        try:\n"
        "            importlib.import_module(module.name)\n"
        "        except ModuleNotFoundError as error:\n"
        "            absent.append(error.name)\n"
        "changed = {key for key in before.keys() | os.environ.keys() if before.get(key) != os.environ.get(key)}\n"
        "print(sorted(changed), os.getcwd() == where, sorted(set(absent) - {'cupy', 'trl', 'llama_cpp'}))\n"
    )
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "FSDP_", "TOKENIZERS_"))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[] True []\n", done.stdout
