"""The compute dtype follows the processor and the size of a pass, and says why."""

from pathlib import Path

import pytest

from q4kd.trainer.device import dtypes
from q4kd.trainer.device.dtypes import DTYPES, PAYS_FROM, choose_dtype, native_flags, usable_flags
from q4kd.trainer.errors import InputError

LEAST = PAYS_FROM["avx512_bf16"]
assert LEAST is not None


@pytest.mark.parametrize(
    ("flags", "positions", "expected"),
    [
        ({"avx2", "fma"}, 4096, "float32"),
        ({"avx512f", "avx512_bf16"}, LEAST, "bfloat16"),
        ({"avx512f", "avx512_bf16"}, LEAST - 1, "float32"),
        ({"avx512f", "avx512_bf16"}, None, "float32"),
        ({"asimd", "bf16"}, 4096, "float32"),  # Arm, which has not been measured
        ({"avx512f", "avx512_vnni"}, 4096, "float32"),
        (set(), 4096, "float32"),
    ],
)
def test_auto_follows_processor_and_size(flags: set[str], positions: int | None, expected: str) -> None:
    choice = choose_dtype("auto", "cpu", positions, flags)
    assert choice.name == expected
    assert "bfloat16" in choice.reason or "positions" in choice.reason or "size" in choice.reason


@pytest.mark.parametrize(("least", "expected"), [(None, "float32"), (512, "float32"), (256, "bfloat16")])
def test_amx_is_judged_by_its_own_measurement(
    least: int | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PAYS_FROM, "amx_bf16", least)
    monkeypatch.setitem(PAYS_FROM, "avx512_bf16", 1 if least != 256 else 10_000)
    assert choose_dtype("auto", "cpu", 256, {"avx512_bf16", "amx_bf16"}).name == expected


@pytest.mark.parametrize(
    ("limit", "left"),
    [
        ({}, {"amx_bf16", "avx512_bf16", "fma"}),
        ({"ONEDNN_MAX_CPU_ISA": "all"}, {"amx_bf16", "avx512_bf16", "fma"}),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_AMX"}, {"amx_bf16", "avx512_bf16", "fma"}),
        ({"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}, {"avx512_bf16", "fma"}),
        ({"ONEDNN_MAX_CPU_ISA": "avx512_core"}, {"fma"}),
        ({"DNNL_MAX_CPU_ISA": "AVX2"}, {"fma"}),
    ],
)
def test_instructions_that_onednn_must_leave_alone_do_not_count(
    limit: dict[str, str], left: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dtypes, "native_flags", lambda: frozenset({"amx_bf16", "avx512_bf16", "fma"}))
    assert usable_flags(limit) == left


@pytest.mark.parametrize("name", DTYPES)
def test_a_request_wins(name: str) -> None:
    assert choose_dtype(name, "cpu", 4096, {"avx512_bf16"}).name == name
    assert choose_dtype(name, "cuda").name == name


def test_cuda_computes_in_bfloat16_unless_told_otherwise() -> None:
    assert choose_dtype("auto", "cuda").name == "bfloat16"


def test_another_request_is_refused() -> None:
    with pytest.raises(InputError, match="float32 or bfloat16"):
        choose_dtype("float16", "cpu")


def test_flags_are_read_from_cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu avx512_bf16\n\nprocessor\t: 1\nflags\t\t: fpu\n")
    assert native_flags(cpuinfo) == {"fpu", "avx512_bf16"}
    assert native_flags(tmp_path / "none") == frozenset()
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    cpuinfo.write_text("Features\t: fp asimd bf16\n")
    assert native_flags(cpuinfo) == {"fp", "asimd", "bf16"}
