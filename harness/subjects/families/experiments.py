"""The experiment on students of other families: those that no run can train are refused by their config alone."""

from pathlib import Path

from q4kd.harness.inputs.collect import probe_cases
from q4kd.harness.inputs.command_lines import probe_words
from q4kd.harness.runs.experiment import ONE_THREAD, Arm, Facts, Inputs, experiment
from q4kd.trainer.files import write_json

_SIZES: dict[str, object] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 8,
}
_CONVOLUTIONS = {"layer_types": ["conv", "full_attention"]}
# Each case: its name, its config, and what of a valid run is other.
_CASES: tuple[tuple[str, dict[str, object], dict[str, object]], ...] = (
    ("a head with a bias", {"model_type": "phi"}, {"config": {"model_type": "gpt_neox"}}),
    ("layers that keep a state", {"model_type": "mamba", "state_size": 4}, {"packed": False}),
    ("convolutions in some layers", {"model_type": "lfm2", **_CONVOLUTIONS}, {"packed": False}),
)


def _cases(inputs: Inputs) -> Path:
    def make(path: Path) -> None:
        records = []
        for name, config, valid in _CASES:
            case = {"case": name, "config": {**_SIZES, **config}, "packed": True, "length": 16}
            changed = valid if "config" not in valid else {"config": {**_SIZES, **valid["config"]}}  # type: ignore[dict-item]
            records.append({**case, "twin": {**case, **changed}})
        write_json(path, {"cases": records})

    return inputs.file("family-cases.json", make)


@experiment(
    "student-families",
    "students of other families, planned for packed documents, each beside one that can be trained",
    Arm(None, lambda inputs: probe_words("plan-students", cases=_cases(inputs), out="probe.json"), 60, env=ONE_THREAD),
)
def _collect_families(run_dir: Path, _inputs: Inputs) -> Facts:
    return {"cases": probe_cases(run_dir)}
