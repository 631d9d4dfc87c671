"""A probe's command line is made from its typed arguments; each probe of the program is declared once."""

from pathlib import Path
from typing import Literal

import pytest

from q4kd.harness.runs import probes
from q4kd.harness.runs.probes import PROBES, probe

SEEN: list[object] = []


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> probes._Registry:
    made = probes._Registry()
    monkeypatch.setattr(probes, "PROBES", made)
    monkeypatch.setattr(probes, "subject_modules", lambda kind: ())
    SEEN.clear()
    return made


def test_options_have_the_types_and_defaults_of_the_parameters(registry: probes._Registry) -> None:
    @probe("typed")
    def typed(out: Path, warm_up: int, many: tuple[Path, ...], kind: Literal["a", "b"] = "a", on: bool = False) -> None:
        SEEN.append((out, warm_up, list(many), kind, on))

    assert registry["typed"](["--out", "x", "--warm-up", "3", "--many", "p", "q"]) == 0
    assert registry["typed"](["--many", "p", "--on", "--kind", "b", "--out", "y", "--warm-up", "0"]) == 0
    assert [
        (Path("x"), 3, [Path("p"), Path("q")], "a", False),
        (Path("y"), 0, [Path("p")], "b", True),
    ] == SEEN
    # The function itself stays callable with its own arguments.
    typed(Path("z"), 1, ())
    assert SEEN[-1] == (Path("z"), 1, [], "a", False)


@pytest.mark.parametrize(
    "arguments", [[], ["--out"], ["--out", "x", "--kind", "c"], ["--ou", "x"], ["--out", "x", "more"]]
)
def test_what_a_probe_does_not_take_is_refused(
    registry: probes._Registry, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    @probe("strict")
    def strict(out: Path, kind: Literal["a", "b"] = "a") -> None:
        SEEN.append((out, kind))

    with pytest.raises(SystemExit) as ended:
        registry["strict"](arguments)
    assert ended.value.code == 2
    assert "probe strict" in capsys.readouterr().err
    assert SEEN == []


def test_words_after_the_dashes_are_passed_on_as_they_are(registry: probes._Registry) -> None:
    @probe("passes")
    def passes(*words: str, out: Path) -> int:
        SEEN.append((words, out))
        return len(words)

    @probe("first")
    def first(kind: Literal["one", "two"], /, *words: str) -> None:
        SEEN.append((kind, words))

    assert registry["passes"](["--out", "x", "--", "distill", "--out", "--", "run"]) == 4
    assert registry["first"](["two", "distill", "--out", "--", "run"]) == 0
    assert [(("distill", "--out", "--", "run"), Path("x")), ("two", ("distill", "--out", "--", "run"))] == SEEN
    for name, arguments in (("passes", ["--out", "x"]), ("first", ["three", "distill"])):
        with pytest.raises(SystemExit):
            registry[name](arguments)


def test_a_name_is_registered_once(registry: probes._Registry) -> None:
    probe("same")(lambda: None)
    with pytest.raises(ValueError, match="'same' is registered twice"):
        probe("same")(lambda: None)


def test_every_probe_describes_its_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(PROBES) == 46
    for name in PROBES:
        with pytest.raises(SystemExit) as ended:
            PROBES[name](["--help", "--"])
        assert ended.value.code == 0, name
        assert f"usage: probe {name}" in capsys.readouterr().out
