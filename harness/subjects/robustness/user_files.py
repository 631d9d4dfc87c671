"""Experiments on files that are not the run's own: what it may not delete, and what it may not go on with."""

from pathlib import Path

from q4kd.harness.inputs.collect import collect_probe
from q4kd.harness.inputs.command_lines import distill_words, probe_words, set_words
from q4kd.harness.inputs.small_pair import completions, small_student, small_teacher
from q4kd.harness.runs.experiment import ONE_THREAD, Arm, Inputs, declare
from q4kd.trainer.files import write_json


def _words(inputs: Inputs, **settings: object) -> list[str]:
    every = {"steps": 3, "eval_tokens": 0, "packing": "none", "batch_size": 2, **settings}
    data = completions(inputs, "user-files.jsonl", 0, 40)
    return distill_words(small_teacher(inputs), small_student(inputs), data, *set_words(every))


declare(
    "foreign-files",
    "runs in folders where the student, somebody's file or a link lies at the name of the final model",
    Arm(
        None,
        lambda inputs: ["probe", "foreign-files", "--out", "probe.json", "--", *_words(inputs)],
        timeout_s=200,
        env=ONE_THREAD,
    ),
    collect=collect_probe,
)


def _night_argv(inputs: Inputs) -> list[str]:
    return probe_words("night-in-a-project", contracts=inputs.file("one-contract", _write_contract), out="probe.json")


def _write_contract(folder: Path) -> None:
    folder.mkdir()
    claim = {"id": "FT-1", "rule": "a rule", "prediction": "one", "if_fails": "look"}
    write_json(folder / "one.yaml", {"falsification_tests": [claim]})  # JSON is YAML


declare(
    "night-in-a-project",
    "q4kd nightly --keep 1 in folders with somebody's files under the names of its own, twice each",
    Arm(None, _night_argv, timeout_s=120, env=ONE_THREAD),
    collect=collect_probe,
)

declare(
    "hostile-folder",
    "q4kd falsify, and a stage of q4kd nightly, started in a folder of Python files with the names of modules",
    Arm(
        None,
        lambda inputs: probe_words(
            "hostile-folder", contracts=inputs.file("one-contract", _write_contract), out="probe.json"
        ),
        timeout_s=120,
        env=ONE_THREAD,
    ),
    collect=collect_probe,
)

declare(
    "other-inputs",
    "a run with LoRA resumed after its teacher's or its student's file was replaced at its path, and with the same",
    Arm(
        None,
        lambda inputs: ["probe", "other-inputs", "--out", "probe.json", "--", *_words(inputs, lora_rank=2)],
        timeout_s=200,
        env=ONE_THREAD,
    ),
    collect=collect_probe,
)
