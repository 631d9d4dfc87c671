"""Measurements of students that scale or cap their logits: the trainer's terms and gradients, transformers' logits."""

from pathlib import Path

import numpy as np

from q4kd.harness.inputs.arrays import Arrays, read_arrays, save_arrays
from q4kd.harness.runs.probes import probe


@probe("student-logits")
def student_logits(arrays: Path, out: Path, /, *folders: str) -> None:
    """Take the loss of each student in both modes, and its evaluation, against given teacher logits.

    ``arrays`` holds ids int ``[T]``, labels int ``[T]`` and teacher float ``[T, V]``. Saved for each folder, by its
    name: ``terms`` (loss, ce, kd of fast and of low, then the evaluation's loss), ``gradient`` of the head in fast,
    ``hidden`` and transformers' ``logits``.
    """
    import torch

    from q4kd.trainer.data.batch import Batch
    from q4kd.trainer.loss import fused
    from q4kd.trainer.loss.config import KDLossConfig
    from q4kd.trainer.loss.teacher_head import DenseHead
    from q4kd.trainer.student.model import DistillationModel, load_student
    from q4kd.trainer.train.distributed import make_accelerator
    from q4kd.trainer.train.evaluate import evaluate

    given = read_arrays(arrays)
    ids, labels = (torch.from_numpy(given[name]).long()[None] for name in ("ids", "labels"))
    teacher = torch.from_numpy(given["teacher"]).float()
    identity = DenseHead(torch.eye(teacher.shape[1]))

    class Signal:
        def loss(self, hidden_MH, weight_VH, labels_M, **options):  # type: ignore[no-untyped-def]
            return fused.kd_loss(
                hidden_MH, weight_VH, labels_M, teacher_hidden=teacher, teacher_head=identity, **options
            )

    found: Arrays = {}
    for folder in map(Path, folders):
        student = load_student(folder, seed=1)
        terms: list[float] = []
        for mode in ("low", "fast"):
            config = KDLossConfig(alpha=0.4, temperature=2.0, mode=mode, chunk_tokens=7, vocab_tile=24)
            model = DistillationModel(student, config).eval()
            student.zero_grad()
            result = model(ids, labels, Signal(), ids.numel())
            result.loss.backward()
            terms += [float(value.detach()) for value in (result.loss, result.ce, result.kd)]
        evaluation = evaluate(make_accelerator("cpu"), model, None, [Batch(ids, labels)])
        assert evaluation is not None
        with torch.no_grad():
            found[f"{folder.name}.hidden"] = model.hidden(ids)[0].numpy()
            found[f"{folder.name}.logits"] = student(ids).logits[0].numpy()
        found[f"{folder.name}.terms"] = np.array([*terms, evaluation.loss])
        gradient = model.head_weight.grad
        assert gradient is not None
        found[f"{folder.name}.gradient"] = gradient.numpy()
    save_arrays(out, found)
