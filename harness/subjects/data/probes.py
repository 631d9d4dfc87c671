"""Measurements on training data: the batches a run would take, and the logits of windows with several documents."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from q4kd.harness.inputs.arrays import Arrays, save_arrays
from q4kd.harness.runs.probes import probe
from q4kd.trainer.files import read_json

if TYPE_CHECKING:
    from q4kd.trainer.data.training_data import Order


def _order(settings: Mapping[str, object], sequences: int) -> "Order":
    """Open the data of a run with these settings, as the run does."""
    from q4kd.trainer.config.settings import make_config
    from q4kd.trainer.data import training_data
    from q4kd.trainer.student.model import encoder, load_tokenizer

    config = make_config(settings)
    tokenizer = load_tokenizer(config.student)
    documents = training_data.make_encoder(config, tokenizer, encoder(tokenizer), len(tokenizer))
    return training_data.open_data(config, documents, sequences, None).order


@probe("training-batches")
def training_batches(cases: Path, out: Path, resumed: bool = False) -> None:
    """Save the batches of some steps under several settings: ids, labels and starts ``[steps * sequences, T]``.

    ``--resumed`` takes only the later steps, as a run does that starts again there.
    """
    arrays: Arrays = {}
    for name, case in read_json(cases).items():
        if resumed and case["resume"] == case["steps"]:
            continue
        order = _order(case["settings"], case["sequences"])
        batches = [order.batch(step) for step in range(case["resume"] if resumed else 0, case["steps"])]
        arrays[f"{name}-ids"] = np.concatenate([batch.ids_BT.numpy() for batch in batches])
        arrays[f"{name}-labels"] = np.concatenate([batch.labels_BT.numpy() for batch in batches])
        starts = [np.zeros_like(b.ids_BT.numpy()) if b.starts_BT is None else b.starts_BT.numpy() for b in batches]
        arrays[f"{name}-starts"] = np.concatenate(starts)
    save_arrays(out, arrays)


@probe("packed-logits")
def packed_logits(cases: Path, out: Path) -> None:
    """Save the first batch of a run, and the logits of teacher and student on it, float32 ``[B, T, V]``."""
    (case,) = read_json(cases).values()

    import torch

    from q4kd.trainer.device.placement import place_teacher
    from q4kd.trainer.events import EventLog
    from q4kd.trainer.loss.config import KDLossConfig
    from q4kd.trainer.student import model as student
    from q4kd.trainer.teacher.teacher import load_teacher

    batch = _order(case["settings"], case["sequences"]).batch(0)
    teacher = load_teacher(place_teacher(Path(case["settings"]["teacher"]), dtype="float32"), events=EventLog(None))
    causal_lm = student.load_student(Path(case["settings"]["student"]), seed=1)
    model = student.DistillationModel(causal_lm, KDLossConfig()).eval()
    shape = (*batch.ids_BT.shape, -1)
    with torch.no_grad():
        hidden_MH = teacher.hidden(batch.ids_BT, batch.starts_BT).flatten(0, 1)
        student_BTV = model.hidden(batch.ids_BT, batch.starts_BT) @ model.head_weight.T
    arrays = {
        "ids": batch.ids_BT.numpy(),
        "labels": batch.labels_BT.numpy(),
        "teacher": teacher.head_logits(hidden_MH).view(shape).numpy(),
        "student": student_BTV.numpy(),
    }
    save_arrays(out, arrays)
