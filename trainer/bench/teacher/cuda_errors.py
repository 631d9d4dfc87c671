"""How far each engine is from float32, position by position.

Random weights amplify rounding along few directions, so one sample of a position's error says little: two forwards of
equal precision differed by a factor of 1.7 at the worst of 256 positions. Each position's error is therefore the root
mean square over many sequences, taken on a fixed random set of vocabulary columns.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from q4kd.trainer.formats.architecture import TeacherConfig

SEQUENCES = 64
LENGTH = 256
COLUMNS = 2048
_SEQUENCES_AT_ONCE = 4


Logits = Callable[[Tensor], Tensor]  # ids ``[B, T]`` to float32 logits ``[B * T, V]``


def make_probe(config: TeacherConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return random ids ``[SEQUENCES, LENGTH]`` and vocabulary columns, int64, the same in every run."""
    generator = torch.Generator().manual_seed(5)
    ids_ST = torch.randint(0, config.vocab_size, (SEQUENCES, LENGTH), generator=generator)
    columns = torch.randperm(config.vocab_size, generator=generator)[:COLUMNS].sort().values
    return ids_ST.to(device), columns.to(device)


@contextmanager
def plain_float32() -> Iterator[None]:
    """Keep TF32 out of float32 products, and use plain attention, while the body runs."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with sdpa_kernel([SDPBackend.MATH]):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def probe_logits(logits: Logits, ids_ST: Tensor, columns: Tensor) -> Iterator[Tensor]:
    """Yield logits of the probe's columns, float32 ``[s * T, COLUMNS]``, a few sequences at a time."""
    with torch.no_grad():
        for ids_BT in torch.split(ids_ST, _SEQUENCES_AT_ONCE):
            yield logits(ids_BT)[:, columns]


def probe_errors(logits: Logits, ids_ST: Tensor, columns: Tensor, exact: Sequence[Tensor]) -> Tensor:
    """Return relative errors, float64 ``[S, T]``, against the reference's ``probe_logits``."""
    errors = [
        row_errors(found, wanted.to(found.device))
        for found, wanted in zip(probe_logits(logits, ids_ST, columns), exact, strict=True)
    ]
    return torch.cat(errors).view(ids_ST.shape)


def row_errors(found_MV: Tensor, exact_MV: Tensor) -> Tensor:
    """Return each row's relative error, float64 ``[M]``."""
    exact = exact_MV.double()
    return (found_MV.double() - exact).square().sum(1).sqrt() / exact.square().sum(1).sqrt()


def compare_errors(errors: Mapping[str, Tensor], against: str) -> dict[str, Any]:
    """Summarise errors ``[S, T]`` by engine, and their ratio to those of the engine named ``against``.

    Returns:
        For each engine: ``rms`` over everything; ``worst_ratio`` and ``median_ratio`` of the positions' root mean
        squares; ``worst_single_ratio`` of all single samples; ``rms_by_position``.
    """
    by_position = {name: error.square().mean(0).sqrt() for name, error in errors.items()}
    theirs = by_position[against]
    return {
        name: {
            "rms": float(errors[name].square().mean().sqrt()),
            "worst_ratio": float((mine / theirs).max()),
            "median_ratio": float((mine / theirs).median()),
            "worst_single_ratio": float((errors[name] / errors[against]).max()),
            "rms_by_position": [float(value) for value in mine],
        }
        for name, mine in by_position.items()
    }
