"""The model card, parsed by huggingface_hub as the Hub parses it."""

import pytest

huggingface_hub = pytest.importorskip("huggingface_hub")

from q4kd.trainer.export.model_card import Evidence, cell, program_version, write_card  # noqa: E402
from q4kd.trainer.export.run_record import RunRecord  # noqa: E402

FILES = {"model.safetensors": (1234, "f" * 64)}
RECORD = RunRecord(
    step=4,
    steps=8,
    config={"lr": 0.1, "teacher": "t.gguf"},
    teacher={"file": "t.gguf", "sha256": "a" * 64, "bytes": 7},
    student={"folder": "small", "config_sha256": "b" * 64},
    data_sha256="c" * 64,
    evaluations={
        0: {"loss": 7.0, "kl": 4.0, "agreement": 0.0, "tokens": 64.0},
        4: {"loss": 2.0, "kl": 0.25, "agreement": 0.5, "tokens": 64.0},
    },
    missing=("the weather",),
)
EVIDENCE = Evidence(
    bundle="b.tar.gz",
    profile="cpu",
    commit="e" * 40,
    headline="1 claim corroborated",
    caveats=["not signed"],
    verdicts=[("c-v1::X-1", "corroborated", "0 of 9 | differ")],
)


def test_the_hub_reads_the_metadata() -> None:
    card = huggingface_hub.ModelCard(write_card("tiny", RECORD, files=FILES))
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.tags == ["q4kd", "knowledge-distillation"]
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert values == {"loss": 2.0, "perplexity": 7.389056, "kl_divergence": 0.25, "accuracy": 0.5}


def test_the_text_says_where_the_model_comes_from() -> None:
    text = write_card("tiny", RECORD, files=FILES)
    for part in ("a" * 64, "b" * 64, "c" * 64, "f" * 64, "4 of 8", "Not known: the weather.", "lr: 0.1", "0.2500"):
        assert part in text
    assert "| 4 | 2.0000 | 7.389 | 0.2500 | 50.00 % | 64 |" in text
    assert program_version() in text
    assert "Contract verdicts" not in text


def test_a_model_without_a_run_has_a_card_without_figures() -> None:
    text = write_card("tiny", None, files=FILES)
    card = huggingface_hub.ModelCard(text)
    assert card.data.eval_results is None
    assert card.data.tags == ["q4kd"]
    assert "not recorded" in text
    assert "Provenance" not in text


def test_an_evaluation_of_other_weights_is_no_result() -> None:
    record = RunRecord(step=3, evaluations=RECORD.evaluations)
    assert huggingface_hub.ModelCard(write_card("tiny", record, files=FILES)).data.eval_results is None


def test_verdicts_are_quoted_with_their_caveats() -> None:
    text = write_card("tiny", RECORD, files=FILES, evidence=EVIDENCE)
    for part in (
        "1 claim corroborated",
        "e" * 40,
        "Note: not signed.",
        r"| c-v1::X-1 | corroborated | 0 of 9 \| differ |",
    ):
        assert part in text
    assert "not about the quality of this model" in text


def test_hostile_values_stay_text() -> None:
    record = RunRecord(
        step=1,
        config={"data": "x\n```\n# Owned\n---\nlicense: mit", "a": {"b": [1]}},
        teacher={"file": "t|<img src=x>\n# Owned\n[a](javascript:1)", "sha256": "`x`"},
        missing=("m\n---\n",),
    )
    text = write_card("tiny", record, files={"a|b": (1, "d")})
    assert "\n# Owned" not in text
    assert "<img" not in text.replace("\\<img", "")
    assert text.count("```") == 4  # the two blocks of the template
    assert huggingface_hub.ModelCard(text).data.to_dict().get("license") is None


def test_a_cell_is_one_bounded_line() -> None:
    assert cell("a\nb\x1b[31m|") == r"a b \[31m\|"
    assert len(cell("x" * 10_000)) < 400
