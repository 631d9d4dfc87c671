"""Two processes over gloo, by the command line: shards take the steps of one process, copies continue from them."""

import json
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.fsdp
from forked_pair import ForkedPair

from q4kd.harness.__main__ import main
from q4kd.trainer.demo import student_path, teacher_path
from q4kd.trainer.errors import InputError
from q4kd.trainer.loss.config import KDLossConfig
from q4kd.trainer.student.model import DistillationModel, load_student
from q4kd.trainer.train import distributed as sharding
from q4kd.trainer.train.guards import check_isolation

SHARDS = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


def arguments(out: Path, data: Path, processes: int, *extra: str) -> list[str]:
    return [
        *("distill", "--teacher", str(teacher_path()), "--student", str(student_path()), "--data", str(data)),
        *(
            "--from-scratch",
            "--out",
            str(out),
            "--seq-len",
            "32",
            "--steps",
            "4",
            "--lr",
            "0.002",
            "--warmup-steps",
            "1",
        ),
        *("--batch-size", str(4 // processes), "--accumulation", "2", "--eval-tokens", "96", "--dtype", "float32"),
        *("--checkpoint-every", "2", "--keep", "9", *extra),
    ]


def events(out: Path, name: str) -> list[dict[str, Any]]:
    lines = (out / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == name]


def figures(out: Path) -> list[float]:
    return [event[key] for event in events(out, "step") for key in ("loss", "ce", "kd", "grad_norm")]


def test_shards_take_the_steps_of_one_process_and_copies_continue_from_them(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    data = tmp_path / "data"
    data.mkdir()
    for source in (Path(json.__file__), Path(subprocess.__file__), Path(shutil.__file__)):
        shutil.copy(source, data / f"{source.parent.name}-{source.name}")
    one, two = tmp_path / "one", tmp_path / "two"
    extra = ("--student-dtype", "bfloat16", "--lora-rank", "4", "--clip", "0.3")
    assert main(arguments(one, data, 1, *extra)) == 0
    with ForkedPair() as pair:
        pair.run(arguments(two, data, 2, *extra, "--max-steps", "1"), SHARDS)
        pair.run(arguments(two, data, 2, *extra, "--max-steps", "3", "--resume"), SHARDS)
        assert max(figures(two)[3::4]) > 0.3  # clipped
        tensors = load_file(two / "checkpoints" / "step-000002" / "optimizer.safetensors")
        whole = load_file(one / "checkpoints" / "step-000002" / "optimizer.safetensors")
        assert {name: tensor.shape for name, tensor in tensors.items()} == {n: t.shape for n, t in whole.items()}
        pair.run(arguments(two, data, 2, *extra, "--resume"))
    # bfloat16 gradients are added up in another order. The last bit of each is 2^-8 of it, and so at most is what
    # differs in their norm; which bits differ depends on the last of the teacher's float32, which releases change.
    assert figures(two) == pytest.approx(figures(one), rel=2**-8)
    for a, b in zip(events(two, "eval")[-1:], events(one, "eval")[-1:], strict=True):
        assert (a["tokens"], a["loss"]) == (b["tokens"], pytest.approx(b["loss"], rel=1e-3))
    models = [load_file(out / "model" / "model.safetensors") for out in (one, two)]
    assert models[0].keys() == models[1].keys()
    assert all(torch.allclose(models[0][name], models[1][name], atol=1e-2) for name in models[0])
    assert (two / "adapter" / "adapter_model.safetensors").is_file()


def test_what_a_check_made_whole_is_sharded_again() -> None:
    distributed: Any = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        student: Any = load_student(student_path(), seed=0)
        model: Any = DistillationModel(student, KDLossConfig(alpha=1.0))
        distributed.fsdp.fully_shard(model, reshard_after_forward=False)
        check_isolation(model, student.config, 2048, 32, torch.device("cpu"))
        assert all(map(sharding.is_sharded, model.parameters()))
    finally:
        distributed.destroy_process_group()


def test_each_layer_is_a_shard_unit_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the whole student would be gathered at one time, with the same results."""
    monkeypatch.setattr(sharding, "will_shard", lambda _accelerator: True)
    distributed: Any = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        student: Any = load_student(student_path(), seed=0)
        accelerator = SimpleNamespace(num_processes=1, device=torch.device("cpu"))
        model = sharding.prepare_model(accelerator, DistillationModel(student, KDLossConfig(alpha=1.0)))
        units = [name for name, module in model.named_modules() if isinstance(module, distributed.fsdp.FSDPModule)]
        assert units == ["", *(f"student.model.layers.{n}" for n in range(student.config.num_hidden_layers))]
    finally:
        distributed.destroy_process_group()


@pytest.mark.parametrize("version", ["1", None])
def test_fsdp_1_is_refused(version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.delenv("FSDP_VERSION", raising=False)
    if version is not None:
        monkeypatch.setenv("FSDP_VERSION", version)
    with pytest.raises(InputError, match="--fsdp_version 2"):
        sharding.make_accelerator("cpu")


def test_the_log_says_how_many_processes_hold_what(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    one, two = (SimpleNamespace(num_processes=number) for number in (1, 2))
    assert sharding.describe_processes(one) == "processes: 1"
    assert "2, each with a copy" in sharding.describe_processes(two)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert "2, each with a shard" in sharding.describe_processes(two)


def test_state_of_another_student_is_refused() -> None:
    model = torch.nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"missing or unknown, such as bias"):
        sharding.load_trained_tensors(model, [("weight", torch.zeros(2, 3))])
    with pytest.raises(ValueError, match="shape"):
        sharding.load_trained_tensors(model, [("weight", torch.zeros(3, 3)), ("bias", torch.zeros(2))])


def test_tied_tensors_are_gathered_once() -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3, bias=False), "b": torch.nn.Linear(3, 3, bias=False)})
    model["b"].weight = model["a"].weight
    assert list(sharding.whole_state(model, keep=True)) == ["a.weight"]
    assert sharding.whole_state(model, keep=False) == {}


def test_processes_on_the_cpu_wait_for_each_other_beside_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """accelerate waits on the device of a process's index, which torch takes for a GPU where there is one."""
    from accelerate import Accelerator, PartialState
    from accelerate.utils import DistributedType

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    try:
        monkeypatch.setattr(torch._C, "_get_accelerator", lambda: torch.device("cuda"))
        accelerator = Accelerator(cpu=True)
        for state in (accelerator.state, PartialState()):
            monkeypatch.setattr(state, "num_processes", 2)
            monkeypatch.setattr(state, "distributed_type", DistributedType.MULTI_CPU)
        with pytest.raises(RuntimeError, match=r"(?i)cuda"):
            accelerator.wait_for_everyone()
        sharding.wait_for_all(accelerator)
    finally:
        torch.distributed.destroy_process_group()
