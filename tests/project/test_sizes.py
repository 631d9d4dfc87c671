"""The inventory of sizes: each is the code's own, and the claims that run beyond it exist."""

import ast
import re
from pathlib import Path

import pytest

from q4kd.harness.claims.contract import load_contracts
from q4kd.harness.claims.folder import default_contracts_folder

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "explanation" / "sizes.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `([\w.]+):(\w+)` \| (\d+) \| (.+) \|$", PAGE, re.MULTILINE)


def constants(module: str) -> dict[str, int]:
    """Return the numbers that a module of the trainer assigns at its top, without importing it."""
    found: dict[str, int] = {}
    path = ROOT.joinpath("trainer", *module.split(".")).with_suffix(".py")
    for statement in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(statement, ast.Assign):
            continue
        names, values = statement.targets[0], statement.value
        pairs = [(names, values)]
        if isinstance(names, ast.Tuple) and isinstance(values, ast.Tuple):
            pairs = list(zip(names.elts, values.elts, strict=True))
        for name, value in pairs:
            number = whole_number(value)
            if isinstance(name, ast.Name) and number is not None:
                found[name.id] = number
    return found


def whole_number(expression: ast.expr) -> int | None:
    """Return the value of a number, a product or a shift of numbers; None of anything else."""
    if isinstance(expression, ast.Name) and expression.id == "SUPERBLOCK":
        return 256
    if isinstance(expression, ast.Constant) and isinstance(expression.value, int):
        return expression.value
    if isinstance(expression, ast.BinOp) and isinstance(expression.op, ast.Mult | ast.LShift):
        left, right = whole_number(expression.left), whole_number(expression.right)
        if left is not None and right is not None:
            return left * right if isinstance(expression.op, ast.Mult) else left << right
    return None


def test_the_page_has_its_tables() -> None:
    assert len(ROWS) >= 40
    assert len({(module, name) for module, name, *_ in ROWS}) == len(ROWS)


@pytest.mark.parametrize(("module", "name", "value", "_judged"), ROWS, ids=[f"{row[0]}:{row[1]}" for row in ROWS])
def test_a_size_is_that_of_the_code(module: str, name: str, value: str, _judged: str) -> None:
    assert constants(module).get(name) == int(value)


def test_the_claims_that_are_named_exist() -> None:
    known = {claim.id for contract in load_contracts(default_contracts_folder()) for claim in contract.claims}
    named = {word for *_, judged in ROWS for word in re.findall(r"\b[A-Z]+(?:-[A-Z0-9]+)+\b", judged)}
    assert named and named <= known
    beyond = PAGE.split("## Beyond no claim")[0]
    for _module, name, _value, judged in re.findall(r"^\| `([\w.]+):(\w+)` \| (\d+) \| (.+) \|$", beyond, re.MULTILINE):
        assert set(judged.split(", ")) <= known, name
