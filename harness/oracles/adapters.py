"""LoRA and dropout in float64: what adapters add to a product, and the masks that torch's generator draws.

A product with adapters is W x + (alpha / rank) B A drop(x) (https://arxiv.org/abs/2106.09685). Among weights by their
Hugging Face names, A ``[rank, in]`` and B ``[out, rank]`` of a module ``NAME`` are ``NAME.lora_A`` and ``NAME.lora_B``.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from q4kd.harness.oracles.drawing import drawn_from

# A mask of dropout of a shape, already scaled.
Drop = Callable[[tuple[int, ...]], Tensor]
_PARTS = (".lora_A", ".lora_B")


def keep_all(_shape: tuple[int, ...]) -> Tensor:
    """Drop nothing."""
    return torch.ones((), dtype=torch.float64)


def seeded_dropout(probability: float, seed: int) -> Drop:
    """Return masks as torch's dropout draws them from a generator of that seed: float32, in the order of calls."""
    generator = torch.Generator().manual_seed(seed)

    def draw(shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape).bernoulli_(1 - probability, generator=generator).double() / (1 - probability)

    return draw if probability else keep_all


@dataclass(frozen=True)
class Adapters:
    """The factor alpha / rank of every adapter, and the masks of its inputs."""

    scale: float
    drop: Drop


def is_adapter(name: str) -> bool:
    """Return whether a weight of that name is a part of an adapter."""
    return name.endswith(_PARTS)


def multiply(x: Tensor, weights: Mapping[str, Tensor], name: str, adapters: Adapters | None) -> Tensor:
    """Return x times a module's weight, and what its adapter adds, if it has one."""
    out = x @ weights[f"{name}.weight"].T
    if adapters is None or f"{name}.lora_A" not in weights:
        return out
    down, up = (weights[f"{name}{part}"] for part in _PARTS)
    return out + adapters.scale * (x * adapters.drop(tuple(x.shape))) @ down.T @ up.T


def fresh_adapters(folder: Path, seed: int, rank: int, targets: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """Return the adapters on a student that peft draws from a seed: A is random, B zero."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    make: Any = AutoModelForCausalLM.from_config
    config = AutoConfig.from_pretrained(folder, local_files_only=True)

    def draw() -> Mapping[str, NDArray[np.float64]]:
        student = make(config)
        torch.manual_seed(seed)  # the student's own weights have been drawn before
        with warnings.catch_warnings():  # peft calls transformers by a name that is deprecated.
            warnings.simplefilter("ignore", FutureWarning)
            adapted: Any = get_peft_model(student, LoraConfig(r=rank, target_modules=list(targets)))
        drawn = by_module({name: value.detach() for name, value in adapted.named_parameters()})
        return {name: value.double().numpy() for name, value in drawn.items()}

    return dict(drawn_from(seed, draw))


def by_module(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the adapters among tensors that have peft's names, by the names above."""
    found = {}
    for name, value in tensors.items():
        module, part, rest = name.removeprefix("base_model.model.").partition(".lora_")
        if part:
            found[f"{module}{part}{rest[0]}"] = value
    return found


def merged(weights: Mapping[str, NDArray[np.float64]], scale: float) -> dict[str, NDArray[np.float64]]:
    """Return what merging adapters adds to the weight of each module that has one, by the weight's name."""
    modules = [name.removesuffix(_PARTS[0]) for name in weights if name.endswith(_PARTS[0])]
    return {f"{name}.weight": scale * weights[f"{name}.lora_B"] @ weights[f"{name}.lora_A"] for name in modules}
