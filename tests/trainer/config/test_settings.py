"""Settings: one line for what is wrong, and nothing accepted that would be ignored."""

from pathlib import Path

import pytest
import yaml

from q4kd.trainer.config.run_file import parse_assignment, read_run_file
from q4kd.trainer.config.settings import make_config
from q4kd.trainer.errors import InputError

BASE: dict[str, object] = {"teacher": "t.gguf", "student": "s", "data": "d", "out": "o"}


def test_defaults_and_conversions() -> None:
    config = make_config(BASE | {"lr": "1e-4", "temperature": 2, "steps": None})
    assert (config.lr, config.temperature, config.steps) == (1e-4, 2.0, None)
    assert config.teacher == Path("t.gguf")
    assert config.loss.temperature == 2.0
    assert make_config(config.to_json()) == config


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"learning_rate": 1}, "learning_rate"),
        ({"warmup_step": 1}, "did you mean warmup_steps?"),
        ({"teacher": None}, "--teacher"),
        ({"batch_size": 0}, "from 1"),
        ({"batch_size": 2.5}, "int"),
        ({"batch_size": True}, "int"),
        ({"alpha": 1.5}, "from 0 to 1"),
        ({"alpha": "much"}, "float"),
        ({"lr": float("nan")}, "float"),
        ({"divergence": "kl"}, "forward_kl or reverse_kl or jsd"),
        ({"max_steps": 0}, "from 1"),
        ({"allow_degenerate_kd": 1}, "bool"),
        ({"teacher": 3}, "Path"),
    ],
)
def test_bad_settings_are_one_line(values: dict[str, object], words: str) -> None:
    with pytest.raises(InputError) as caught:
        make_config(BASE | values)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_assignments() -> None:
    assert parse_assignment("lr=1e-4") == ("lr", "1e-4")
    assert parse_assignment("steps=5") == ("steps", 5)
    assert parse_assignment("data_glob=**/*.py") == ("data_glob", "**/*.py")
    for text in ("lr", "=3"):
        with pytest.raises(InputError, match="key=value"):
            parse_assignment(text)


def test_run_file(tmp_path: Path) -> None:
    path = tmp_path / "RUN.yaml"
    path.write_text("lr: 1.0e-4\nsteps: 3\n")
    assert read_run_file(path) == {"lr": 1e-4, "steps": 3}
    for text in ("- a\n", "a: [", "!!python/object:os.system {}\n"):
        path.write_text(text)
        with pytest.raises(InputError, match="expected"):
            read_run_file(path)
    with pytest.raises(InputError, match="No such file"):
        read_run_file(tmp_path / "none.yaml")


def test_the_words_of_yaml_1_1_mean_in_a_run_file_what_they_always_did(tmp_path: Path) -> None:
    path = tmp_path / "RUN.yaml"
    text = "compile: no\neval: on\nsteps: 1_000\nseed: 0x10\nlr: 1e-4\nnote: 'no'\nout:\n"
    path.write_text(text)
    assert read_run_file(path) == yaml.safe_load(text)
    for text in ("created: 2026-13-01\n", "lr: =\n"):
        path.write_text(text)
        with pytest.raises(InputError, match=r"RUN\.yaml:1: .*well-formed YAML"):
            read_run_file(path)


def test_a_key_given_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "RUN.yaml"
    path.write_text("lr: 1.0e-4\nsteps: 3\nlr: 1.0\n")
    with pytest.raises(InputError, match=r"RUN.yaml:3: `lr: 1.0`: .*the key 'lr' again \(first on line 1\)"):
        read_run_file(path)


NINES = "9" * 5000


@pytest.mark.parametrize(
    "value",
    ["2001-99-99", "!!bool x", "!!float x", "!!timestamp x", "!!map x", NINES, "1" + ":1" * 100_000, "[&a [*a]]"],
)
def test_whatever_yaml_makes_of_a_value_is_one_line(tmp_path: Path, value: str) -> None:
    path = tmp_path / "RUN.yaml"
    path.write_text(f"student: s\ndata: d\nout: o\nteacher: t\nlr: {value}\n")
    for values in (lambda: read_run_file(path), lambda: dict([parse_assignment(f"lr={value}")])):
        with pytest.raises(InputError) as caught:
            make_config({"student": "s", "data": "d", "out": "o", "teacher": "t", **values()})
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 1000


def test_an_alias_bomb_is_refused_at_once(tmp_path: Path) -> None:
    rows = [f"&a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10)]
    bomb = f"[&a0 [x], {', '.join(rows)}]"
    (tmp_path / "RUN.yaml").write_text(f"lr: {bomb}\n")
    with pytest.raises(InputError):
        read_run_file(tmp_path / "RUN.yaml")
    with pytest.raises(InputError, match="setting lr"):
        make_config({"student": "s", "data": "d", "out": "o", "teacher": "t", **dict([parse_assignment(f"lr={bomb}")])})


def test_values_of_begin_of_text_and_chat_date_may_be_written_as_yaml_reads_them() -> None:
    required: dict[str, object] = {"student": "s", "data": "d", "out": "o", "teacher": "t"}
    for text, wanted in (("true", "true"), ("False", "false"), ("auto", "auto")):
        found = make_config({**required, **dict([parse_assignment(f"begin_of_text={text}")])})
        assert found.begin_of_text == wanted
    assert make_config({**required, **dict([parse_assignment("chat_date=2026-11-30")])}).chat_date == "2026-11-30"
    for wrong in ("2026-13-01", "yesterday", "[1]"):
        with pytest.raises(InputError, match="chat_date"):
            make_config({**required, **dict([parse_assignment(f"chat_date={wrong}")])})
