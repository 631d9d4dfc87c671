"""The compute dtype follows the processor, and says why."""

from pathlib import Path

import pytest

from q4kd.trainer.device.dtypes import DTYPES, choose_dtype, native_flags
from q4kd.trainer.errors import InputError


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"avx2", "fma"}, "float32"),
        ({"avx512f", "avx512_bf16"}, "bfloat16"),
        ({"amx_bf16", "amx_tile"}, "bfloat16"),
        ({"asimd", "bf16"}, "bfloat16"),  # Arm
        ({"avx512f", "avx512_vnni"}, "float32"),
        (set(), "float32"),
    ],
)
def test_auto_follows_the_processor(flags: set[str], expected: str) -> None:
    choice = choose_dtype("auto", "cpu", flags)
    assert choice.name == expected
    assert "bfloat16" in choice.reason or "native" in choice.reason


@pytest.mark.parametrize("name", DTYPES)
def test_a_request_wins(name: str) -> None:
    assert choose_dtype(name, "cpu", {"avx512_bf16"}).name == name
    assert choose_dtype(name, "cuda").name == name


def test_cuda_computes_in_bfloat16_unless_told_otherwise() -> None:
    assert choose_dtype("auto", "cuda", set()).name == "bfloat16"


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
