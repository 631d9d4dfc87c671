"""How often a step makes the host wait for a GPU, by torch's own warnings and by the calls that a profiler saw."""

import json
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from document_starts import starts_of
from run_settings import settings

from q4kd.trainer.data.batch import Batch
from q4kd.trainer.demo import student_path, teacher_path
from q4kd.trainer.device.placement import place_teacher
from q4kd.trainer.events import EventLog
from q4kd.trainer.loss.config import IGNORE_INDEX
from q4kd.trainer.student.model import load_student, student_dtype
from q4kd.trainer.teacher.cache.cached_teacher import CachedTeacher
from q4kd.trainer.teacher.cache.signal import take_top
from q4kd.trainer.teacher.cache.store import CacheIndex, CacheKey
from q4kd.trainer.teacher.teacher import Teacher, load_teacher
from q4kd.trainer.train.distributed import make_accelerator
from q4kd.trainer.train.evaluate import evaluate
from q4kd.trainer.train.run.assembly import prepare_student
from q4kd.trainer.train.step import SignalSource, train_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
VOCAB, SEQUENCES, LENGTH = 2048, 4, 256
# The second pass of a shape is captured as a CUDA graph, and what is allocated on the way is there from then on.
WARM_UP = 4


@pytest.fixture(scope="module", autouse=True)
def forget_other_devices() -> None:
    """Let accelerate choose its device anew: a test before this one may have chosen the CPU."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return load_teacher(
        place_teacher(teacher_path(), device="cuda"), events=EventLog(None), announce=lambda _line: None
    )


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> CachedTeacher:
    folder = tmp_path_factory.mktemp("cache")
    index = CacheIndex(folder, CacheKey("", "", "", VOCAB, LENGTH, SEQUENCES, "none"), 8, {})
    logits = 3 * torch.randn(SEQUENCES * LENGTH, VOCAB, generator=torch.Generator().manual_seed(0))
    index.write_shard(0, take_top(logits, 8))
    return CachedTeacher(index)


def host_batch(*, packed: bool) -> Batch:
    """A batch on the host: unequally many labels a sequence, and two documents in one or the other."""
    ids = torch.from_numpy(np.random.default_rng(2).integers(0, VOCAB, (SEQUENCES, LENGTH + 1)))
    kept = torch.arange(LENGTH) < torch.tensor([LENGTH, 100, 3, 0]).unsqueeze(1)
    labels = ids[:, 1:].masked_fill(~kept, IGNORE_INDEX)
    starts = starts_of([[LENGTH], [100, LENGTH - 100], [1, LENGTH - 1], [LENGTH]]) if packed else None
    return Batch(ids[:, :-1], labels, starts, np.arange(SEQUENCES))


def make_step(source: SignalSource | None, *, packed: bool = False, **values: object) -> Callable[[], None]:
    """Return what takes one step of two micro-batches, its batch's way to the device included."""
    config = settings(device="cuda", batch_size=SEQUENCES // 2, accumulation=2, **values)
    accelerator = make_accelerator("cuda")
    student = load_student(student_path(), 1, student_dtype(config))
    model, optimizer, _ = prepare_student(config, accelerator, student)
    model.train()
    batch = host_batch(packed=packed)

    def step() -> None:
        on_device = batch.to(accelerator.device)
        assert len(list(on_device.split(config.batch_size))) == 2
        result = train_step(accelerator, model, source, optimizer, on_device, config, 1e-3)
        assert result.tokens == LENGTH + 103
        assert result.loss > 0

    for _ in range(WARM_UP):
        step()
    torch.cuda.synchronize()
    return step


def warned_waits(work: Callable[[], object]) -> list[str]:
    """Return the place of each operation that torch says made the host wait."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    said = [warning for warning in caught if "synchronizing CUDA operation" in str(warning.message)]
    return [f"{Path(warning.filename).name}:{warning.lineno}" for warning in said]


def profiled(work: Callable[[], object], trace: Path) -> tuple[Counter[str], Counter[str]]:
    """Return how often ``work`` called each function of the CUDA runtime, and what was copied by which way."""
    from torch.profiler import ProfilerActivity, profile, record_function

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        with record_function("the work"):
            work()
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_bytes())["traceEvents"]
    (whole,) = (event for event in events if event.get("name") == "the work" and event.get("cat") == "user_annotation")
    begin, end = whole["ts"], whole["ts"] + whole["dur"]
    calls = Counter(
        str(event["name"])
        for event in events
        if event.get("cat") in ("cuda_runtime", "cuda_driver") and begin <= event["ts"] <= end
    )
    copies = Counter(
        str(event["name"])
        for event in events
        if event.get("cat") == "gpu_memcpy" and ("DtoH" in event["name"] or "HtoD" in event["name"])
    )
    assert any(event.get("cat") == "kernel" for event in events), "the profiler saw no kernel"
    return calls, copies


def waits_once(step: Callable[[], None], trace: Path) -> None:
    """Assert that the sums alone are read back, and that no copy to the device comes from pageable memory."""
    places = warned_waits(step)
    assert [place.partition(":")[0] for place in places] == ["step.py"], places
    calls, copies = profiled(step, trace)
    assert calls["cudaLaunchKernel"] + calls["cudaLaunchKernelExC"] > 0, calls
    assert calls["cudaStreamSynchronize"] == 1, calls
    assert calls["cudaDeviceSynchronize"] == 0, calls
    assert calls["cudaEventSynchronize"] == 0, calls
    assert sum(count for name, count in copies.items() if "DtoH" in name) == 1, copies
    assert not [name for name in copies if "HtoD" in name and "Pageable" in name], copies


@pytest.mark.parametrize("mode", ["fast", "low"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_step_of_two_micro_batches_waits_once(teacher: Teacher, tmp_path: Path, mode: str, packed: bool) -> None:
    waits_once(make_step(teacher, packed=packed, loss_mode=mode), tmp_path / "trace.json")


@pytest.mark.parametrize(
    "values", [{"gradient_checkpointing": True}, {"divergence": "jsd"}, {"student_dtype": "float32"}, {"lora_rank": 4}]
)
def test_whatever_the_settings(teacher: Teacher, tmp_path: Path, values: dict[str, Any]) -> None:
    if "lora_rank" in values:
        pytest.importorskip("peft")
    waits_once(make_step(teacher, **values), tmp_path / "trace.json")


def test_without_a_teacher(tmp_path: Path) -> None:
    waits_once(make_step(None, alpha=1.0), tmp_path / "trace.json")


def test_from_a_cache(cached: CachedTeacher, tmp_path: Path) -> None:
    waits_once(make_step(cached, packed=True), tmp_path / "trace.json")


def test_an_evaluation_waits_once_for_all_its_batches(teacher: Teacher) -> None:
    config = settings(device="cuda", batch_size=1)
    accelerator = make_accelerator("cuda")
    model, _, _ = prepare_student(config, accelerator, load_student(student_path(), 1, student_dtype(config)))

    def work() -> None:
        batches = host_batch(packed=True).to(accelerator.device).split(1)
        assert evaluate(accelerator, model, teacher, batches) is not None

    work()
    places = warned_waits(work)
    assert [place.partition(":")[0] for place in places] == ["evaluate.py"], places


def test_each_kind_of_wait_is_seen(tmp_path: Path) -> None:
    x = torch.arange(4.0, device="cuda")

    def work() -> None:
        _ = int(x[0]), x[x > 1], x.nonzero(), x.tolist(), torch.tensor([1.0], device="cuda"), torch.ones(3).cuda()

    assert len(warned_waits(work)) >= 6
    calls, copies = profiled(work, tmp_path / "trace.json")
    assert calls["cudaStreamSynchronize"] >= 6
    assert any("Pageable" in name and "HtoD" in name for name in copies)
