"""Folders of runs, made file by file."""

import json
from pathlib import Path

import torch

from q4kd.trainer.train.checkpoint import CheckpointState, CheckpointTensors, save_checkpoint
from q4kd.trainer.train.kept_checkpoints import prune_checkpoints


def make_run(
    run: Path, *, config: dict | None = None, model: bool = True, steps=(2, 4, 6), written: bool = True
) -> Path:
    """Write a run of six steps whose second checkpoint was the best by KL, and its third by loss."""
    run.mkdir()
    settings = {"student": str(run.parent / "student"), "teacher": "/home/me/t.gguf", "lr": 0.1, **(config or {})}
    figures = {2: (3.0, 0.9, 0.5), 4: (2.9, 0.3, 0.6), 6: (2.8, 0.4, 0.7)}
    evaluations = {
        step: {"loss": loss, "kl": kl, "agreement": agreement, "tokens": 64}
        for step, (loss, kl, agreement) in figures.items()
    }
    tensors = CheckpointTensors({"w": torch.ones(2)}, {"w|m": torch.ones(2)}, {"cpu": torch.ones(1, 2)})
    for step in steps:
        save_checkpoint(run, tensors, CheckpointState(step, settings, "d1", evaluations.get(step)))
    prune_checkpoints(run, 9, settings.get("best_metric", "kl"))
    if model:
        make_model_folder(run / "model")
    document = {"version": 1, "config": settings, "steps": 6, "data_sha256": "d1"}
    document |= {"teacher": {"file": "/x/t.gguf", "sha256": "ab", "bytes": 7}, "student": {"folder": "student"}}
    if written:
        (run / "run.json").write_text(json.dumps(document))
    (run / "summary.json").write_text(json.dumps({"steps": 6, "steps_of_full_run": 6}))
    events = [{"event": "eval", "step": step, **values} for step, values in evaluations.items()]
    lines = [json.dumps(event) for event in (*events, {"event": "step", "step": 3})]
    # Half a line, one of another kind, one whose numbers are texts, as a killed or a hostile run may leave.
    lines += ['{"event": "eval", "step": 8, "lo', '["eval"]', '{"event": "eval", "step": 9, "loss": "nan"}', "[" * 5000]
    (run / "events.jsonl").write_text("\n".join(lines))
    return run


def make_model_folder(folder: Path) -> Path:
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_text("{}")
    return folder
