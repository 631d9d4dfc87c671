"""How often a step makes the host wait for the device: the CUDA teacher and loss over their own kernels on the CPU."""

import functools
from typing import Any

import numpy as np
import pytest
import torch
from document_starts import starts_of
from host_kernels import HostLauncher, host_launcher
from host_reads import host_reads
from reference_kernels import device_tensors, widening_multiply
from run_settings import settings

from q4kd.trainer.data.batch import Batch
from q4kd.trainer.demo import student_path, teacher_path
from q4kd.trainer.device.placement import place_teacher
from q4kd.trainer.events import EventLog
from q4kd.trainer.kernels.teacher_kernels import Kernels
from q4kd.trainer.loss import fused as kd_loss
from q4kd.trainer.loss.config import DIVERGENCES, IGNORE_INDEX, KDLossConfig
from q4kd.trainer.loss.cuda import fused as loss
from q4kd.trainer.loss.cuda import tensors as loss_tensors
from q4kd.trainer.loss.cuda.kernels import LossKernels
from q4kd.trainer.student.model import load_student
from q4kd.trainer.teacher.cache.cached_teacher import CachedSignal
from q4kd.trainer.teacher.cache.signal import take_top
from q4kd.trainer.teacher.cuda import forward
from q4kd.trainer.teacher.teacher import Teacher, load_teacher
from q4kd.trainer.train.distributed import make_accelerator
from q4kd.trainer.train.evaluate import evaluate
from q4kd.trainer.train.optimizer import MasterWeightOptimizer
from q4kd.trainer.train.run.assembly import prepare_student
from q4kd.trainer.train.step import train_step

VOCAB, LENGTH = 2048, 6


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> HostLauncher:
    return host_launcher(tmp_path_factory)


@pytest.fixture
def teacher(launcher: HostLauncher, monkeypatch: pytest.MonkeyPatch) -> Teacher:
    """A teacher that computes as on CUDA, in a process whose loss does too."""
    monkeypatch.setattr(forward, "multiply", widening_multiply)
    monkeypatch.setattr(loss_tensors, "multiply", widening_multiply)
    run = functools.partial(loss.run_on_cuda, kernels=LossKernels("cpu", launcher))
    monkeypatch.setattr(kd_loss, "run_fast", run)
    monkeypatch.setattr(kd_loss, "run_low", run)
    teacher = load_teacher(
        place_teacher(teacher_path(), dtype="float32"), events=EventLog(None), announce=lambda _line: None
    )
    teacher._forward = forward.CudaForward(
        teacher.config,
        device_tensors(teacher.model),
        "q4k",
        Kernels("cpu", launcher),
        dtype=torch.float32,
        overlap=False,
        graphs=False,
    )
    return teacher


def packed_batch() -> Batch:
    """Four sequences of unequally many labels, the last of none; two of them hold two documents."""
    ids = torch.from_numpy(np.random.default_rng(1).integers(0, VOCAB, (4, LENGTH + 1)))
    kept = torch.arange(LENGTH) < torch.tensor([6, 3, 1, 0]).unsqueeze(1)
    labels = ids[:, 1:].masked_fill(~kept, IGNORE_INDEX)
    return Batch(ids[:, :-1].contiguous(), labels, starts_of([[6], [2, 4], [6], [5, 1]]))


def engine(**values: object) -> tuple[Any, Any, Any, Any]:
    config = settings(batch_size=2, accumulation=2, **values)
    accelerator = make_accelerator("cpu")
    model, optimizer, _ = prepare_student(config, accelerator, load_student(student_path(), 1))
    model.train()
    # As on CUDA, where the counts of steps lie beside the weights.
    fused = functools.partial(torch.optim.AdamW, lr=0.01, fused=True)
    return config, accelerator, model, MasterWeightOptimizer(optimizer.parameters.items(), fused)


def waits_of_a_step(teacher: Teacher | None, batch: Batch, **values: object) -> list[str]:
    config, accelerator, model, optimizer = engine(**values)
    assert len(list(batch.split(config.batch_size))) == 2
    train_step(accelerator, model, teacher, optimizer, batch, config, 0.01)  # first uses look at what torch can do
    with host_reads() as found:
        result = train_step(accelerator, model, teacher, optimizer, batch, config, 0.01)
    assert result.tokens == 10
    assert result.loss > 0
    return found


ONE_WAIT = ["tolist in step.py: loss, ce, kd, grad_norm = torch.cat([sums, norm.double().reshape(1)]).tolist()"]


@pytest.mark.parametrize("mode", ["fast", "low"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_the_host_waits_once_for_all_micro_batches(teacher: Teacher, mode: str, divergence: str) -> None:
    assert waits_of_a_step(teacher, packed_batch(), loss_mode=mode, divergence=divergence) == ONE_WAIT


def test_it_waits_once_without_packed_documents_or_with_layers_recomputed(teacher: Teacher) -> None:
    packed = packed_batch()
    joined = Batch(packed.ids_BT, packed.labels_BT)
    assert waits_of_a_step(teacher, joined) == ONE_WAIT
    assert waits_of_a_step(teacher, joined, gradient_checkpointing=True) == ONE_WAIT
    assert waits_of_a_step(None, joined, alpha=1.0) == ONE_WAIT


def test_an_evaluation_waits_once(teacher: Teacher) -> None:
    _, accelerator, model, _ = engine()
    batches = list(packed_batch().split(1))
    with host_reads() as found:
        assert evaluate(accelerator, model, teacher, batches) is not None
    assert [line.partition(":")[0] for line in found] == ["tolist in evaluate.py"]


def test_a_cached_signal_that_was_checked_is_not_read_again() -> None:
    _, _, model, _ = engine()
    batch = packed_batch()
    top = take_top(torch.randn(batch.ids_BT.numel(), VOCAB), 8)
    for signal in (CachedSignal(top, is_checked=True), CachedSignal(top)):
        with host_reads() as found:
            given = (batch.ids_BT, batch.labels_BT, signal, 10, batch.starts_BT)
            model(*given, positions_P=batch.facts.positions_P).loss.backward()
        assert bool(found) is not signal.is_checked, found


def test_every_kind_of_wait_is_seen() -> None:
    x = torch.arange(4.0)
    with host_reads() as found:
        _ = int(x[0]), bool(x[1]), float(x.max()), x[x > 1], x.nonzero(), x.tolist(), x.numpy(), x.cpu()
        _ = torch.equal(x, x), torch.tensor([1.0], device="cpu"), torch.ones(2), x[torch.tensor([1, 2])]
        x[x > 1] = 0
    kinds = [line.partition(" ")[0] for line in found]
    scalars, rest = kinds[:3], kinds[3:]
    assert set(scalars) == {"_local_scalar_dense"}
    assert rest == ["index", "nonzero", "tolist", "numpy", "cpu", "equal", "tensor", "index_put_"]


def test_a_loss_that_is_given_no_positions_looks_for_them() -> None:
    hidden, weight, labels = torch.ones(3, 2), torch.ones(4, 2), torch.tensor([1, IGNORE_INDEX, 2])
    nobody: dict[str, Any] = {"teacher_hidden": None, "teacher_head": None}
    options = nobody | {"num_targets": 2, "config": KDLossConfig(alpha=1.0)}
    with host_reads() as found:
        one = kd_loss.kd_loss(hidden, weight, labels, **options)
        other = kd_loss.kd_loss(hidden, weight, labels, **options, positions_P=torch.tensor([0, 2]))
    assert torch.equal(one.loss, other.loss)
    assert len(found) == 1
