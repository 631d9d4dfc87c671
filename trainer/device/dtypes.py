"""Which dtype the teacher computes in: bfloat16 where the processor multiplies it natively, else float32."""

import platform
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from q4kd.trainer.errors import InputError

DTYPES = ("float32", "bfloat16")
REQUESTS = ("auto", *DTYPES)
# Matrix instructions for bfloat16, as Linux names them; Arm's flag is plain "bf16".
_NATIVE_FLAGS = ("amx_bf16", "avx512_bf16", "avx10_2", "bf16")


@dataclass(frozen=True)
class DtypeChoice:
    """A dtype's name and the reason that is announced with it."""

    name: str
    reason: str


def choose_dtype(requested: str, device: str, cpu_flags: Collection[str] | None = None) -> DtypeChoice:
    """Choose the dtype of matrix products; norms, the residual stream and logits are float32 in any case.

    Args:
        requested: one of ``REQUESTS``.
        device: ``cpu`` or ``cuda``; every CUDA device that q4kd compiles for has bfloat16 tensor cores.
        cpu_flags: the processor's feature flags; read from the machine by default.

    Raises:
        InputError: for a request that is not one of ``REQUESTS``.
    """
    if requested not in REQUESTS:
        raise InputError("--dtype", expected=" or ".join(REQUESTS), got=repr(requested)[:40], remedy="choose one")
    if requested != "auto":
        return DtypeChoice(requested, "asked for")
    if device == "cuda":
        return DtypeChoice("bfloat16", "tensor cores")
    flags = native_flags() if cpu_flags is None else cpu_flags
    native = [flag for flag in _NATIVE_FLAGS if flag in flags]
    if native:
        return DtypeChoice("bfloat16", f"native on this CPU: {native[0]}")
    return DtypeChoice("float32", "this CPU has no native bfloat16")


def native_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Return the processor's feature flags, empty where the system does not list them."""
    key = "Features" if platform.machine() == "aarch64" else "flags"
    try:
        lines = cpuinfo.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return frozenset()
    fields = (line.partition(":") for line in lines)
    return next((frozenset(rest.split()) for name, _, rest in fields if name.strip() == key), frozenset())
