"""No program of ours is started so that it imports modules of the current folder first."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _commands(path: Path) -> list[ast.Tuple | ast.List]:
    """Return the literal commands in a source file that start this interpreter."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Tuple | ast.List) and node.elts and ast.unparse(node.elts[0]) == "sys.executable"
    ]


def test_every_interpreter_is_started_with_a_safe_path() -> None:
    found = [
        (path.relative_to(ROOT).as_posix(), ast.unparse(command))
        for top in ("harness", "trainer")
        for path in (ROOT / top).rglob("*.py")
        for command in _commands(path)
    ]
    assert len(found) >= 7
    assert [
        place for place in found if not place[1].startswith(("(sys.executable, '-P'", "[sys.executable, '-P'"))
    ] == []


@pytest.mark.parametrize("words", [("evidence", "verify", "."), ("contracts", "validate"), ("doctor",)])
def test_a_command_runs_no_file_of_the_current_folder(tmp_path: Path, words: tuple[str, ...]) -> None:
    for name in ("yaml", "json", "torch", "numpy", "jinja2", "q4kd"):
        (tmp_path / f"{name}.py").write_text(f"open('ran', 'a').write('{name}')")
    script = "import sys; from q4kd.harness.__main__ import main; sys.exit(main(sys.argv[1:]))"
    # As the installed program starts: its own folder comes first, and not the current one.
    command = [sys.executable, "-P", "-c", script, *words]
    subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=120, check=False)
    assert not (tmp_path / "ran").exists()
