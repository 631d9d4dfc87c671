"""Experiments on the teacher: its memory, its logits, its decoders, and its refusal to give gradients."""

import functools
from pathlib import Path

import gguf
import numpy as np

from q4kd.harness.inputs.arrays import (
    Array,
    Arrays,
    array_input,
    arrays_input,
    random_ids,
    read_array,
    read_arrays,
    rows_around,
    seeded_columns,
)
from q4kd.harness.inputs.collect import Comparators, arm_of, collect_probe, save_pairs
from q4kd.harness.inputs.command_lines import logits_words, probe_words
from q4kd.harness.inputs.demo import GOLDEN_LOGITS, demo_teacher, gguf_facts, golden_ids, golden_teacher
from q4kd.harness.inputs.models.code_blocks import decode, sample_code_blocks
from q4kd.harness.inputs.models.synthetic_models import random_matrix
from q4kd.harness.oracles import block_spec
from q4kd.harness.oracles.block_spec_low import LOW_SPECS, decode_low, sample_low_rows
from q4kd.harness.oracles.reference import read_gguf, reference_logits
from q4kd.harness.runs.experiment import ONE_THREAD, Arm, Facts, Inputs, declare, experiment
from q4kd.harness.subjects.teacher.probes import ROW_WAYS, ROW_WAYS_BF16
from q4kd.trainer.bench.synthetic import write_large_teacher
from q4kd.trainer.demo import golden_path

LARGE_POSITIONS = 192
COLUMNS = {"golden": 128, "demo": 256}
# Each arm is compared with these besides float64: name of the array, file of the logits, who computed them.
OTHER = {
    "golden": ("llamacpp", GOLDEN_LOGITS, "llama.cpp, same file"),
    "demo": ("frozen", golden_path(), "golden.npz, by transformers"),
}


# --- load-teacher: a file of ~94 MB through `q4kd logits`, watched from outside ---


def _large_teacher(inputs: Inputs) -> Path:
    return inputs.file("large.gguf", write_large_teacher)


def _load_argv(inputs: Inputs) -> list[str]:
    ids = random_ids(inputs, "large-ids.npy", 4096, (1, LARGE_POSITIONS))
    return logits_words(_large_teacher(inputs), ids, "--dtype", "float32")


def _dense_argv(inputs: Inputs) -> list[str]:
    """Return words that ask for what must not happen unasked: the log is the control of the one that is searched."""
    return [*_parity_argv("golden", inputs), "--backend", "dense"]


def _collect_load(run_dir: Path, inputs: Inputs) -> Facts:
    return gguf_facts(golden_teacher(inputs) if arm_of(run_dir) == "dense" else _large_teacher(inputs))


def _watched(arm: str | None) -> Arm:
    # The number of threads is fixed, because their buffers are part of what is measured.
    return Arm(arm, _load_argv, timeout_s=180, stall_s=60, interval_s=0.02, env={"OMP_NUM_THREADS": "2"})


declare(
    "load-teacher",
    "q4kd logits on a 94 MB Q4_K file, memory sampled from outside",
    _watched(None),
    collect=_collect_load,
    measures=("memory",),
)
declare(
    "load-teacher-controlled",
    "the same, beside a small file that is dequantised on request",
    _watched("packed"),
    Arm("dense", _dense_argv, timeout_s=60),
    collect=_collect_load,
    measures=("memory",),
)


# --- teacher-parity: logits of two real files against float64, llama.cpp and a frozen golden ---


def _parity_files(arm: str, inputs: Inputs) -> tuple[Path, Path]:
    """Return the model and its token ids."""
    if arm == "golden":
        return golden_teacher(inputs), golden_ids(inputs)
    return demo_teacher(inputs), array_input(inputs, "demo-ids.npy", lambda: read_arrays(golden_path())["ids"])


def _parity_argv(arm: str, inputs: Inputs) -> list[str]:
    return logits_words(*_parity_files(arm, inputs), "--dtype", "float32")


@experiment(
    "teacher-parity",
    "q4kd logits of the golden and the demo teacher against float64, llama.cpp and a frozen golden",
    *(Arm(arm, functools.partial(_parity_argv, arm), timeout_s=120, stall_s=60) for arm in ("golden", "demo")),
)
def _collect_parity(run_dir: Path, inputs: Inputs) -> Facts:
    arm = arm_of(run_dir)
    model, ids = _parity_files(arm, inputs)
    if not (run_dir / "logits.npy").is_file():
        return gguf_facts(model) | {"comparators": {}}
    subject = read_array(run_dir / "logits.npy")
    # float32 rounding of the reference (6e-8) is far below the bounds it serves, and halves the evidence.
    exact = reference_logits(read_gguf(model), read_array(ids)).astype(np.float32)
    # Every position and a seeded choice of columns are kept, since the evidence of sabotaged runs stays for good.
    columns = seeded_columns(exact.shape[1], COLUMNS[arm])
    name, source, other_engine = OTHER[arm]
    comparators: Comparators = {}
    for array, logits, engine in (
        ("float64", exact, "float64 forward over gguf"),
        (name, read_arrays(source)["logits"], other_engine),
    ):
        pair = {array: (subject[:, columns], logits[:, columns])}
        comparators |= save_pairs(run_dir, pair, ("q4kd logits", engine))
    return gguf_facts(model) | {"comparators": comparators}


# --- frozen-teacher: gradient requests, each with a valid twin ---


declare(
    "frozen-teacher",
    "every way to ask the teacher for a gradient, beside its valid twin",
    Arm(
        None,
        lambda at: probe_words("frozen-teacher", model=golden_teacher(at), out="probe.json"),
        timeout_s=60,
        env=ONE_THREAD,
    ),
    collect=collect_probe,
)


# --- superblock: the trainer's decoders on random and extreme blocks ---

# More rows than blocks are decoded at once (4,096), than are rounded at once (2,048) and than a product takes at once
# (1,024), and no multiple of any.
CODE_COLUMNS = 64  # kept of the types whose weights are codes of a table
MANY_ROWS, EDGES = 4500, (1024, 2048, 3072, 4096)
LOW_COLUMNS = 64


def _make_blocks() -> dict[str, Array]:
    rows = random_matrix(np.random.default_rng(5), "Q4_K", MANY_ROWS, block_spec.WEIGHTS, 0.05)
    low = {f"low-{name}": sample for name, sample in sample_low_rows(seed=4).items()}
    codes = {f"code-{name}": blocks for name, blocks in sample_code_blocks(seed=4).items()}
    return {**block_spec.sample_blocks(seed=3), "rows": rows, **low, **codes}


def _blocks(inputs: Inputs) -> Path:
    return arrays_input(inputs, "blocks.npz", _make_blocks)


def _superblock_argv(inputs: Inputs) -> list[str]:
    return probe_words("superblock", blocks=_blocks(inputs), out="decoded.npz", facts="probe.json")


@experiment(
    "superblock",
    "the trainer's decoders and products on random and extreme superblocks",
    Arm(None, _superblock_argv, timeout_s=60, env=ONE_THREAD),
)
def _collect_superblock(run_dir: Path, inputs: Inputs) -> Facts:
    facts, decoded = collect_probe(run_dir, inputs), read_arrays(run_dir / "decoded.npz")
    if not decoded:
        return facts | {"comparators": {}}
    blocks = read_arrays(_blocks(inputs))
    comparators: Comparators = {}

    def compare(name: str, of: str, reference: Array, subject_source: str, reference_source: str) -> None:
        comparators.update(save_pairs(run_dir, {name: (decoded[of], reference)}, (subject_source, reference_source)))

    for name in ("q4_k", "q6_k"):
        by_gguf = gguf.quants.dequantize(blocks[name], gguf.GGMLQuantizationType[name.upper()])
        by_spec = block_spec.DECODERS[name](blocks[name])
        product = blocks["activations"].astype(np.float64) @ by_gguf.astype(np.float64).T
        compare(f"{name}-gguf", name, by_gguf, "trainer decoder", "gguf.quants")
        compare(f"{name}-spec", name, by_spec, "trainer decoder", "scalar decoder from the layout")
        compare(f"{name}-product", f"{name}-product", product, "trainer product", "float64 product over gguf.quants")
    codes = [name for name in blocks if name.startswith("code-")]
    chosen = seeded_columns(block_spec.WEIGHTS, CODE_COLUMNS)
    subject = np.concatenate([decoded[name].reshape(-1, block_spec.WEIGHTS) for name in codes])
    by_gguf = np.concatenate([decode(name[5:], blocks[name]).reshape(-1, block_spec.WEIGHTS) for name in codes])
    pair = {"codes-gguf": (subject[:, chosen], by_gguf[:, chosen])}
    comparators |= save_pairs(run_dir, pair, ("trainer decoders", "gguf.quants"))
    zero = np.zeros_like(decoded["q6_k-zero"])
    compare("q6_k-zero", "q6_k-zero", zero, "trainer decoder at q = 32", "zero")
    sums = block_spec.offset_product(blocks["q4_k-offset"], blocks["activations"])
    compare("q4_k-offset", "q4_k-offset", sums, "trainer product", "block sums of the activations")
    by_gguf = gguf.quants.dequantize(blocks["rows"], gguf.GGMLQuantizationType.Q4_K)
    product = (blocks["activations"].astype(np.float64) @ by_gguf.astype(np.float64).T).astype(np.float32)
    kept = rows_around(MANY_ROWS, *EDGES, others=16)
    for name, ways in (("rows-float32", ROW_WAYS), ("rows-bfloat16", ROW_WAYS_BF16)):
        subject = np.concatenate([decoded[f"rows-{way}"][:, kept] for way in ways])
        reference = np.concatenate([product[:, kept]] * len(ways))
        sources = ("trainer products of many rows", "float64 product over gguf.quants")
        comparators |= save_pairs(run_dir, {name: (subject, reference)}, sources)
    return facts | {"comparators": comparators | _compare_low_types(run_dir, blocks, decoded)}


def _compare_low_types(run_dir: Path, blocks: Arrays, decoded: Arrays) -> Comparators:
    """Compare seeded columns of the rows of every type of two to five bits, one type after the other."""
    columns = seeded_columns(block_spec.WEIGHTS, LOW_COLUMNS)
    rows = {name: blocks[f"low-{name}"] for name in LOW_SPECS}
    ours = np.concatenate([decoded[f"low-{name}"][:, columns] for name in rows])
    by_spec = {name: decode_low(name, packed) for name, packed in rows.items()}
    by_gguf = {
        name: gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[name.upper()]) for name, packed in rows.items()
    }
    comparators: Comparators = {}
    for array, references, source in (
        ("low-spec", by_spec, "scalar decoder from the layout"),
        ("low-gguf", by_gguf, "gguf.quants"),
    ):
        reference = np.concatenate([exact[:, columns] for exact in references.values()])
        comparators |= save_pairs(run_dir, {array: (ours, reference)}, ("trainer decoder", source))
    return comparators
