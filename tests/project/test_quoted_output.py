"""The documentation quotes real output: every command that it shows with output is run as written, and compared.

A line ``…`` in a quotation stands for lines that are left out; all others must be the program's own, in its order. Only
the numbers that ``VARYING`` and ``LEARNT`` name may differ.
"""

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from q4kd.harness.claims.contract import load_contracts
from q4kd.harness.claims.plan import make_plan
from q4kd.harness.claims.profile import load_profile

ROOT = Path(__file__).parents[2]
# The order matters: later pages use what the tutorial's run left.
PAGES = ("README.md", "docs/tutorial.md", "docs/how-to/memory.md", "docs/how-to/export.md")
NOT_RUN = {".venv/bin/nox -s falsify": "it takes minutes and is the gate itself; its counts are compared below"}
_QUOTED = re.compile(r"^```\w*\n\$ (.*?[^\\])\n(.*?)^```", re.MULTILINE | re.DOTALL)

# What differs from run to run or from machine to machine, and why.
VARYING = {
    r"\d+ tok/s, teacher \d+%": "speed",
    r"wall \d+\.\d s: .*": "speed",
    r"in \d+\.\d+s": "speed",
    r"host \S+ MB resident \(\S+ MB": "libraries of this machine",
    r"room: \S+ GB": "memory of this machine",
    r"of \S+ GB free": "disk of this machine",
    r"\d{8}T\d{6}Z-cpu-[0-9a-f]{6}": "time and a random name",
    r"\b[0-9a-f]{16,64}\b": "digests of trained weights",
    r"at most \S+% \(blk\.\S+\)": "the tensor that came out worst",
    r"relative frobenius [\d.e-]+": "rounding of this processor",
    r"± \S+": "an error of one or two digits",
    r"\d+ items / \d+ deselected|\d+ deselected": "number of claims",
    r"[=━─]+| +(?=[│┃])": "a line or a column is filled",
}
# What a run learns, or counts, depends on its text, which is this Python's own library, and in its last digits on the
# processor: the numbers agree within a tenth on the Python that made the quotations, and may be any others elsewhere.
LEARNT = re.compile(r"^(?:Step|Held-out|data:|text:|KL\(|top-1|perplexity)|relative frobenius")
PYTHON = "3.11.7"
_NUMBER = re.compile(r"[+-]?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?")


def quotations(page: str) -> list[tuple[str, list[str]]]:
    """Return command and quoted lines of every block that shows both."""
    found = _QUOTED.findall((ROOT / page).read_text(encoding="utf-8"))
    return [(command, output.splitlines()) for command, output in found if output.strip()]


def masked(line: str) -> str:
    """Return a line without what may vary and without the blanks at its end."""
    for pattern in VARYING:
        line = re.sub(pattern, "~", line)
    return line.rstrip()


def is_same(quoted: str, real: str) -> bool:
    """Whether a quoted line is a line of the program."""
    quoted, real = masked(quoted), masked(real)
    if quoted == real or not LEARNT.search(quoted):
        return quoted == real
    if _NUMBER.sub("~", quoted) != _NUMBER.sub("~", real):
        return False
    pairs = zip(_NUMBER.findall(quoted), _NUMBER.findall(real), strict=True)
    values = [(float(one.replace(",", "")), float(other.replace(",", ""))) for one, other in pairs]
    return platform.python_version() != PYTHON or all(one == pytest.approx(other, rel=0.1) for one, other in values)


def first_difference(quoted: list[str], real: list[str]) -> str:
    """Return the first quoted line that the program did not print where it should, or nothing."""
    at, may_skip = 0, False
    for line in quoted:
        if line.strip() == "…":
            may_skip = True
            continue
        places = [place for place in range(at, len(real)) if is_same(line, real[place])]
        if not places or (places[0] != at and not may_skip):
            return f"quoted {line!r}, printed {real[at : at + 1]}"
        at, may_skip = places[0] + 1, False
    return "" if may_skip or at == len(real) else f"not quoted: {real[at]!r}"


def run_as_written(command: str, folder: Path) -> list[str]:
    """Run a command line of a page in ``folder``; return what it printed, with the folder shown as ``/home/me``."""
    place = Path(sys.executable).parent
    kept = {name: value for name, value in os.environ.items() if name != "COLUMNS" and not name.startswith("PYTEST")}
    env = {**kept, "PATH": f"{place}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=300
    )
    return done.stdout.decode().replace(str(folder), "/home/me").rstrip().splitlines()


def test_quoted_output_is_what_the_program_prints(tmp_path: Path) -> None:
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "trainer").symlink_to(ROOT / "trainer")
    wrong = []
    for page in PAGES:
        for command, quoted in quotations(page):
            if command not in NOT_RUN:
                # On a slow machine a command also says how far it is.
                printed = run_as_written(command, tmp_path)
                real = [line for line in printed if not re.search(r"\d+%, about .* left$", line)]
                if found := first_difference(quoted, real):
                    wrong.append("\n".join([f"{page}: {command}", found, "It prints:", *real]))
    assert not wrong, "\n\n".join(wrong)


def test_no_page_quotes_output_that_is_not_run() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    quoting = {page.relative_to(ROOT).as_posix() for page in pages if quotations(page.relative_to(ROOT).as_posix())}
    assert quoting == set(PAGES)
    commands = [command for page in PAGES for command, _ in quotations(page)]
    assert len(commands) > 7 and set(NOT_RUN) <= set(commands)


def test_the_gate_in_the_readme_has_as_many_claims_and_faults_as_the_contracts() -> None:
    contracts = load_contracts(ROOT / "contracts")
    plan = make_plan(contracts, load_profile("cpu"))
    required = {entry.key for entry in plan.entries if entry.scope == "required"}
    claims = {claim.key: claim for contract in contracts for claim in contract.claims}
    faults = sum(len(claims[key].falsifier.sabotage) for key in required if claims[key].falsifier)
    ((_, quoted),) = [(command, lines) for command, lines in quotations("README.md") if command in NOT_RUN]
    left_out = len(plan.entries) - len(required)
    assert f"collected {len(plan.entries)} items" in quoted
    assert f"{len(required)} claims corroborated on profile cpu; {left_out} out of scope" in quoted
    assert f"L2: {faults} of {faults} planted faults caught" in quoted
    text = "\n".join(quoted)
    assert f" {len(required)} passed, {left_out} skipped in " in text
    shown = [len(re.findall(f"^{word} ", text, re.MULTILINE)) for word in ("corroborated", "out of scope")]
    more = [int(number) for number in re.findall(r"^  … (\d+) more …$", text, re.MULTILINE)]
    assert [one + other for one, other in zip(shown, more, strict=True)] == [len(required), left_out]


def test_a_false_quotation_is_noticed() -> None:
    real = ["Step 10/100: loss: 4.1067 (797 tok/s, teacher 37%)", "held as in the file", "wrote 3 files", ""]
    assert not first_difference(["Step 10/100: loss: 4.1067 (1 tok/s, teacher 9%)", "…"], real)
    assert not first_difference(["…", "wrote 3 files", ""], real)
    assert first_difference(["held as in the file", "…"], real)
    assert first_difference(["Step 10/100: loss: 4.1067 (1 tok/s, teacher 9%)", "wrote 3 files", ""], real)
    assert first_difference(["…", "wrote 4 files", ""], real)
    assert first_difference(["…", "held as in the file"], real)
    assert bool(first_difference(["Step 10/100: loss: 1.0 (1 tok/s, teacher 9%)", "…"], real)) == (
        platform.python_version() == PYTHON
    )
