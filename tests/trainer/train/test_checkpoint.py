"""Checkpoints: whole or not there, the newest and the best kept, everything verified before it is believed."""

import errno
import os
import stat
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import q4kd.trainer.train.checkpoint as checkpoint
import q4kd.trainer.train.checkpoint_files as checkpoint_files
from q4kd.trainer.errors import InputError
from q4kd.trainer.files import read_json, sha256_file, write_json
from q4kd.trainer.train.checkpoint import (
    CheckpointState,
    CheckpointTensors,
    checkpoint_path,
    list_best_weights,
    list_checkpoints,
    random_tensors,
    read_state,
    restore_checkpoint,
    save_best_weights,
    save_checkpoint,
)
from q4kd.trainer.train.distributed import gather, trained_tensors
from q4kd.trainer.train.kept_checkpoints import best_value, is_better, prune_checkpoints, record_evaluation
from q4kd.trainer.train.optimizer import MasterWeightOptimizer

ALONE = SimpleNamespace(device=torch.device("cpu"), num_processes=1, process_index=0)


def trained(steps: int = 2) -> tuple[nn.Module, MasterWeightOptimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5), nn.Linear(3, 2))
    optimizer = MasterWeightOptimizer(model.named_parameters(), lambda groups: torch.optim.AdamW(groups, lr=0.1))
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: MasterWeightOptimizer) -> float:
    loss = model(torch.ones(5, 4)).square().sum()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def save(run: Path, number: int, model: nn.Module, optimizer: MasterWeightOptimizer, **figures: float) -> Path:
    tensors = CheckpointTensors(
        gather(trained_tensors(model), True), gather(optimizer.tensors(), True), random_tensors(ALONE)
    )
    return save_checkpoint(run, tensors, CheckpointState(number, {"lr": 0.1}, "d", figures or None))


def test_weights_moments_and_dropout_continue_where_they_were(tmp_path: Path) -> None:
    model, optimizer = trained()
    path = save(tmp_path, 2, model, optimizer)
    expected = [step(model, optimizer) for _ in range(3)]
    other, its_optimizer = trained(0)
    torch.manual_seed(99)
    restore_checkpoint(path, other, its_optimizer, ALONE)
    assert [step(other, its_optimizer) for _ in range(3)] == expected
    assert read_state(path) == CheckpointState(2, {"lr": 0.1}, "d", None)
    pair = trained(2)
    torch.manual_seed(99)
    assert step(*pair) != expected[0]  # the seed matters: dropout draws from it


@pytest.mark.parametrize("at_once", [1, 4])
def test_a_large_state_is_cut_into_files_and_read_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(checkpoint, "FILES_AT_ONCE", at_once)
    model, optimizer = trained()
    whole = save(tmp_path / "whole", 2, model, optimizer)
    monkeypatch.setattr(checkpoint_files, "CUT_BYTES", 100)
    path = save(tmp_path / "cut", 2, model, optimizer)
    names = [file.name for file in sorted(path.glob("optimizer*"))]
    assert names == [f"optimizer-{number:05d}-of-{len(names):05d}.safetensors" for number in range(1, len(names) + 1)]
    assert len(names) > 1 and len(read_state(path).config) == 1
    found = {name: tensor for file in names for name, tensor in load_file(path / file).items()}
    expected = load_file(whole / "optimizer.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    assert sha256_file(path / "model.safetensors") == sha256_file(whole / "model.safetensors")
    after = [step(model, optimizer) for _ in range(2)]
    again, other = trained(0)
    restore_checkpoint(path, again, other, ALONE)
    assert [step(again, other) for _ in range(2)] == after
    (path / names[-1]).rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=f"{names[-1]} with the digest"):
        read_state(path)
    state = read_json(path / "state.json")
    del state["sha256"][names[-1]]
    write_json(path / "state.json", state)
    with pytest.raises(InputError, match=r"optimizer\.safetensors with the digest in state\.json"):
        read_state(path)


def test_a_file_that_fails_beside_others_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "FILES_AT_ONCE", 3)
    write = checkpoint.write_tensors

    def fails(file: Path, *rest: Any) -> str:
        if file.name == "optimizer.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        time.sleep(0.2)  # The others are being written when it fails.
        return write(file, *rest)

    monkeypatch.setattr(checkpoint, "write_tensors", fails)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2, *trained())
    assert not list((tmp_path / "checkpoints").iterdir())


def test_every_process_gets_its_own_random_state_back(tmp_path: Path) -> None:
    model, optimizer = trained()
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        states.append(torch.get_rng_state())
    tensors = CheckpointTensors(
        gather(trained_tensors(model), True), gather(optimizer.tensors(), True), {"cpu": torch.stack(states)}
    )
    path = save_checkpoint(tmp_path, tensors, CheckpointState(2, {}, "d"))
    for process in (1, 0, 2):  # the third takes part only now
        place = SimpleNamespace(device=torch.device("cpu"), num_processes=3, process_index=process)
        restore_checkpoint(path, model, optimizer, place)
        assert torch.equal(torch.get_rng_state(), states[process % 2])


@pytest.mark.parametrize("part", ["model.safetensors", "optimizer.safetensors", "random.safetensors", "state.json"])
def test_a_damaged_part_is_named_with_the_remedy(tmp_path: Path, part: str) -> None:
    path = save(tmp_path, 2, *trained())
    data = (path / part).read_bytes()
    (path / part).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(InputError, match=f"{part}.*delete this checkpoint to resume from the one before"):
        read_state(path)
    (path / part).unlink()
    with pytest.raises(InputError, match="delete this checkpoint"):
        read_state(path)


def test_the_best_is_kept_beside_the_newest_by_its_weights(tmp_path: Path) -> None:
    pair = trained()
    for number, kl in ((1, 3.0), (2, 1.0), (3, 2.0), (4, 2.5), (5, float("nan"))):
        assert is_better("kl", kl, best_value(tmp_path, "kl")) == (number in (1, 2))
        save(tmp_path, number, *pair)
        if kl == kl:
            record_evaluation(checkpoint_path(tmp_path, number), {"kl": kl, "agreement": kl})
        prune_checkpoints(tmp_path, 2, "kl")
    assert names(tmp_path) == ["best-000002", "best.json", "step-000004", "step-000005"]
    best = {"checkpoint": "best-000002", "metric": "kl", "value": 1.0}
    assert read_json(tmp_path / "checkpoints" / "best.json") == best
    # The evaluation is in the state that digests of tensors do not cover, and the weights still verify.
    (weights,) = list_best_weights(tmp_path)
    assert read_state(weights).evaluation == {"kl": 1.0, "agreement": 1.0}
    assert sorted(path.name for path in weights.iterdir()) == ["model.safetensors", "state.json"]
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000004", "step-000005"]
    # By another metric another one is the best, and it is among the newest: it stays whole.
    assert prune_checkpoints(tmp_path, 2, "agreement") == checkpoint_path(tmp_path, 4)
    assert names(tmp_path) == ["best.json", "step-000004", "step-000005"]
    assert not is_better("agreement", 2.5, best_value(tmp_path, "agreement"))
    assert is_better("agreement", 2.6, best_value(tmp_path, "agreement"))


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def test_the_best_checkpoint_stays_whole_when_asked(tmp_path: Path) -> None:
    pair = trained()
    for number, kl in ((1, 1.0), (2, 2.0), (3, 3.0)):
        save(tmp_path, number, *pair, kl=kl)
        prune_checkpoints(tmp_path, 1, "kl", True)
    assert names(tmp_path) == ["best.json", "step-000001", "step-000003"]
    # It is reduced when it is no longer asked for, also where there are no hard links.
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "link", lambda *_paths: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
        prune_checkpoints(tmp_path, 1, "kl")
    assert names(tmp_path) == ["best-000001", "best.json", "step-000003"]
    assert read_state(tmp_path / "checkpoints" / "best-000001").step == 1


def test_best_weights_take_the_place_of_worse_ones(tmp_path: Path) -> None:
    model, optimizer = trained()
    save(tmp_path, 1, model, optimizer, kl=3.0)
    for number, kl in ((2, 2.0), (3, 1.0)):
        state = CheckpointState(number, {}, "d", {"kl": kl})
        path = save_best_weights(tmp_path, gather(trained_tensors(model), True), state)
        assert read_state(path) == state
        assert prune_checkpoints(tmp_path, 1, "kl") == path
    assert names(tmp_path) == ["best-000003", "best.json", "step-000001"]
    data = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(InputError, match=r"model\.safetensors with the digest"):
        read_state(path)


def test_best_weights_of_the_same_step_are_replaced(tmp_path: Path) -> None:
    """A run that was killed after them comes to this step again, on a GPU with other digits."""
    model, optimizer = trained()
    for kl in (2.0, 1.0):
        save_best_weights(tmp_path, gather(trained_tensors(model), True), CheckpointState(2, {}, "d", {"kl": kl}))
        prune_checkpoints(tmp_path, 1, "kl")
        assert names(tmp_path) == ["best-000002", "best.json"]
        step(model, optimizer)
    path = tmp_path / "checkpoints" / "best-000002"
    assert read_state(path).evaluation == {"kl": 1.0}
    save(tmp_path, 2, model, optimizer, kl=0.5)
    save(tmp_path, 4, model, optimizer, kl=3.0)
    prune_checkpoints(tmp_path, 1, "kl")
    assert names(tmp_path) == ["best-000002", "best.json", "step-000004"]
    assert read_state(path).evaluation == {"kl": 0.5}


@pytest.mark.parametrize("damage", ["no weights", "no digests"])
def test_a_damaged_best_checkpoint_is_left_as_it_is(tmp_path: Path, damage: str) -> None:
    path = save(tmp_path, 2, *trained(), kl=1.0)
    if damage == "no weights":
        (path / "model.safetensors").unlink()
    else:
        write_json(path / "state.json", read_json(path / "state.json") | {"sha256": []})
    save(tmp_path, 4, *trained(), kl=2.0)
    assert prune_checkpoints(tmp_path, 1, "kl") == path
    assert names(tmp_path) == ["best.json", "step-000002", "step-000004"]


def test_a_state_of_another_step_than_the_folders_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 4, *trained())
    write_json(path / "state.json", read_json(path / "state.json") | {"step": 4_000_000})
    with pytest.raises(InputError, match="the folder's name, step-000004, got step 4000000"):
        read_state(path)
    path.rename(path.with_name("mine"))
    with pytest.raises(InputError, match="the folder's name, mine"):
        read_state(path.with_name("mine"))


@pytest.mark.parametrize("part", ["model", "optimizer"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused_whatever_their_digest_says(
    tmp_path: Path, part: str, value: float
) -> None:
    model, optimizer = trained()
    tensors = {"model": gather(trained_tensors(model), True), "optimizer": gather(optimizer.tensors(), True)}
    name = next(name for name, tensor in tensors[part].items() if tensor.ndim == 2)
    tensors[part][name] = tensors[part][name].clone()
    tensors[part][name][-1, -1] = value
    path = save_checkpoint(
        tmp_path, CheckpointTensors(**tensors, random=random_tensors(ALONE)), CheckpointState(2, {}, "d")
    )
    read_state(path)
    with pytest.raises(InputError) as caught:
        restore_checkpoint(path, *trained(0), ALONE)
    assert f"finite numbers in {part}.safetensors, got NaN or infinity in {name}" in str(caught.value)


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o022, 0o644), (0o002, 0o664)])
def test_every_file_has_the_mode_that_the_umask_says(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        path = save(tmp_path, 2, *trained(), kl=1.0)
        prune_checkpoints(tmp_path, 1, "kl")
    finally:
        os.umask(before)
    files = [*path.iterdir(), tmp_path / "checkpoints" / "best.json"]
    assert {file.name: stat.S_IMODE(file.stat().st_mode) for file in files} == {file.name: mode for file in files}


def test_steps_are_ordered_by_number_and_left_overs_go(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for name in ("step-1000000", "step-999999", ".step-000007.tmp", "best", "step-12"):
        (folder / name).mkdir(parents=True)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-999999", "step-1000000"]
    save(tmp_path, 1_000_001, *trained())
    assert not (folder / ".step-000007.tmp").exists()


def test_a_step_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    path = save(tmp_path, 2, *trained())
    before = (path / "state.json").stat().st_mtime_ns
    assert save(tmp_path, 2, *trained(5)) == path
    assert (path / "state.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("stage", ["write_tensors", "write_json", "sync_folder"])
def test_a_disk_that_fills_leaves_the_last_checkpoint_and_no_rubbish(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    save(tmp_path, 2, *trained())

    def full(*_arguments: Any, **_options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, stage, full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 4, *trained())
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]
    read_state(checkpoint_path(tmp_path, 2))


def test_nothing_has_the_final_name_before_every_part_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def noted(descriptor: int) -> None:
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        if target.name == "step-000002":
            assert {"model.safetensors", "optimizer.safetensors", "random.safetensors"} < set(synced)
            assert (self / "state.json").is_file() and synced[-1] == self.name
            synced.append("renamed")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(Path, "rename", renamed)
    save(tmp_path, 2, *trained())
    assert synced[-2:] == ["renamed", "checkpoints"]
