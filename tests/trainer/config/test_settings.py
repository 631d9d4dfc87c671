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
