"""Rates, the clock, and what one step makes of masks and micro-batches."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from run_settings import settings
from teachers import load_quietly

from q4kd.trainer.data.batch import Batch
from q4kd.trainer.demo import student_path, teacher_path
from q4kd.trainer.loss.config import IGNORE_INDEX
from q4kd.trainer.student.model import load_student, student_dtype
from q4kd.trainer.student.step_clock import StepClock
from q4kd.trainer.teacher.teacher import Teacher
from q4kd.trainer.train.distributed import make_accelerator
from q4kd.trainer.train.evaluate import evaluate
from q4kd.trainer.train.guards import step_zero_kl
from q4kd.trainer.train.run.assembly import prepare_student
from q4kd.trainer.train.step import learning_rate, train_step


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return load_quietly(teacher_path(), dtype="float32")


def masked_batch() -> Batch:
    windows = torch.from_numpy(np.random.default_rng(1).integers(0, 2048, (4, 17)))
    kept = torch.arange(16) < torch.tensor([16, 9, 3, 1]).unsqueeze(1)
    return Batch(windows[:, :-1], windows[:, 1:].masked_fill(~kept, IGNORE_INDEX))


def losses(teacher: Teacher | None, **values: object) -> list[float]:
    config = settings(**{"batch_size": 4, **values})
    accelerator = make_accelerator("cpu")
    student = load_student(student_path(), 1, student_dtype(config))
    model, optimizer, _ = prepare_student(config, accelerator, student)
    found = []
    for index in range(3):
        rate = learning_rate(index, config, 3)
        result = train_step(accelerator, model, teacher, optimizer, masked_batch(), config, rate)
        assert result.tokens == 29
        parts = result.teacher_s + result.student_s + result.loss_s + result.optimizer_s
        assert 0 < parts <= result.seconds
        found += [result.loss, result.grad_norm]
    return found


def test_schedules() -> None:
    def rates(name: str) -> list[float]:
        return [learning_rate(step, settings(schedule=name, lr=1.0), 10) for step in (0, 1, 2, 6, 10, 12)]

    assert rates("cosine") == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.0, 0.0])
    assert rates("linear") == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.0, 0.0])
    assert rates("constant") == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0]
    quarter = {name: learning_rate(4, settings(schedule=name, lr=1.0), 10) for name in ("cosine", "linear")}
    assert quarter == pytest.approx({"cosine": 0.5 * (1 + 0.5**0.5), "linear": 0.75})


def test_the_clock_adds_up_by_part(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 11.0, 13.0, 16.0, 17.0])
    monkeypatch.setattr("q4kd.trainer.student.step_clock.time.monotonic", lambda: next(times))
    clock = StepClock(torch.device("cpu"))
    clock.start()
    for part in ("teacher", "student", "loss", "student"):
        clock.mark(part)
    assert clock.read() == {"teacher": 1.0, "student": 3.0, "loss": 3.0, "optimizer": 0.0}


class Tick:
    """A CUDA event on a clock that the test holds; it is reached once the host has waited for it or for a later one."""

    now, reached = 0.0, -1.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        Tick.now += 1.0
        self.at = Tick.now

    def synchronize(self) -> None:
        Tick.reached = max(Tick.reached, self.at)

    def elapsed_time(self, later: "Tick") -> float:
        assert later.at <= Tick.reached, "an event that is not reached has no time"
        return 1000 * (later.at - self.at)


def test_the_clock_on_cuda_reads_an_update_a_step_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Tick)
    before, last, waits = None, 4.0, 0
    for pause in (3.0, 5.0, 7.0):
        clock = StepClock(torch.device("cuda"), before)
        clock.start()
        clock.mark("student")
        Tick.reached = Tick.now  # the one wait of the step
        Tick.now += pause
        clock.mark("optimizer")
        seconds = clock.read()
        waits += Tick.reached == Tick.now
        assert seconds == {"teacher": 0.0, "student": 1.0, "loss": 0.0, "optimizer": last}
        before, last = clock, pause + 1.0
    assert waits == 1  # the first step has no update before it


def test_neither_micro_batches_nor_recomputation_change_the_steps(teacher: Teacher) -> None:
    whole = losses(teacher)
    assert len(set(whole)) == 6
    assert losses(teacher, batch_size=1, accumulation=4) == pytest.approx(whole, rel=2e-5)
    assert losses(teacher, gradient_checkpointing=True) == pytest.approx(whole, rel=1e-6)
    # At this learning rate the third step's gradient has already felt the rounding; its loss hardly.
    assert losses(teacher, student_dtype="bfloat16")[::2] == pytest.approx(whole[::2], rel=1e-2)


def test_evaluation_counts_labels_alone_and_leaves_the_mode(teacher: Teacher) -> None:
    config = settings(batch_size=4)
    accelerator = make_accelerator("cpu")
    model, _, _ = prepare_student(config, accelerator, load_student(student_path(), 1))
    model.train()
    batch = masked_batch()
    together = evaluate(accelerator, model, teacher, [batch])
    apart = evaluate(accelerator, model, teacher, batch.split(1))
    assert together is not None
    assert apart is not None
    assert together.tokens == apart.tokens == 29
    assert vars(apart) == pytest.approx(vars(together), rel=1e-6)
    assert model.training
    student: Any = model.student
    with torch.no_grad():
        log_q = torch.log_softmax(student(batch.ids_BT).logits.double(), -1).flatten(0, 1)
        log_p = torch.log_softmax(teacher.logits(batch.ids_BT).double(), -1).flatten(0, 1)[:, : log_q.shape[1]]
    kept = batch.labels_BT.flatten() != IGNORE_INDEX
    loss = -log_q[kept].gather(1, batch.labels_BT.flatten()[kept].unsqueeze(1)).mean()
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)[kept].mean()
    assert together.loss == pytest.approx(float(loss), rel=1e-5)
    assert together.kl == pytest.approx(float(kl), rel=1e-5)
    assert together.perplexity == pytest.approx(float(loss.exp()), rel=1e-4)
    assert together.agreement == float((log_p.argmax(-1) == log_q.argmax(-1))[kept].double().mean())
    none = dataclasses.replace(batch, labels_BT=torch.full_like(batch.labels_BT, IGNORE_INDEX))
    assert evaluate(accelerator, model, teacher, [none]) is None


def test_dropout_follows_the_seed_where_the_student_has_weights_too() -> None:
    drawn = []
    for before, seed in ((1, 5), (2, 5), (1, 6)):
        torch.manual_seed(before)  # whatever the process has drawn by then
        prepare_student(settings(seed=seed), make_accelerator("cpu"), load_student(student_path(), 1))
        drawn.append(torch.rand(4).tolist())
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_check_before_the_first_step_drops_nothing(teacher: Teacher) -> None:
    student: Any = load_student(student_path(), 1)
    for layer in student.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model, _, _ = prepare_student(settings(), make_accelerator("cpu"), student)
    model.train()
    before, ids_BT = torch.get_rng_state(), masked_batch().ids_BT
    found = step_zero_kl(teacher, model, ids_BT)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    model.eval()
    assert step_zero_kl(teacher, model, ids_BT) == found
