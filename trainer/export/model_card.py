"""README.md of an exported model: what made it, from what, how well it did, and which claims about the program hold."""

import importlib.metadata
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from q4kd.trainer.export.run_record import RunRecord

_MAX_CELL = 300


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Verdicts of an evidence bundle that was verified.

    Attributes:
        bundle: its name.
        profile: machine profile it was judged on.
        commit: commit of the program that was judged.
        headline: the bundle's outcome in one line.
        caveats: what verification could not establish.
        verdicts: (contract::claim, verdict, what was measured) of each claim.
    """

    bundle: str
    profile: str
    commit: str
    headline: str
    caveats: Sequence[str]
    verdicts: Sequence[tuple[str, str, str]]


def program_version() -> str:
    """Return the version of q4kd, as installed."""
    try:
        return importlib.metadata.version("q4kd")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def provenance(record: RunRecord) -> dict[str, str]:
    """Return where a model comes from, as ``{what: value}``; only what is recorded."""
    teacher, student = record.teacher, record.student
    entries = {
        "teacher": teacher.get("file"),
        "teacher SHA-256": teacher.get("sha256"),
        "teacher bytes": teacher.get("bytes"),
        "student before training": student.get("folder"),
        "student config SHA-256": student.get("config_sha256"),
        "training tokens SHA-256": record.data_sha256,
        "steps": f"{record.step} of {record.steps}" if record.steps is not None else record.step,
    }
    return {key: str(value) for key, value in entries.items() if value is not None}


def write_card(
    title: str, record: RunRecord | None, *, files: Mapping[str, tuple[int, str]], evidence: Evidence | None = None
) -> str:
    """Return the content of README.md: YAML metadata that the Hugging Face Hub reads, then text.

    ``files`` are the weight files, name to (bytes, SHA-256); a model that no run made has no record.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    # The template is Markdown, not HTML; the filter ``cell`` makes harmless what a folder may have put into a value.
    environment = Environment(  # noqa: S701
        loader=PackageLoader("q4kd.trainer.export"), undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.filters["cell"] = cell
    evaluations = sorted(record.evaluations.items()) if record else []
    return environment.get_template("model_card.md.j2").render(
        card_data=_card_data(title, record).to_yaml(),
        title=title,
        version=program_version(),
        record=record,
        provenance=provenance(record) if record else {},
        evaluations=[(step, _row(result)) for step, result in evaluations],
        config=_yaml(record.config) if record else "",
        evidence=evidence,
        files=files,
    )


def cell(value: object) -> str:
    """Return one line of plain text: no markup, no table borders, no control characters, bounded."""
    text = "".join(char if char.isprintable() else " " for char in str(value))
    for mark in "|`<>[]*_":
        text = text.replace(mark, f"\\{mark}")
    return text if len(text) <= _MAX_CELL else f"{text[:_MAX_CELL]} …"


def _row(result: Mapping[str, float]) -> dict[str, float]:
    return {**result, "perplexity": math.exp(min(result["loss"], 700.0))}


def _yaml(config: Mapping[str, Any]) -> str:
    text: str = yaml.safe_dump(dict(config), allow_unicode=False, sort_keys=True)
    return text.replace("`", "'")


def _card_data(title: str, record: RunRecord | None) -> Any:
    from huggingface_hub import EvalResult, ModelCardData

    results = []
    if record and (held_out := record.held_out):
        metrics = {
            "loss": ("held-out cross-entropy, nats per token", held_out["loss"]),
            "perplexity": ("held-out perplexity", _row(held_out)["perplexity"]),
            "kl_divergence": ("held-out KL(teacher || student), nats per token", held_out.get("kl")),
            "accuracy": ("held-out top-1 agreement with the teacher", held_out.get("agreement")),
        }
        results = [
            EvalResult(
                task_type="text-generation",
                dataset_type="held-out",
                dataset_name="held-out part of the training data",
                metric_type=kind,
                metric_name=name,
                metric_value=round(value, 6),
            )
            for kind, (name, value) in metrics.items()
            if value is not None
        ]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["q4kd", "knowledge-distillation"] if record else ["q4kd"],
        model_name=title if results else None,
        eval_results=results or None,
    )
