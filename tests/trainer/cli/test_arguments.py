"""Every setting is a flag, a schema entry and a line of --print-config; the last source of a value wins."""

import argparse
import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

import q4kd.trainer
from q4kd.harness.__main__ import main
from q4kd.trainer.cli.arguments import ELSEWHERE, add_run_arguments, read_run_arguments
from q4kd.trainer.config.run_file import format_config, run_schema
from q4kd.trainer.config.settings import DistillConfig, make_config, settings
from q4kd.trainer.errors import InputError
from q4kd.trainer.loss.config import DIVERGENCES

BASE = ["--teacher", "t.gguf", "--student", "s", "--data", "d", "--out", "o"]
FIELDS = dataclasses.fields(DistillConfig)


def read(*words: str) -> DistillConfig:
    parser = argparse.ArgumentParser()
    add_run_arguments(parser)
    return read_run_arguments(parser.parse_args([*BASE, *words]))


def test_every_setting_is_in_the_help_with_its_default_and_unit(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distill", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for setting in settings().values():
        assert f"--{setting.name.replace('_', '-')}" in text
        if not setting.is_required:
            assert f"default: {setting.default_text}" in text
        assert setting.unit in text


def test_flags_override_the_file_and_set_overrides_flags(tmp_path: Path) -> None:
    file = tmp_path / "RUN.yaml"
    file.write_text("lr: 1e-3\nlora_rank: 4\nstreaming: true\nsteps: 7\nkeep: 3\n")
    config = read(
        str(file), "--lora-rank", "16", "--no-streaming", "--keep", "5", "--set", "keep=6", "--set", "steps=null"
    )
    assert (config.lr, config.lora_rank, config.streaming, config.keep, config.steps) == (1e-3, 16, False, 6, None)


def test_settings_that_a_command_omits_may_be_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "RUN.yaml"
    file.write_text("lora_rank: 4\n")
    parser = argparse.ArgumentParser()
    add_run_arguments(parser, omit=("lora_rank",))
    assert "--lora-rank" not in parser.format_help()
    assert read_run_arguments(parser.parse_args([str(file), *BASE])).lora_rank == 4


def test_the_printed_config_is_the_config(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data-glob", "**/#*.py", "--lr", "1e-4", "--trackers", "", "--text-field", "yes"]
    assert main(["distill", *BASE, *words, "--print-config"]) == 0
    text = capsys.readouterr().out
    assert make_config(yaml.safe_load(text)) == read(*words)
    assert "lr: 0.0001  # default: 2.0e-05" in text
    assert "\nalpha: 0.1\n" in text
    assert format_config(read()).count("# default") == 1  # the teacher


def test_the_shipped_schema_is_the_current_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["distill", "--print-schema"]) == 0
    printed = capsys.readouterr().out
    shipped = Path(q4kd.trainer.__path__[0]) / "run.schema.json"
    assert shipped.read_text() == printed, "q4kd distill --print-schema > trainer/config/run.schema.json"


def test_the_schema_refuses_what_the_config_refuses() -> None:
    schema = Draft202012Validator(json.loads(run_schema()))
    schema.check_schema(schema.schema)
    assert schema.is_valid(yaml.safe_load(format_config(read("--lr", "1e-4"))))
    for wrong in (
        {"lrr": 1},
        {"lr": -1.0},
        {"batch_size": 2.5},
        {"divergence": "kl"},
        {"compile": "x"},
        {"seed": None},
    ):
        assert not schema.is_valid(wrong), wrong
        with pytest.raises(Exception, match="setting"):
            make_config({"teacher": "t", "student": "s", "data": "d", "out": "o", **wrong})


def test_divergences_are_those_of_the_loss() -> None:
    of_setting = next(setting.metadata["choices"] for setting in FIELDS if setting.name == "divergence")
    assert of_setting == DIVERGENCES == ("forward_kl", "reverse_kl", "jsd")


def test_names_of_other_trainers_are_answered_with_ours(capsys: pytest.CaptureFixture[str]) -> None:
    names = {setting.name for setting in FIELDS}
    assert set(ELSEWHERE.values()) <= names
    assert not names & set(ELSEWHERE)
    with pytest.raises(InputError, match=r"did you mean lr\?"):
        read("--set", "learning_rate=1e-4")
    for word, meant in (("--learning-rate=1", "--lr"), ("--batchsize", "--batch-size"), ("--output_dir", "--out")):
        assert main(["distill", *BASE, word]) == 2
        assert f"did you mean {meant}?" in capsys.readouterr().err
    assert main(["inspect", "m.gguf", "--learning-rate"]) == 2  # it has no such option
    assert "did you mean" not in capsys.readouterr().err
