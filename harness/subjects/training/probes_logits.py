"""Measurements of students with something of their own: scaled or capped logits, a window, transposed layers."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from q4kd.harness.inputs.arrays import Arrays, read_arrays, save_arrays
from q4kd.harness.runs.probes import probe

if TYPE_CHECKING:
    from torch import Tensor


@probe("student-logits")
def student_logits(arrays: Path, windowed: Path, layered: Path, transposed: Path, out: Path, /, *folders: str) -> None:
    """Take the loss of each student in both modes, and its evaluation, against given teacher logits.

    Beside them, the logits of packed documents in the ``windowed`` and ``layered`` students and those of each document
    alone, and what adapters do to the logits of the ``transposed`` one, as they are and merged.

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

    found: Arrays = _adapted(transposed, ids)
    packed = [_packed(folder, ids) for folder in (windowed, layered)]
    found |= {name: np.concatenate([arrays[name] for arrays in packed]) for name in ("packed", "alone")}
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


def _packed(folder: Path, ids_1T: "Tensor") -> Arrays:
    """Return logits of two documents of a third and two thirds of ``ids`` in one window, and of each by itself."""
    import torch

    from q4kd.trainer.loss.config import KDLossConfig
    from q4kd.trainer.student.model import DistillationModel, load_student

    student = load_student(folder, seed=1)
    model = DistillationModel(student, KDLossConfig()).eval()
    length = ids_1T.shape[1]
    lengths = [length // 3, length - length // 3]
    starts = torch.repeat_interleave(torch.tensor([0, lengths[0]]), torch.tensor(lengths))[None]
    border = lengths[0]
    with torch.no_grad():
        packed = model.head.logits(model.hidden(ids_1T, starts)[0])
        alone = torch.cat([student(part).logits[0] for part in (ids_1T[:, :border], ids_1T[:, border:])])
    return {"packed": packed.numpy(), "alone": alone.numpy()}


def _adapted(folder: Path, ids_1T: "Tensor") -> Arrays:
    """Return by how much random adapters move the logits, in place and merged by the trainer."""
    import torch

    from q4kd.trainer.config.settings import make_config
    from q4kd.trainer.student.lora import add_adapters, merged_state
    from q4kd.trainer.student.model import load_student
    from q4kd.trainer.train.distributed import whole_state

    config = make_config({"teacher": ".", "student": folder, "data": ".", "out": ".", "lora_rank": 4})
    student, plain = load_student(folder, seed=1), load_student(folder, seed=1)
    adapted = add_adapters(student, config)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in student.named_parameters():
        if "lora_" in name:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)

    def logits(model: torch.nn.Module) -> "Tensor":
        model.eval()
        with torch.no_grad():
            found: Tensor = model(ids_1T).logits[0]
        return found

    before, moved = logits(plain), logits(student)
    plain.load_state_dict(merged_state(adapted, whole_state(student, keep=True)), strict=False)
    return {"in place": (moved - before).numpy(), "merged": (logits(plain) - before).numpy()}
