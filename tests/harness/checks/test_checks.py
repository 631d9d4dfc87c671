"""Every check corroborates the good evidence, falsifies the bad, and never passes on nothing."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from check_outcomes import evaluate, outcome
from jsonschema import Draft202012Validator
from raw_runs import KILLED, event, samples, write_run

from q4kd.harness.checks import CHECKS, REASONS, Judgement
from q4kd.harness.claims.contract import load_contracts
from q4kd.harness.claims.folder import default_contracts_folder
from q4kd.harness.records.raw_run import RawRun
from q4kd.trainer.errors import InputError

MB = 1_000_000


# --- log_absent ---

LOG = {
    "absent": [["PMAT-333", "Dequantizing"], ["dequantizing", "layers to F32"]],
    "completion": ["logits:"],
    "known_positive": ["teacher ready"],
}
GOOD_LOG = "teacher ready: 3 tensors\nlogits: 4 positions\n"


@pytest.mark.parametrize(
    ("text", "least", "expected"),
    [
        (GOOD_LOG, 1, "corroborated"),
        (GOOD_LOG + "PMAT-333: Dequantizing now\n", 1, "falsified"),
        (GOOD_LOG + "Dequantizing 28 Layers To F32\n", 1, "falsified"),
        (GOOD_LOG + "dequantizing nothing\nlayers to F32\n", 1, "corroborated"),
        ("teacher ready\n", 1, "no completion marker"),
        ("logits: 4\n", 1, "no known positive"),
        ("teacher prepared\nlogits: 4\n", 1, "no known positive"),
        ("", 1, "no completion marker"),
        (GOOD_LOG, 3, "too few observations"),
    ],
)
def test_log_absent(tmp_path: Path, text: str, least: int, expected: str) -> None:
    assert outcome(evaluate("log_absent", write_run(tmp_path, stdout=text), LOG, least)) == expected


# --- memory_ceiling ---

CEILING = {
    "series": "rss_above_baseline",
    "phase": ["imports_done", "done"],
    "ceiling": {"times": 1.25, "of": "gguf_tensor_bytes", "plus_bytes": 10 * MB},
}
PHASE = [event("imports_done", 1.0), event("done", 5.0)]
STEADY = [(t / 4, 200 * MB + (50 * MB if t > 8 else 0)) for t in range(21)]
FACTS = {"gguf_tensor_bytes": 80 * MB}


@pytest.mark.parametrize(
    ("points", "events", "ending", "facts", "least", "expected"),
    [
        (STEADY, PHASE, {}, FACTS, 10, "corroborated"),
        ([*STEADY, (4.5, 200 * MB + 110 * MB)], PHASE, {}, FACTS, 10, "corroborated"),
        ([*STEADY, (4.5, 200 * MB + 110 * MB + 1)], PHASE, {}, FACTS, 10, "falsified"),
        (STEADY, PHASE, {}, FACTS, 30, "too few observations"),
        (STEADY[:12], PHASE, {}, FACTS, 5, "phase not covered"),
        ([STEADY[0], *STEADY[10:]], PHASE, {}, FACTS, 5, "phase not covered"),
        (STEADY[:8] + STEADY[14:], PHASE, {}, FACTS, 5, "phase not covered"),
        ([], PHASE, {}, FACTS, 1, "phase not covered"),
        (STEADY, PHASE[:1], KILLED, FACTS, 10, "run incomplete"),
        (STEADY, PHASE, {"returncode": 1}, FACTS, 10, "run incomplete"),
        (STEADY, PHASE, {}, {}, 10, "evidence unreadable"),
    ],
)
def test_memory_ceiling(tmp_path: Path, points, events, ending, facts, least, expected) -> None:  # type: ignore[no-untyped-def]
    run = write_run(tmp_path, events=events, memory=samples(*sorted(points)), ending=ending, facts=facts)
    assert outcome(evaluate("memory_ceiling", run, CEILING, least)) == expected


def test_memory_of_the_device_is_not_that_of_the_host(tmp_path: Path) -> None:
    params = {"series": "gpu_bytes", "phase": ["imports_done", "done"], "ceiling": {"bytes": 300 * MB}}
    on_host = write_run(tmp_path, "a", events=PHASE, memory=samples(*STEADY))
    assert outcome(evaluate("memory_ceiling", on_host, params, 5)) == "phase not covered"
    on_gpu = write_run(tmp_path, "b", events=PHASE, memory=samples(*STEADY, gpu_bytes=301 * MB))
    assert outcome(evaluate("memory_ceiling", on_gpu, params, 5)) == "falsified"


# --- residency ---

RESIDENCY = {"max_dense_bytes": 0, "max_ratio": 1.02, "outside": {"times": 1.25, "plus_bytes": 10 * MB}}
TYPES = {"Q4_K": 70 * MB, "Q6_K": 10 * MB}


def residency_run(tmp_path: Path, held: dict[str, int], dense: int = 0, growth: int = 90 * MB, **more: Any) -> RawRun:
    ready = event("teacher_ready", 2.0, resident_bytes=held, dense_bytes_of_quantised=dense, scratch_bytes=8 * MB)
    points = [(t / 4, 200 * MB + (growth if t > 8 else 0)) for t in range(21)]
    return write_run(
        tmp_path,
        events=[event("imports_done", 1.0), ready, event("done", 5.0)],
        memory=samples(*points) if more.pop("sampled", True) else [],
        facts={"gguf_tensor_bytes": 80 * MB, "gguf_bytes_by_type": TYPES},
        **more,
    )


@pytest.mark.parametrize(
    ("held", "options", "expected"),
    [
        (TYPES, {}, "corroborated"),
        (TYPES, {"dense": 1}, "falsified"),
        (TYPES | {"F32": 2 * MB}, {}, "falsified"),
        ({"Q4_K": 60 * MB, "F32": 10 * MB, "Q6_K": 10 * MB}, {}, "falsified"),
        (TYPES, {"growth": 111 * MB}, "falsified"),
        ({"Q4_K": 70 * MB}, {}, "falsified"),
        (TYPES, {"ending": KILLED}, "run incomplete"),
        (TYPES, {"sampled": False}, "too few observations"),
    ],
)
def test_residency(tmp_path: Path, held: dict[str, int], options: dict[str, Any], expected: str) -> None:
    assert outcome(evaluate("residency", residency_run(tmp_path, held, **options), RESIDENCY, 3)) == expected


@pytest.mark.parametrize(
    ("until", "when", "expected"),
    [(None, 5.2, "falsified"), ("done", 5.2, "corroborated"), ("done", 4.9, "falsified"), ("absent", 5.2, "falsified")],
)
def test_residency_until_an_event(tmp_path: Path, until: str | None, when: float, expected: str) -> None:
    run = residency_run(tmp_path, TYPES)
    points = [*[(t / 4, 200 * MB) for t in range(21)], (when, 200 * MB + 111 * MB)]
    late = write_run(tmp_path, "late", events=run.events, memory=samples(*sorted(points)), facts=dict(run.facts))
    params = {**RESIDENCY, "outside": {**RESIDENCY["outside"], **({"until": until} if until else {})}}  # type: ignore[dict-item]
    assert outcome(evaluate("residency", late, params, 3)) == expected


def test_residency_without_the_teachers_account(tmp_path: Path) -> None:
    run = write_run(tmp_path, facts={"gguf_tensor_bytes": 80 * MB, "gguf_bytes_by_type": TYPES})
    assert outcome(evaluate("residency", run, RESIDENCY)) == "run incomplete"


# --- parity ---

RNG = np.random.default_rng(0)
REFERENCE = RNG.normal(size=(4, 50))
SOURCES = {"comparators": {"x": {"subject": "program", "reference": "float64"}}}
NOISY = REFERENCE * (1 + 1e-6)


def parity(tmp_path: Path, subject: Any, reference: Any, facts: Any = SOURCES, least: int = 4, **params: Any) -> str:
    run = write_run(tmp_path, facts=facts, arrays={"x": {"subject": subject, "reference": reference}})
    wanted = {"array": "x", "metric": "relative_frobenius", "max": 1e-5} | params
    return outcome(evaluate("parity", run, {k: v for k, v in wanted.items() if v is not None}, least))


def test_parity_verdicts(tmp_path: Path) -> None:
    one_row = NOISY.copy()
    one_row[2] *= 1 + 2e-5
    not_finite = NOISY.copy()
    not_finite[1, 3] = np.nan
    cases = {
        "corroborated": (NOISY, REFERENCE, {}),
        "falsified": (one_row, REFERENCE, {}),
        "falsified ": (not_finite, REFERENCE, {}),
        "falsified  ": (NOISY[:, :49], REFERENCE, {}),
        "self comparison": (NOISY, REFERENCE, {"facts": {"comparators": {"x": {"subject": "p", "reference": "p"}}}}),
        "self comparison ": (REFERENCE, REFERENCE, {}),
        "constant": (np.ones((4, 5)) * (1 + 1e-7), np.ones((4, 5)), {}),
        "reference not finite": (NOISY, not_finite, {}),
        "too few observations": (NOISY, REFERENCE, {"least": 5}),
        "too few observations ": (NOISY[:0], REFERENCE[:0], {}),
        "run incomplete": (NOISY, REFERENCE, {"facts": {"comparators": {}}}),
    }
    for index, (expected, (subject, reference, options)) in enumerate(cases.items()):
        assert parity(tmp_path / str(index), subject, reference, **options) == expected.strip(), expected


def test_parity_metrics(tmp_path: Path) -> None:
    cosine = {"metric": "cosine", "min": 0.999, "max": None}
    assert parity(tmp_path / "a", NOISY, REFERENCE, **cosine) == "corroborated"
    assert parity(tmp_path / "b", REFERENCE + RNG.normal(0, 0.1, REFERENCE.shape), REFERENCE, **cosine) == "falsified"
    exact = {"metric": "bit_equal", "max": None}
    single = REFERENCE.astype(np.float32)
    assert parity(tmp_path / "c", single, single.copy(), **exact) == "corroborated"
    assert parity(tmp_path / "d", single, np.nextafter(single, np.float32(9)), **exact) == "falsified"
    zero = np.zeros((4, 1))
    assert parity(tmp_path / "e", zero, zero, metric="max_abs", max=0.0) == "corroborated"
    assert parity(tmp_path / "f", zero + 1e-300, zero, metric="max_abs", max=0.0) == "falsified"


# --- survives ---

SURVIVES = {"steps": 5, "checkpoint": True}
CHECKPOINT = {
    "step": 5, "optimizer_step_min": 5, "optimizer_step_max": 5, "tensors": 9, "finite": True, "digests_match": True,
}  # fmt: skip
STEPS = [event("step", float(step), step=step) for step in range(1, 6)]
DONE = [event("done", 9.0)]


@pytest.mark.parametrize(
    ("events", "ending", "checkpoint", "expected"),
    [
        (STEPS + DONE, {}, CHECKPOINT, "corroborated"),
        (STEPS[:4] + DONE, {}, CHECKPOINT, "falsified"),
        (STEPS[:2], KILLED, None, "falsified"),
        ([], {"cause": "stalled", "returncode": None}, None, "falsified"),
        (STEPS[:3] + STEPS[2:] + DONE, {}, CHECKPOINT, "falsified"),
        (STEPS + DONE, {"returncode": 137}, CHECKPOINT, "falsified"),
        (STEPS, {}, CHECKPOINT, "falsified"),
        (STEPS + DONE, {}, None, "falsified"),
        (STEPS + DONE, {}, CHECKPOINT | {"step": 4}, "falsified"),
        (STEPS + DONE, {}, CHECKPOINT | {"optimizer_step_min": 3}, "falsified"),
        (STEPS + DONE, {}, CHECKPOINT | {"finite": False}, "falsified"),
        (STEPS + DONE, {}, CHECKPOINT | {"digests_match": False}, "falsified"),
        (STEPS + DONE, {"boot_id_end": "c"}, CHECKPOINT, "machine restarted"),
    ],
)
def test_survives(tmp_path: Path, events, ending, checkpoint, expected) -> None:  # type: ignore[no-untyped-def]
    run = write_run(tmp_path, events=events, ending=ending, facts={"checkpoint": checkpoint})
    assert outcome(evaluate("survives", run, SURVIVES, 5)) == expected


def test_a_kill_without_proof_is_not_called_oom(tmp_path: Path) -> None:
    run = write_run(tmp_path, events=STEPS[:2], ending=KILLED)
    assert "killed cause unknown" in str(evaluate("survives", run, SURVIVES).counterexample)
    proven = write_run(tmp_path, "proven", events=STEPS[:2], ending=KILLED | {"cause": "oom_killed"})
    assert "oom killed" in str(evaluate("survives", proven, SURVIVES).counterexample)


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("dequantizing 2 layers to F32\n", "corroborated"),
        ("PMAT-333: Dequantizing\n", "corroborated"),
        ("expanding 2 layers to F32\n", "no known positive"),  # the program was reworded
        ("", "no known positive"),
    ],
)
def test_log_absent_needs_a_control_that_still_says_the_words(tmp_path: Path, said: str, expected: str) -> None:
    runs = {
        "exp.packed": write_run(tmp_path, "exp.packed", stdout=GOOD_LOG),
        "exp.dense": write_run(tmp_path, "exp.dense", stdout=said + GOOD_LOG),
    }
    assert outcome(evaluate("log_absent", runs, LOG | {"arm": "packed", "control": "dense"})) == expected
    with pytest.raises(InputError):
        evaluate("log_absent", runs, LOG | {"arm": "packed", "control": "other"})


# --- improves ---

IMPROVES = {"metric": "eval.kl", "better": "lower", "treatment": "kd", "control": "ce", "min_seeds": 3, "margin_se": 2}


def arm(tmp_path: Path, name: str, start: float, end: float, **options: Any) -> RawRun:
    steps = options.pop("steps", 20)
    taken = [event("step", step=n, loss=start + (end - start) * n / steps, tokens=8) for n in range(1, steps + 1)]
    plan = event("run_plan", data_sha256=options.pop("data", "d"), seed=1)
    evaluations = [event("eval", kl=start, loss=start, agreement=0.1), event("eval", kl=end, loss=end, agreement=0.2)]
    alpha = "0.1" if name.startswith("kd") else "1.0"
    argv = ["--set", f"alpha={alpha}", "--set", f"lr={options.pop('lr', 1)}"]
    return write_run(
        tmp_path,
        f"exp.{name}",
        events=[plan, evaluations[0], *taken, evaluations[1], event("done")],
        argv=argv,
        **options,
    )


def arms(tmp_path: Path, ends: list[tuple[float, float]], **options: Any) -> dict[str, RawRun]:
    runs = {}
    for seed, (treated, control) in enumerate(ends, 1):
        runs[f"exp.kd-seed{seed}"] = arm(tmp_path, f"kd-seed{seed}", 3.0, treated, **options)
        runs[f"exp.ce-seed{seed}"] = arm(tmp_path, f"ce-seed{seed}", 3.0, control)
    return runs


CLEAR = [(1.0, 1.5), (1.1, 1.5), (1.05, 1.6)]


@pytest.mark.parametrize(
    ("ends", "options", "expected"),
    [
        (CLEAR, {}, "corroborated"),
        ([(1.0, 1.5), (1.6, 1.5), (1.05, 1.6)], {}, "falsified"),
        ([(1.0, 1.01), (1.0, 3.0), (1.0, 1.01)], {}, "falsified"),
        ([(1.0, 1.0)] * 3, {}, "falsified"),
        ([(3.5, 3.9)] * 3, {}, "falsified"),
        (CLEAR[:2], {}, "too few observations"),
        (CLEAR, {"steps": 21}, "unequal budget"),
        (CLEAR, {"data": "other"}, "unequal budget"),
        (CLEAR, {"lr": 2}, "unequal budget"),
        (CLEAR, {"ending": KILLED}, "run incomplete"),
    ],
)
def test_improves(tmp_path: Path, ends, options, expected) -> None:  # type: ignore[no-untyped-def]
    assert outcome(evaluate("improves", arms(tmp_path, ends, **options), IMPROVES)) == expected


def test_improves_over_its_own_start(tmp_path: Path) -> None:
    params = IMPROVES | {"control": "start", "metric": "step.loss"}
    runs = arms(tmp_path / "a", CLEAR)
    assert outcome(evaluate("improves", runs, params)) == "corroborated"
    assert outcome(evaluate("improves", runs, params | {"min_steps": 21})) == "too few observations"
    flat = arms(tmp_path / "b", [(3.0, 1.0)] * 3)
    assert outcome(evaluate("improves", flat, params)) == "falsified"


# --- rejects, table ---

REJECTS = {"error": "FrozenTeacherError", "cases": ["a", "b"]}


def case(name: str, error: str | None = "FrozenTeacherError", twin: str | None = None) -> dict[str, Any]:
    return {"case": name, "error": error, "twin": f"{name} valid", "twin_error": twin}


@pytest.mark.parametrize(
    ("cases", "expected"),
    [
        ([case("a"), case("b")], "corroborated"),
        ([case("a"), case("b", None)], "falsified"),
        ([case("a"), case("b", "TypeError")], "falsified"),
        ([case("a")], "run incomplete"),
        ([], "run incomplete"),
        ([case("a"), case("b", twin="InputError")], "twin refused"),
    ],
)
def test_rejects(tmp_path: Path, cases: list[dict[str, Any]], expected: str) -> None:
    assert outcome(evaluate("rejects", write_run(tmp_path, facts={"cases": cases}), REJECTS)) == expected


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"x": 1, "y": True}, "corroborated"),
        ({"x": 2, "y": True}, "falsified"),
        ({"x": 1}, "falsified"),
        ({"x": 1, "y": True, "z": 0}, "falsified"),
        ({}, "falsified"),
        (None, "run incomplete"),
    ],
)
def test_table(tmp_path: Path, found: dict[str, Any] | None, expected: str) -> None:
    params = {"table": "t", "expected": {"x": 1, "y": True}}
    run = write_run(tmp_path, facts={"tables": {"t": found}} if found is not None else {})
    assert outcome(evaluate("table", run, params)) == expected


# --- time ---


def test_no_check_matches_a_contracts_text_as_a_regular_expression() -> None:
    for name, check in CHECKS.items():
        source = Path(str(check.__file__)).read_text()  # type: ignore[attr-defined]
        # improves matches run names, which are short and ours, against a pattern of its own.
        assert ("import re\n" in source) == (name == "improves"), name


@pytest.mark.parametrize("line", ["ab" * (1 << 20), "a" * (2 << 20), ("a" * 1000 + "\n") * 2000])
def test_matching_fragments_takes_linear_time(tmp_path: Path, line: str) -> None:
    fragments = ["a" * 60 + "b"] * 8
    run = write_run(tmp_path, stdout=line, events=DONE)
    wanted = {"lines": [{"fragments": fragments, "times": 0}] * 8, "completion": fragments}
    started = time.process_time()
    evaluate("log_present", run, wanted)
    evaluate("log_absent", run, {"absent": [fragments] * 8, "completion": fragments, "known_positive": fragments})
    assert time.process_time() - started < 5


# --- the registry ---


def test_every_check_is_used_and_every_bound_has_a_direction() -> None:
    claims = [claim for contract in load_contracts(default_contracts_folder()) for claim in contract.claims]
    uses = [use for claim in claims if claim.falsifier for use in claim.falsifier.checks]
    assert {use.check for use in uses} == set(CHECKS)
    for name, check in CHECKS.items():
        Draft202012Validator.check_schema(check.PARAMS)
        assert name == check.NAME
        assert set(check.DIRECTIONS.values()) <= {"upper", "lower"}


def test_a_judgement_without_its_reason_or_counterexample_cannot_be_made() -> None:
    for options in (
        {"verdict": "inconclusive"},
        {"verdict": "inconclusive", "reason": "felt wrong"},
        {"verdict": "corroborated", "reason": next(iter(REASONS))},
        {"verdict": "falsified"},
        {"verdict": "corroborated", "counterexample": "x"},
    ):
        with pytest.raises(ValueError, match="verdict"):
            Judgement(measured="", bound="", **options)  # type: ignore[arg-type]
