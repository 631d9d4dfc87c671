"""What the documentation says: its commands exist, its first contract goes red then green, its pages and links hold.

``test_quoted_output.py`` runs the commands whose output is quoted.
"""

import ast
import dataclasses
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from q4kd.harness.__main__ import build_parser, main
from q4kd.trainer.formats.blocks.layout import FORMATS
from q4kd.trainer.formats.families import FAMILIES

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Commands that the documentation describes and another change brings. A line that parses must not be covered here.
PENDING: tuple[str, ...] = ()
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`(q4kd [^`\n]+)`")
_START = re.compile(r"(?:\$ )?(?:(?:\S*/bin/)?q4kd |.* -m q4kd\.harness )(?=[a-z-])")
# A session of nox that is a command of q4kd: what follows ``--`` are its options.
_SESSION = re.compile(r"(?:.*&& )?\S*nox -s (falsify|sabotage|nightly)(?: -- | *$)")
# Commands of a block that are not q4kd's, by their first word, and where they are tried instead.
ELSEWHERE = {
    "git": "needs a network",
    "pip": "needs a network; `nox -s package` installs base and [train] in empty environments",
    "python3": "makes an environment, as `nox -s package` does",
    "nox": "sessions are looked up in the noxfile below",
    "python": "modules are looked up below",
    "torchrun": "what follows -m q4kd.harness is parsed; tests of several processes start it",
    "accelerate": "what follows -m q4kd.harness is parsed; tests of several processes start it",
    "sudo": "changes the machine",
    "mkdir": "changes the user's home",
    "systemctl": "changes the machine",
    "loginctl": "changes the machine",
    "openssl": "makes keys; tests of signatures make theirs with a library",
}


def command_lines() -> Iterator[tuple[str, str, bool]]:
    """Yield page, command line and whether it stands in running text, for every mention of a command."""
    for page in PAGES:
        text, name = page.read_text(encoding="utf-8"), page.relative_to(ROOT).as_posix()
        for _, block in _FENCE.findall(text):
            for line in block.replace("\\\n", " ").splitlines():
                if match := _START.match(line) or _SESSION.match(line):
                    command = " ".join([*match.groups(), line[match.end() :]])
                    words = shlex.split(command, comments=True)
                    end = next((at for at, word in enumerate(words) if word in (">", "|", "&&")), len(words))
                    yield name, shlex.join(words[:end]), False
        for line in _INLINE.findall(_FENCE.sub("", text)):
            words = shlex.split(line)[1:]
            # "q4kd bench teacher / load" speaks of several commands.
            if not {"|", "…", "...", "/"} & set(words):
                yield name, shlex.join(words), True


LINES = sorted(set(command_lines()))


def complaint(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Return what the real parser says against a line, or nothing."""
    try:
        build_parser().parse_args(shlex.split(line))
    except SystemExit as end:
        return capsys.readouterr().err if end.code else ""
    return ""


@pytest.mark.parametrize(("page", "line", "in_text"), LINES, ids=[f"{page}: {line}"[:90] for page, line, _ in LINES])
def test_a_command_in_the_documentation_exists(
    page: str, line: str, in_text: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    words, said = line.split(), complaint(line, capsys)
    if any(words[0] == entry.split()[0] and set(entry.split()) <= set(words) for entry in PENDING):
        assert said, f"q4kd {line} works now: take it out of PENDING"
    elif in_text and "arguments are required" in said:
        return  # running text may leave them out; the command is known
    else:
        assert not said, f"{page}: q4kd {line}: {said}"


def test_every_line_of_a_block_of_commands_is_parsed_or_listed() -> None:
    for page in PAGES:
        for kind, block in _FENCE.findall(page.read_text(encoding="utf-8")):
            lines = [line for line in block.replace("\\\n", " ").splitlines() if line.strip()]
            shown = [line for line in lines if line.startswith("$ ")]
            for line in (shown or lines) if kind in {"", "text"} else ():
                first = line.removeprefix("$ ").split()[0].rpartition("/")[2]
                assert _START.match(line) or first in ELSEWHERE, f"{page.name}: {line}"
                for module in re.findall(r"python -m (\S+)", line):
                    assert importlib.util.find_spec(module), f"{page.name}: {line}"


def test_enough_commands_were_found() -> None:
    assert len(LINES) > 40
    assert any(page == "README.md" for page, *_ in LINES)


def test_every_nox_session_in_the_documentation_exists() -> None:
    tree = ast.parse((ROOT / "noxfile.py").read_text())
    sessions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.decorator_list}
    named = set()
    for page in [*PAGES, ROOT / ".ci" / "run", *(ROOT / ".github" / "workflows").glob("*.yml")]:
        for words in re.findall(r"nox -s ([a-z ]+)", page.read_text(encoding="utf-8")):
            named |= set(words.split())
    assert {"falsify", "tests", "nightly", "docs"} <= named
    assert named <= sessions | {"then", "and", "or"}


def first_contract(page: str) -> str:
    blocks = [body for kind, body in _FENCE.findall((ROOT / page).read_text()) if kind == "yaml" and "MY-001" in body]
    assert len(blocks) == 1
    return blocks[0]


def test_the_first_contract_goes_red_then_green(tmp_path: Path) -> None:
    text = first_contract("README.md")
    assert text == first_contract("docs/how-to/contract.md")
    assert len([line for line in text.splitlines() if not line.startswith("#")]) <= 10
    folder = tmp_path / "my-contracts"
    folder.mkdir()

    def run(*arguments: str) -> int:
        command = [sys.executable, "-m", "q4kd.harness", *arguments, "--contracts", "my-contracts"]
        done = subprocess.run(
            [*command, "--profile", "cpu", "--kills", "my-kills"], cwd=tmp_path, capture_output=True, timeout=120
        )
        return done.returncode

    (folder / "size.yaml").write_text(text)
    run("sabotage")
    assert run("falsify", "--out", "red") == 1
    expected = yaml.safe_load(text)["falsification_tests"][0]["falsifier"]["params"]["expected"]
    assert expected["Q4_K"] != 144
    (folder / "size.yaml").write_text(text.replace(str(expected["Q4_K"]), "144"))
    assert run("sabotage") == 0
    assert run("falsify", "--out", "green") == 0


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material", reason="mkdocs-material is not installed: pip install 'q4kd[docs]'")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


def test_the_site_is_built_strictly_and_fetches_nothing(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 25
    fetched = re.compile(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=\"(?:https?:)?//[^\"]*")
    for page in pages:
        assert not fetched.findall(page.read_text(encoding="utf-8")), page
    assert "@import" not in "".join(path.read_text() for path in site.rglob("*.css"))


def test_the_reference_names_every_command_setting_check_and_event(site: Path) -> None:
    from q4kd.harness.checks import CHECKS
    from q4kd.trainer.config.settings import DistillConfig

    def text(name: str) -> str:
        return (site / "reference" / f"{name}.html").read_text(encoding="utf-8")

    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import reference_pages
    finally:
        sys.path.remove(str(ROOT / "docs"))
    commands = [parser.prog for parser in reference_pages.commands(build_parser())]
    assert {"q4kd evidence verify", "q4kd nightly", "q4kd bench teacher"} <= set(commands)
    assert [name for name in commands if name not in text("cli")] == []
    assert [f.name for f in dataclasses.fields(DistillConfig) if f"<code>{f.name}</code>" not in text("settings")] == []
    assert [name for name in CHECKS if f">{name}<" not in text("checks")] == []
    events = reference_pages.emitted_events(ROOT / "trainer")
    assert {"process_start", "teacher_ready", "step", "checkpoint", "done"} <= set(events)
    assert "loss" not in events["step"] and "…" in events["step"]


def test_every_default_that_steers_learning_is_justified_and_is_the_real_one() -> None:
    from q4kd.trainer.config.settings import DistillConfig

    page = (ROOT / "docs" / "explanation" / "defaults.md").read_text(encoding="utf-8")
    said = dict(re.findall(r"^\| `(\w+)` \| `([^`]+)` \| \S", page, re.MULTILINE))
    real = {field.name: str(field.default) for field in dataclasses.fields(DistillConfig)}
    assert said == {name: real.get(name) for name in said}
    groups = {"loss", "batch", "optimizer", "checkpoints"}
    steering = {f.name for f in dataclasses.fields(DistillConfig) if f.metadata["group"] in groups}
    assert {"lr", "schedule", "warmup_steps", "packing"} | steering <= said.keys()


def test_links_of_the_pages_outside_the_site_lead_somewhere() -> None:
    for page in [path for path in ROOT.glob("*.md") if path.name != "CHANGELOG.md"]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (ROOT / target).exists(), f"{page.name}: {target}"


def test_the_help_shown_in_the_readme_is_the_real_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["--help"]) == 0
    real = capsys.readouterr().out.splitlines()
    (block,) = [
        body for _, body in _FENCE.findall((ROOT / "README.md").read_text()) if body.startswith("$ q4kd --help")
    ]
    # A command may be newer than the README; what is shown must be true.
    assert [line for line in block.splitlines()[1:] if line not in real] == []


def test_files_and_what_is_looked_for_in_them_are_there() -> None:
    for path in [*PAGES, ROOT / "ARCHITECTURE.md", *(ROOT / "contracts").glob("*.yaml")]:
        text = " ".join(path.read_text(encoding="utf-8").split())
        for file in re.findall(r"(?<![\w/.-])(?:trainer|harness|tests|contracts|docs)/[\w/*.-]*\w", text):
            assert list(ROOT.glob(file)), f"{path.name}: {file}"
        # "look at first, then second and third in trainer/file.py"
        for names, file in re.findall(r"((?:[\w.]+(?:, | and )){0,2}[\w.]+) in ((?:trainer|harness)/[\w/]+\.py)", text):
            source = (ROOT / file).read_text(encoding="utf-8")
            for name in re.findall(r"\w*_\w+|\w+[a-z][A-Z]\w+", names):
                assert name in source, f"{path.name}: {name} in {file}"


def test_help_of_a_command_is_reachable_from_its_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distil"]) == 2
    assert "--help" in capsys.readouterr().err


_TYPE = re.compile(r"\b(?:I?Q\d|TQ\d|MXFP|NVFP|BF1|F\d)\w*")


def test_the_documented_types_and_families_are_those_that_are_read() -> None:
    """README and the page of teachers list the registries: nothing less, nothing more, and how large a type is."""
    page = (ROOT / "docs/how-to/teachers.md").read_text(encoding="utf-8").partition("## How right they are")[0]
    rows = [re.findall(r"[^|]+", line) for line in page.splitlines() if line.startswith("|")]
    families = {cells[0].strip(): cells[1] for cells in rows[2:] if len(cells) == 3}
    assert sorted(name for names in families for name in names.split(", ")) == sorted(FAMILIES)
    told = {}
    for cells in (cells for cells in rows if len(cells) == 6):
        for names, bits in zip(cells[::2], cells[1::2], strict=True):
            if found := _TYPE.findall(names):
                told |= dict(zip(found, map(float, bits.split(",")), strict=True))
    assert told == {name: 8 * form.block_bytes / form.block_size for name, form in FORMATS.items()}
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    sentence = text[text.index("A teacher is a GGUF file of") :].partition("What would give")[0]
    assert sorted(_TYPE.findall(sentence)) == sorted(FORMATS)
    makers = set(re.findall(r"[A-Z][A-Za-z]+", " ".join(families.values())))
    assert makers == {name for name in makers if name in sentence}
