"""Master weights: nothing is lost below bfloat16, float32 is torch's AdamW, and state comes back exactly."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from q4kd.trainer.config.settings import DistillConfig, make_config
from q4kd.trainer.errors import InputError
from q4kd.trainer.train import optimizer as optimizer_module
from q4kd.trainer.train.optimizer import MasterWeightOptimizer, make_optimizer


def settings(**values: object) -> DistillConfig:
    return make_config({"teacher": "t", "student": "s", "data": "d", "out": "o", "lr": 0.01, **values})


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)).to(dtype)


def gradients(module: nn.Module, seed: int) -> Iterator[None]:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        yield


def take(module: nn.Module, optimizer: MasterWeightOptimizer, seeds: range, clip: float = 1.0) -> list[float]:
    norms = []
    for seed in seeds:
        list(gradients(module, seed))
        norms.append(float(optimizer.clip(clip)))
        optimizer.step()
        optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in module.parameters())
    return norms


def weights(module: nn.Module) -> list[Any]:
    return [parameter.detach().clone() for parameter in module.parameters()]


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_float32_is_torchs_adamw_with_clipping(decay: float) -> None:
    ours, theirs = model(), model()
    optimizer = make_optimizer(settings(weight_decay=decay, beta2=0.95), ours.named_parameters())
    matrices = [parameter for parameter in theirs.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in theirs.parameters() if parameter.ndim == 1]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    plain = torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95))
    norms = take(ours, optimizer, range(5))
    for seed, norm in enumerate(norms):
        list(gradients(theirs, seed))
        assert norm == pytest.approx(float(nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)), rel=1e-6)
        plain.step()
    for a, b in zip(weights(ours), weights(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_gradients_of_a_tiny_norm_are_clipped_as_torch_does() -> None:
    """Adam's eps is as small as the gradients here, so that how far they were scaled down shows in the weights."""
    ours, theirs = model(), model()
    optimizer = make_optimizer(settings(weight_decay=0.0, eps=1e-6), ours.named_parameters())
    plain = torch.optim.AdamW(theirs.parameters(), lr=0.01, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.0)
    for module in (ours, theirs):
        list(gradients(module, 0))
        for parameter in module.parameters():
            assert parameter.grad is not None
            parameter.grad *= 1e-6
    limit = 1e-6
    assert float(optimizer.clip(limit)) == pytest.approx(float(nn.utils.clip_grad_norm_(theirs.parameters(), limit)))
    optimizer.step()
    plain.step()
    for a, b in zip(weights(ours), weights(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_bfloat16_weights_are_their_masters_rounded_once() -> None:
    module = model(torch.bfloat16)
    optimizer = make_optimizer(settings(lr=1e-5), module.named_parameters())
    before = weights(module)
    take(module, optimizer, range(3))
    moved = [
        float((optimizer.masters[name].detach() - old.float()).abs().min())
        for (name, _), old in zip(module.named_parameters(), before, strict=True)
    ]
    assert min(moved) > 0  # every master moved, although hardly any weight shows it
    for name, parameter in module.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, optimizer.masters[name].bfloat16())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slices_change_no_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, sliced = model(dtype), model(dtype)
    take(whole, make_optimizer(settings(), whole.named_parameters()), range(3))
    monkeypatch.setattr(optimizer_module, "SLICE_ELEMENTS", 7)
    optimizer = make_optimizer(settings(), sliced.named_parameters())
    list(gradients(sliced, 0))
    assert len(list(optimizer._slices())) > 3
    take(sliced, optimizer, range(3))
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(sliced), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_comes_back_to_the_bit(dtype: torch.dtype) -> None:
    one, two = model(dtype), model(dtype)
    first = make_optimizer(settings(), one.named_parameters())
    take(one, first, range(3))
    kept = {name: tensor.clone() for name, tensor in first.tensors()}
    assert {name.rpartition("|")[2] for name in kept} >= {"step", "exp_avg", "exp_avg_sq"}
    assert any(name.endswith("|master") for name in kept) is (dtype == torch.bfloat16)
    second = make_optimizer(settings(), two.named_parameters())
    two.load_state_dict(one.state_dict())
    second.load(kept.items())
    take(one, first, range(3, 6))
    take(two, second, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(weights(one), weights(two), strict=True))


def test_state_of_another_student_is_refused() -> None:
    module = model()
    optimizer = make_optimizer(settings(), module.named_parameters())
    with pytest.raises(ValueError, match="shape"):
        optimizer.load([("0.weight|exp_avg", torch.zeros(2, 2))])
    with pytest.raises(KeyError):
        optimizer.load([("9.weight|exp_avg", torch.zeros(2, 2))])


def test_what_is_frozen_has_no_state() -> None:
    module = model()
    module[0].requires_grad_(False)
    optimizer = make_optimizer(settings(), module.named_parameters())
    assert all(not name.startswith("0.") for name in optimizer.masters)


def test_a_norm_of_many_bfloat16_gradients_is_not_rounded_to_bfloat16() -> None:
    weight = nn.Parameter(torch.zeros(1000, 1000, dtype=torch.bfloat16))
    optimizer = MasterWeightOptimizer([("w", weight)], functools.partial(torch.optim.AdamW, lr=0.1))
    weight.grad = torch.full_like(weight, 0.5)
    assert float(optimizer.clip(1.0)) == pytest.approx(500.0, rel=1e-6)


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw", "paged_adamw_8bit"])
def test_eight_bit_optimizers_say_what_they_need(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name.startswith("paged"):
        with pytest.raises(InputError, match="got device cpu; use optimizer adamw_8bit or adamw"):
            make_optimizer(settings(optimizer=name), model().named_parameters())
    monkeypatch.setattr(optimizer_module.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(InputError, match=r"pip install 'q4kd\[bnb\]'"):
        device = "cpu" if name == "adamw_8bit" else "cuda"
        make_optimizer(settings(optimizer=name, device=device), model().named_parameters())


def test_a_checkpoint_names_no_pickle(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    module = model(torch.bfloat16)
    optimizer = make_optimizer(settings(), module.named_parameters())
    take(module, optimizer, range(1))
    save_file({name: tensor.contiguous() for name, tensor in optimizer.tensors()}, tmp_path / "o.safetensors")
    assert load_file(tmp_path / "o.safetensors")["0.weight|master"].dtype == torch.float32


class SharedTable(torch.optim.SGD):
    """Keeps, as optimisers of 8-bit moments do, one table that all parameters share, and an int counter."""

    table = torch.linspace(-1, 1, 256)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        del closure
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    count = self.state[parameter].get("step", 0)
                    self.state[parameter] |= {"step": count + 1, "qmap": self.table}


def test_tables_that_moments_share_are_kept_with_each_and_come_back(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    module = model()
    optimizer = MasterWeightOptimizer(module.named_parameters(), functools.partial(SharedTable, lr=0.1))
    take(module, optimizer, range(2))
    save_file(dict(optimizer.tensors()), tmp_path / "o.safetensors")
    kept = load_file(tmp_path / "o.safetensors")
    tables = [value for name, value in kept.items() if name.endswith("|qmap")]
    assert len(tables) == 6 and all(torch.equal(table, SharedTable.table) for table in tables)
    other = MasterWeightOptimizer(module.named_parameters(), functools.partial(SharedTable, lr=0.1))
    other.load(kept.items())
    for master in other.masters.values():
        assert other.inner.state[master]["step"] == 2
        assert torch.equal(other.inner.state[master]["qmap"], SharedTable.table)
