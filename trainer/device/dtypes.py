"""Which dtype the teacher computes in: bfloat16 where it was measured to be faster, else float32."""

import os
import platform
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from q4kd.trainer.errors import InputError

DTYPES = ("float32", "bfloat16")
REQUESTS = ("auto", *DTYPES)
# By the instruction that multiplies bfloat16, as Linux names it: the positions of a forward pass from which it was
# faster than float32 in `q4kd bench dtypes` (evidence/LOG.md); None where it has not been shown to be. The choice is by
# size, never by a clock, so that it is the same in every run. A processor is judged by the first that it has: those
# with AMX have AVX-512's instruction too, but oneDNN prefers AMX. Others, such as Arm's, have not been measured.
PAYS_FROM: dict[str, int | None] = {"amx_bf16": 90, "avx512_bf16": 128}
# oneDNN makes the products. Told to leave these instructions alone, it multiplies bfloat16 more slowly than float32
# (https://uxlfoundation.github.io/oneDNN/dev_guide_cpu_dispatcher_control.html).
_LIMIT_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")
_LIMITS_WITHOUT_BF16 = (
    *("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2"),
    *("AVX512_CORE", "AVX512_CORE_VNNI"),
)
_LIMITS_WITHOUT_AMX = (*_LIMITS_WITHOUT_BF16, "AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX10_1_512")


@dataclass(frozen=True)
class DtypeChoice:
    """A dtype's name and the reason that is announced with it."""

    name: str
    reason: str


def choose_dtype(
    requested: str, device: str, positions: int | None = None, cpu_flags: Collection[str] | None = None
) -> DtypeChoice:
    """Choose the dtype of matrix products; norms, the residual stream and logits are float32 in any case.

    Args:
        requested: one of ``REQUESTS``.
        device: ``cpu`` or ``cuda``; every CUDA device that q4kd compiles for has bfloat16 tensor cores.
        positions: of a forward pass, all sequences together; None where that is not known, which ``auto`` on the CPU
            answers with float32.
        cpu_flags: the processor's feature flags; ``usable_flags`` by default.

    Raises:
        InputError: for a request that is not one of ``REQUESTS``.
    """
    if requested not in REQUESTS:
        raise InputError("--dtype", expected=" or ".join(REQUESTS), got=repr(requested)[:40], remedy="choose one")
    if requested != "auto":
        return DtypeChoice(requested, "asked for")
    if device == "cuda":
        return DtypeChoice("bfloat16", "tensor cores")
    flags = usable_flags() if cpu_flags is None else cpu_flags
    native = next((flag for flag in PAYS_FROM if flag in flags), None)
    if native is None:
        return DtypeChoice("float32", "no instruction of this CPU is known to make bfloat16 faster")
    least = PAYS_FROM[native]
    if least is None:
        return DtypeChoice("float32", f"bfloat16 has not been shown to be faster with {native}")
    if positions is None:
        return DtypeChoice("float32", "the size of a pass is not known")
    relation = "at least" if positions >= least else "fewer than"
    reason = f"{positions} positions a pass, {relation} the {least} from which {native} is faster"
    return DtypeChoice("bfloat16" if positions >= least else "float32", reason)


def usable_flags(environment: Mapping[str, str] = os.environ) -> frozenset[str]:
    """Return the processor's feature flags without the bfloat16 ones that oneDNN is told to leave alone."""
    limit = next((environment[name].upper() for name in _LIMIT_VARIABLES if environment.get(name)), "DEFAULT")
    left_out = {"amx_bf16"} if limit in _LIMITS_WITHOUT_AMX else set()
    return native_flags() - left_out - ({"avx512_bf16"} if limit in _LIMITS_WITHOUT_BF16 else set())


def native_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Return the processor's feature flags, empty where the system does not list them."""
    key = "Features" if platform.machine() == "aarch64" else "flags"
    try:
        lines = cpuinfo.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return frozenset()
    fields = (line.partition(":") for line in lines)
    return next((frozenset(rest.split()) for name, _, rest in fields if name.strip() == key), frozenset())
