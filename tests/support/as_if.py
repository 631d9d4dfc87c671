"""``pytest --as-if amx_bf16``: the automatic dtype is bfloat16 at every size, here and in child processes.

A row's products then depend on the size of its pass, as they do with AMX, so that a test which leaves the dtype to the
processor and compares passes of several sizes closely fails whatever processor runs it.
"""

import os
from collections.abc import Mapping
from pathlib import Path

LARGE_PASS = 64  # positions
_STARTUP = """import sys

sys.path.append({support!r})
import as_if

as_if.pretend({flag!r})
"""


def pretend(flag: str) -> None:
    """Have this process's automatic choice see a processor with ``flag``, for which bfloat16 pays at every size."""
    from q4kd.trainer.device import dtypes

    read = dtypes.usable_flags

    def usable_flags(*variables: Mapping[str, str]) -> frozenset[str]:
        if variables:
            return read(*variables)
        sum_by_pass()
        return frozenset({flag})

    dtypes.usable_flags = usable_flags
    dtypes.PAYS_FROM[flag] = 1


def sum_by_pass() -> None:
    """Sum the teacher's bfloat16 products in an order that depends on the size of a pass, as AMX does.

    Both orders round as bfloat16 does. It happens when a choice is left to the processor, and torch is there by then.
    """
    import torch

    from q4kd.trainer.teacher.cpu import weights

    make = weights.multiply
    if getattr(make, "sums_by_pass", False):
        return

    def multiply(x_MK: torch.Tensor, weight_RK: torch.Tensor) -> torch.Tensor:
        if x_MK.dtype != torch.bfloat16 or len(x_MK) < LARGE_PASS:
            return make(x_MK, weight_RK)
        half = weight_RK.shape[1] // 2
        x, weight = x_MK.float(), weight_RK.float()
        return (x[:, half:] @ weight[:, half:].T + x[:, :half] @ weight[:, :half].T).bfloat16()

    multiply.sums_by_pass = True  # type: ignore[attr-defined]
    weights.multiply = multiply


def children_environment(flag: str, folder: Path) -> dict[str, str]:
    """Return the variable by which every Python started with it does the same: ``folder`` gets a ``sitecustomize``."""
    startup = _STARTUP.format(support=str(Path(__file__).parent), flag=flag)
    (folder / "sitecustomize.py").write_text(startup, encoding="utf-8")
    before = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": str(folder) if not before else os.pathsep.join([str(folder), before])}
