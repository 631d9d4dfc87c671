"""What a user installs: a wheel that brings everything `q4kd falsify` needs, and a base install without torch."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # From a copy: a build leaves files beside its sources, and an earlier one's must not get into this wheel.
    source, out = tmp_path_factory.mktemp("source") / "q4kd", tmp_path_factory.mktemp("wheel")
    unwanted = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "bundles", "runs", "tests")
    shutil.copytree(ROOT, source, ignore=unwanted)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(out)]
    subprocess.run([*command, str(source)], check=True, timeout=300)
    return next(out.glob("q4kd-*.whl"))


def test_the_wheel_holds_every_module_and_every_data_file(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for package in ("harness", "trainer", "contracts", "evidence"):
        for path in (ROOT / package).rglob("*"):
            relative = path.relative_to(ROOT)
            shipped = path.suffix in {".py", ".yaml", ".json", ".gguf", ".npz", ".j2", ".gz"} or path.name == "py.typed"
            # Bundles and logs are for readers of the repository; an install needs the kill records only.
            apart = {"__pycache__", "bundles", "logs"} & set(relative.parts)
            if path.is_file() and shipped and not apart:
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


def test_training_commands_name_the_extra_they_need(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from q4kd.harness.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "logits", "x.gguf", "--ids", "x.npy", "--out", "y.npy"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert done.returncode == 2
    assert "q4kd[train]" in done.stderr
    assert done.stderr.count("\n") == 1
