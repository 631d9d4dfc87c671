"""``nox -s portability``: the variants of a machine, which are chosen, and that no red one is shown as green."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import portability
import pytest
from portability import Outcome, Variant

EPYC = {"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"}
XEON = EPYC | {"amx_tile", "amx_bf16"}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (set(), []),
        ({"avx2", "fma"}, ["AVX2"]),
        (EPYC - {"avx512_bf16"}, ["AVX2", "AVX512_CORE"]),
        (EPYC, ["AVX2", "AVX512_CORE", "AVX512_CORE_BF16"]),
        (XEON, ["AVX2", "AVX512_CORE", "AVX512_CORE_BF16", "AVX512_CORE_AMX"]),
        (XEON - {"avx512vl"}, ["AVX2"]),  # a level stands on those below it
    ],
)
def test_levels_follow_the_flags(flags: set[str], expected: list[str]) -> None:
    assert portability.levels(flags) == expected


def test_flags_are_those_of_the_processor(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nflags\t\t: fpu avx2 fma\n\nprocessor\t: 1\nflags\t\t: fpu\n")
    assert portability.processor_flags(cpuinfo) == {"fpu", "avx2", "fma"}
    assert portability.processor_flags(tmp_path / "none") == frozenset()


def test_every_level_below_the_highest_is_forced_and_the_highest_is_not() -> None:
    variants = {variant.name: variant for variant in portability.make_variants(XEON, ["3.12"])}
    assert list(variants) == [
        *portability.LEVELS,
        "threads-1",
        "threads-2",
        "threads-16",
        "auto-bfloat16",
        "python3.12",
    ]
    assert variants["AVX2"].env == {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    }
    assert variants["AVX512_CORE_BF16"].env["ONEDNN_MAX_CPU_ISA"] == "AVX512_CORE_BF16"
    assert not variants["AVX512_CORE_AMX"].env
    assert variants["threads-16"].env == {"OMP_NUM_THREADS": "16"}
    assert variants["python3.12"].python == "3.12"


@pytest.mark.parametrize(
    ("words", "flags", "expected"),
    [
        (["--extremes"], XEON, ["AVX2", "AVX512_CORE_AMX"]),
        (["--extremes"], {"avx2", "fma"}, ["AVX2"]),
        (["--extremes"], set(), ["as it is"]),
        (["--lowest"], EPYC, ["AVX2"]),
        (["--lowest"], {"avx2", "fma"}, []),  # the usual sessions are that
        (["--lowest"], set(), []),
        (["threads-2", "AVX2"], EPYC, ["AVX2", "threads-2"]),
        ([], {"avx2", "fma"}, ["AVX2", "threads-1", "threads-2", "threads-16", "auto-bfloat16"]),
    ],
)
def test_options_select(words: list[str], flags: set[str], expected: list[str]) -> None:
    found = portability.select(
        portability.make_variants(flags, []), portability.parse(words), portability.levels(flags)
    )
    assert [variant.name for variant in found] == expected


def test_an_unknown_variant_is_refused_by_name() -> None:
    with pytest.raises(SystemExit, match=r"expected a variant of .*AVX2.*got AVX999"):
        portability.select(portability.make_variants(EPYC, []), portability.parse(["AVX999"]), ["AVX2"])


def test_a_python_that_does_not_start_is_not_there(tmp_path: Path) -> None:
    scripts = {"3.12": "echo 3.12", "3.13": "exit 127", "3.14": "echo 3.9"}
    for name, script in scripts.items():
        path = tmp_path / f"python{name}"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
    own = f"{sys.version_info.major}.{sys.version_info.minor}"
    found = portability.find_pythons(
        lambda name: str(tmp_path / name) if name.removeprefix("python") in scripts else None
    )
    assert found == ({"3.12": str(tmp_path / "python3.12")} if own != "3.12" else {})


def finding(verdict: str, scope: str = "required", key: str = "c::A-1") -> dict[str, str]:
    return {"key": key, "scope": scope, "verdict": verdict}


@pytest.mark.parametrize(
    ("findings", "expected"),
    [
        ([finding("corroborated")], "green"),
        ([finding("corroborated"), finding("inconclusive", "not_gating")], "green"),
        ([finding("corroborated"), finding("falsified", key="c::B-2")], "red (B-2)"),
        ([finding("inconclusive")], "red (A-1)"),
        ([], "red (no claim judged)"),
        (None, "red (exit 2, no findings: FileNotFoundError)"),
    ],
)
def test_a_selection_is_judged_by_its_findings(
    findings: list[dict[str, str]] | None, expected: str, tmp_path: Path
) -> None:
    if findings is not None:
        (tmp_path / "findings.json").write_text(json.dumps({"findings": findings}))
    assert portability.judge_gate(2, tmp_path, numeric=True) == expected


def test_the_whole_gate_is_judged_by_its_exit_code(tmp_path: Path) -> None:
    (tmp_path / "findings.json").write_text(json.dumps({"findings": [finding("corroborated")]}))
    assert portability.judge_gate(2, tmp_path, numeric=False) == "red (exit 2)"
    assert portability.judge_gate(0, tmp_path, numeric=False) == "green"


def test_a_variant_reaches_tests_and_gate(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    python = tmp_path / "python"
    shown = 'echo "$3 $ONEDNN_MAX_CPU_ISA $OMP_NUM_THREADS"'
    # pytest passes; the gate ends as a falsified claim ends it.
    python.write_text(f'#!/bin/sh\n{shown}\n[ "$2" = pytest ] || exit 1\n')
    python.chmod(0o755)
    outcome = portability.run_variant(
        Variant("v", {"ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "16"}), str(python), numeric=False
    )
    assert (outcome.tests, outcome.gate, outcome.is_green) == ("green", "red (exit 1)", False)
    assert capfd.readouterr().out.splitlines()[1:] == ["-q AVX2 16", "falsify AVX2 16"]


def test_another_automatic_dtype_reaches_tests_and_gate(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$*"; grep -h pretend "${PYTHONPATH%%:*}/sitecustomize.py"\n')
    python.chmod(0o755)
    assert portability.run_variant(Variant("v", as_if="amx_bf16"), str(python), numeric=False).is_green
    tests, first, gate, second = capfd.readouterr().out.splitlines()[1:]
    assert tests.endswith("--as-if amx_bf16")
    assert "falsify" in gate
    assert first == second == "as_if.pretend('amx_bf16')"


def test_the_table_names_what_is_red() -> None:
    lines = portability.table([Outcome("AVX2", "green", "red (A-1)", 61.2), Outcome("threads-2", "green", "green", 5)])
    assert lines[1].split() == ["AVX2", "green", "61", "red", "(A-1)"]
    assert len(lines) == 3


def test_what_is_called_numeric_is_there() -> None:
    root = Path(__file__).parents[2]
    assert all((root / path).exists() for path in portability.NUMERIC_TESTS)
    ids = [
        line
        for path in (root / "contracts").glob("*.yaml")
        for line in path.read_text().splitlines()
        if "- id:" in line
    ]
    for part in re.findall(r"[A-Z0-9-]+", portability.NUMERIC_CLAIMS):
        assert any(part in line for line in ids), part


def test_torch_and_onednn_obey(tmp_path: Path) -> None:
    flags = portability.processor_flags()
    if portability.levels(flags)[:1] != ["AVX2"] or len(portability.levels(flags)) < 2:
        pytest.skip("this processor has no instruction set above AVX2 to take away")
    program = """
import torch
from q4kd.trainer.bench.teacher.dtypes import implementation
from q4kd.trainer.kernels.gemm import multiply
x = torch.ones(128, 64)
print(torch.backends.cpu.get_cpu_capability(), implementation(lambda: multiply(x, torch.ones(32, 64))))
"""
    above = re.compile("avx512|avx10|amx")
    for limits in ({}, portability.limits("AVX2")):
        # The session itself may be held to a lower instruction set.
        own = {name: value for name, value in os.environ.items() if name not in portability.limits("AVX2")}
        env = {**own, **limits}
        done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=True)
        capability, _, made_by = done.stdout.strip().partition(" ")
        # With AVX2 some releases of oneDNN name the implementation (brgemm:avx2), others do not (gemm:jit).
        assert made_by
        assert bool(above.search(made_by)) is not bool(limits)
        assert (capability == "AVX2") is bool(limits)
