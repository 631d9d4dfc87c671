import os
from pathlib import Path

import pytest

from q4kd.trainer.data.documents import SourceSettings
from q4kd.trainer.data.readers import list_files

FILES = ("a.py", "b.txt", ".hidden.py", "lib/c.py", "lib/deep/er/d.py", "lib/.git/e.py", "UPPER.PY", "x[1].py")
LEFT_OUT = ("__pycache__/f.py", "lib/site-packages/g.py", "lib/site-packages/deep/h.py")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for name in (*FILES, *LEFT_OUT):
        path = tmp_path / "source" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.py").write_text("x")
    links = {
        "link-out.py": "../outside/secret.py",
        "link-in.py": "lib/c.py",
        "folder-out": "../outside",
        "gone.py": "no",
    }
    for name, target in links.items():
        (tmp_path / "source" / name).symlink_to(target)
    (tmp_path / "source" / "folder-in").symlink_to("lib")
    (tmp_path / "source" / "folder.py").mkdir()
    return tmp_path / "source"


def names(source: Path, pattern: str) -> list[str]:
    found = list_files(source, SourceSettings(pattern=pattern))
    assert all(path == source.resolve() / name for path, name in found)
    return [name for _, name in found]


def by_pathlib(source: Path, pattern: str) -> list[str]:
    """Return what the glob finds, link by link, as it is defined."""
    root = source.resolve()
    found = []
    for path in root.glob(pattern):
        parts = path.relative_to(root).parts
        left_out = {"__pycache__", "site-packages"} & set(parts) or any(part.startswith(".") for part in parts)
        if path.is_file() and path.resolve().is_relative_to(root) and not left_out:
            found.append(path.relative_to(root))
    return [path.as_posix() for path in sorted(found)]


@pytest.mark.parametrize("pattern", ["**/*", "**/*.py", "**/c.py", "**/[ab].*", "*.py", "lib/**/*.py", "*/c.py", "**"])
def test_what_is_listed_is_what_the_glob_means(source: Path, pattern: str) -> None:
    assert names(source, pattern) == by_pathlib(source, pattern)


def test_installed_packages_caches_and_links_out_of_the_folder_are_left_out(source: Path) -> None:
    assert names(source, "**/*.py") == ["a.py", "lib/c.py", "lib/deep/er/d.py", "link-in.py", "x[1].py"]


def test_installed_packages_are_not_walked_through(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    scan = os.scandir

    def watch(path: str) -> object:
        seen.append(str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", watch)
    assert len(names(source, "**/*.py")) == 5
    assert any(path.endswith("deep/er") for path in seen)
    assert not [path for path in seen if "site-packages" in path]
