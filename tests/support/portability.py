"""Tests and gate as another processor, another number of threads or another Python would run them.

``nox -s portability`` runs every variant, one after another; ``-- --list`` names them. Instruction sets are taken away
from this processor by the variables of the libraries that choose them, so what runs is what an older processor runs.
Nothing but the standard library is imported here: noxfile.py uses this file before any environment exists.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import as_if

# Of oneDNN's levels, those at which its float32 or bfloat16 products change, and the processor flags that each needs.
LEVELS = {
    "AVX2": ("avx2", "fma"),
    "AVX512_CORE": ("avx512f", "avx512bw", "avx512dq", "avx512vl"),
    "AVX512_CORE_BF16": ("avx512_bf16",),
    "AVX512_CORE_AMX": ("amx_tile", "amx_bf16"),
}
THREADS = (1, 2, 16)
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
# What depends on instruction sets and threads more than on anything else: products, losses, steps. Under a minute.
NUMERIC_TESTS = (
    *("tests/trainer/loss/test_fused.py", "tests/trainer/loss/test_topk.py"),
    *("tests/trainer/teacher/cpu", "tests/trainer/train/test_step.py"),
)
# Without the comparison of bfloat16 with a dense model, which takes minutes where bfloat16 is emulated.
NUMERIC_CLAIMS = (
    "(TEACHER-003 and not TEACHER-003-BF16) or DISTILL-LOSS or DISTILL-STEP or LOSS-FORMS or LOSS-TOPK or FALSIFY-QS"
)


@dataclass(frozen=True)
class Variant:
    """One way to run: environment variables beside the usual ones, another Python, another automatic dtype."""

    name: str
    env: Mapping[str, str] = field(default_factory=dict)
    python: str | None = None
    as_if: str | None = None  # the processor flag by which the automatic dtype chooses, at every size


@dataclass(frozen=True)
class Outcome:
    """What tests and gate of a variant said, and how long they took together."""

    name: str
    tests: str
    gate: str
    seconds: float

    @property
    def is_green(self) -> bool:
        """Whether both passed."""
        return self.tests == self.gate == "green"


def processor_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> frozenset[str]:
    """Return the flags of an x86 processor; empty where there are none to read."""
    try:
        lines = cpuinfo.read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return frozenset()
    return next((frozenset(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), frozenset())


def levels(flags: Collection[str]) -> list[str]:
    """Return the levels that a processor has, from the lowest; the last is what it runs when nothing is forced."""
    found = []
    for name, needed in LEVELS.items():
        if not set(needed) <= set(flags):
            break
        found.append(name)
    return found


def limits(level: str) -> dict[str, str]:
    """Return the variables that keep oneDNN, torch's own kernels and MKL at a level."""
    is_avx2 = level == "AVX2"
    return {
        "ONEDNN_MAX_CPU_ISA": level,
        "ATEN_CPU_CAPABILITY": "avx2" if is_avx2 else "avx512",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2" if is_avx2 else "AVX512",
    }


def make_variants(flags: Collection[str], pythons: Collection[str]) -> list[Variant]:
    """Return every variant of a machine: its instruction sets, the highest unforced; threads; dtype; Pythons."""
    found = levels(flags)
    instructions = [Variant(level, limits(level)) for level in found[:-1]]
    highest = [Variant(found[-1] if found else "as it is")]
    threads = [Variant(f"threads-{count}", {"OMP_NUM_THREADS": str(count)}) for count in THREADS]
    others = [Variant("auto-bfloat16", as_if="amx_bf16"), *(Variant(f"python{name}", python=name) for name in pythons)]
    return [*instructions, *highest, *threads, *others]


def find_pythons(which: Callable[[str], str | None] = shutil.which) -> dict[str, str]:
    """Return the Pythons of ``PYTHONS`` on PATH that start, but for the one that runs this, by version.

    A pyenv shim is on PATH for versions that are not switched on; it does not start.
    """
    found = {}
    for name in PYTHONS:
        path = which(f"python{name}")
        if path is None or name == f"{sys.version_info.major}.{sys.version_info.minor}":
            continue
        words = [path, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"]
        started = subprocess.run(words, capture_output=True, text=True, check=False)
        if started.returncode == 0 and started.stdout.strip() == name:
            found[name] = path
    return found


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Return the options of ``nox -s portability``."""
    parser = argparse.ArgumentParser(prog="nox -s portability --", description="Tests and gate under other variants.")
    parser.add_argument("names", nargs="*", metavar="VARIANT", help="only these (default: all)")
    parser.add_argument("--extremes", action="store_true", help="only AVX2 and the highest instruction set")
    parser.add_argument("--lowest", action="store_true", help="only AVX2, where the processor has more than that")
    parser.add_argument("--numeric", action="store_true", help="only tests and claims on products, losses and steps")
    parser.add_argument("--list", action="store_true", help="name the variants of this machine and end")
    return parser.parse_args(words)


def select(variants: Sequence[Variant], options: argparse.Namespace, has_levels: Sequence[str]) -> list[Variant]:
    """Return the variants asked for, in their own order; none for ``--lowest`` where the lowest is all there is.

    Raises:
        SystemExit: for a name that no variant of this machine has.
    """
    wanted = list(options.names)
    if options.extremes:
        wanted += [has_levels[0], has_levels[-1]] if has_levels else ["as it is"]
    if options.lowest:
        wanted += has_levels[: min(1, len(has_levels) - 1)]
    known = {variant.name for variant in variants}
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise SystemExit(f"expected a variant of {', '.join(sorted(known))}; got {', '.join(unknown)}; see --list")
    chosen = bool(wanted) or options.lowest
    return [variant for variant in variants if not chosen or variant.name in wanted]


def commands(python: str, bundle: Path, *, numeric: bool) -> tuple[list[str], list[str]]:
    """Return the command lines of tests and gate."""
    tests = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", str(len(os.sched_getaffinity(0)))]
    gate = [python, "-m", "q4kd.harness", "falsify", "--contracts", "contracts", "--out", str(bundle)]
    # CUDA is no part of this: it has neither AVX2 nor OpenMP.
    gate += ["--profile", "cpu"]
    return ([*tests, *NUMERIC_TESTS], [*gate, "-k", NUMERIC_CLAIMS]) if numeric else (tests, gate)


def judge_tests(code: int) -> str:
    """Return what pytest's exit code says; no test at all is not green."""
    return "green" if code == 0 else f"red (exit {code})"


def judge_gate(code: int, bundle: Path, *, numeric: bool) -> str:
    """Return what the gate says. A selection cannot exit with 0, so its findings are counted."""
    if not numeric:
        return "green" if code == 0 else f"red (exit {code})"
    try:
        findings = json.loads((bundle / "findings.json").read_text(encoding="utf-8"))["findings"]
    except (OSError, ValueError, KeyError) as error:
        return f"red (exit {code}, no findings: {type(error).__name__})"
    judged = [finding for finding in findings if finding["scope"] == "required"]
    failed = [finding["key"] for finding in judged if finding["verdict"] != "corroborated"]
    if not judged:
        return "red (no claim judged)"
    return "green" if not failed else f"red ({', '.join(name.rpartition('::')[2] for name in failed)})"


def run_variant(variant: Variant, python: str, *, numeric: bool) -> Outcome:
    """Run tests and gate of one variant; both print as they go."""
    started = time.monotonic()
    print(f"--- {variant.name}: {dict(variant.env) or 'nothing forced'}", flush=True)
    with tempfile.TemporaryDirectory(prefix="q4kd-portability-") as name:
        folder, bundle = Path(name), Path(name) / "bundle"
        tests, gate = commands(python, bundle, numeric=numeric)
        forced = dict(variant.env)
        if variant.as_if:
            tests += ["--as-if", variant.as_if]
            forced |= as_if.children_environment(variant.as_if, folder)
        # As in `nox -s tests`: one thread each, unless the variant is about threads.
        by_tests = subprocess.run(tests, env={**os.environ, "OMP_NUM_THREADS": "1", **forced}, check=False).returncode
        by_gate = subprocess.run(gate, env={**os.environ, **forced}, check=False).returncode
        outcome = judge_gate(by_gate, bundle, numeric=numeric)
    return Outcome(variant.name, judge_tests(by_tests), outcome, time.monotonic() - started)


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """Return a line a variant: tests, gate, minutes."""
    width = max(12, *(len(outcome.tests) for outcome in outcomes))
    lines = [f"{'variant':<18}  {'tests':<{width}}  {'seconds':>7}  gate"]
    lines += [f"{one.name:<18}  {one.tests:<{width}}  {one.seconds:>7.0f}  {one.gate}" for one in outcomes]
    return lines
