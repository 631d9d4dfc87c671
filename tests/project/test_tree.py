"""The tree itself: packages are listed, tests mirror them, and no folder is a hall of a hundred rooms."""

import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOPS = ("harness", "trainer")
# Folders of tests that stand for no package: of the project as a whole, shared helpers, and a peer's engine.
OTHERS = {"project", "support", "example_project", "trainer/llamacpp"}
MOST_MODULES = 13
# The checks are of one shape and closed to contracts: one more is no new thing to learn.
HOMOGENEOUS = {"harness/checks"}


def packages() -> Iterator[Path]:
    for top in TOPS:
        yield from sorted(path.parent.relative_to(ROOT) for path in (ROOT / top).rglob("__init__.py"))


def test_the_package_list_is_the_tree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found = {"q4kd.contracts", "q4kd.evidence", *(f"q4kd.{'.'.join(path.parts)}" for path in packages())}
    assert set(project["tool"]["setuptools"]["packages"]) == found
    folders = {path.parent for top in TOPS for path in (ROOT / top).rglob("*.py")}
    assert {path.relative_to(ROOT) for path in folders} == set(packages())


@pytest.mark.parametrize("package", list(packages()), ids=str)
def test_a_package_says_what_it_holds_and_holds_few_modules(package: Path) -> None:
    assert (ROOT / package / "__init__.py").read_text(encoding="utf-8").startswith('"""')
    modules = [path for path in (ROOT / package).glob("*.py") if path.name != "__init__.py"]
    assert len(modules) <= MOST_MODULES or str(package) in HOMOGENEOUS


def test_tests_lie_where_their_subject_lies() -> None:
    mirrored = {str(package) for package in packages()}
    for path in (ROOT / "tests").rglob("test_*.py"):
        folder = path.parent.relative_to(ROOT / "tests").as_posix()
        assert folder in mirrored or folder.split("/")[0] in OTHERS or folder in OTHERS, path


def test_what_architecture_names_is_there() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    for top in TOPS:
        section = text.partition(f"## {top}/")[2].partition("\n## ")[0]
        named = [
            word
            for word in section.split("`")[1::2]
            if word.endswith((".py", "/")) and not word.startswith("contracts")
        ]
        assert named
        for word in named:
            places = [ROOT / top / word, *(ROOT / top).glob(f"**/{word}")]
            assert any(place.exists() for place in places), f"{top}: {word}"
        for folder in (path for path in (ROOT / top).iterdir() if (path / "__init__.py").exists()):
            assert f"`{folder.name}/`" in section, f"{top}/{folder.name}"
