"""Experiments on the teacher: its memory, its logits, its decoders, and its refusal to give gradients."""

import functools
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from q4kd.harness import block_spec
from q4kd.harness.experiment import Arm, Experiment, Inputs, register
from q4kd.harness.reference import read_gguf, reference_logits
from q4kd.trainer.demo import golden_path, teacher_path
from q4kd.trainer.files import read_json
from q4kd.trainer.synthetic import write_large_teacher

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_TEACHER = GOLDEN / "qwen2-q4_k_m.gguf"
GOLDEN_LOGITS = GOLDEN / "qwen2-q4_k_m.llamacpp.npz"
LARGE_POSITIONS = 192
COLUMNS = {"golden": 128, "demo": 256}
# What each arm is compared with besides float64: name of the array, where its logits are, who computed them.
OTHER = {
    "golden": ("llamacpp", GOLDEN_LOGITS, "llama.cpp, same file"),
    "demo": ("frozen", golden_path(), "golden.npz, by transformers"),
}


def gguf_facts(path: Path) -> dict[str, Any]:
    """Measure a GGUF with the gguf package alone: tensor bytes, in all and by type."""
    reader = gguf.GGUFReader(path)
    by_type: dict[str, int] = {}
    for tensor in reader.tensors:
        by_type[tensor.tensor_type.name] = by_type.get(tensor.tensor_type.name, 0) + int(tensor.n_bytes)
    return {
        "gguf_tensor_bytes": sum(by_type.values()),
        "gguf_bytes_by_type": by_type,
        "gguf_file_bytes": path.stat().st_size,
    }


def save_pairs(run_dir: Path, pairs: Mapping[str, tuple[Any, Any]], sources: tuple[str, str]) -> dict[str, Any]:
    """Write ``arrays/<name>.npz`` with subject and reference; return the ``comparators`` fact."""
    for name, (subject, reference) in pairs.items():
        path = run_dir / "arrays" / f"{name}.npz"
        np.savez_compressed(path, subject=subject, reference=reference)
    return {name: {"subject": sources[0], "reference": sources[1]} for name in pairs}


# --- load-teacher: a file of ~94 MB through `q4kd logits`, watched from outside ---


def _large_teacher(inputs: Inputs) -> Path:
    return inputs.file("large.gguf", write_large_teacher)


def _large_ids(inputs: Inputs) -> Path:
    def make(path: Path) -> None:
        with path.open("wb") as file:
            np.save(file, np.random.default_rng(1).integers(0, 4096, (1, LARGE_POSITIONS)))

    return inputs.file("large-ids.npy", make)


def _prepare_load(inputs: Inputs) -> None:
    _large_teacher(inputs)
    _large_ids(inputs)
    _dense_argv(inputs)


def _load_argv(inputs: Inputs) -> list[str]:
    model, ids = str(_large_teacher(inputs)), str(_large_ids(inputs))
    return ["logits", model, "--ids", ids, "--out", "logits.npy", "--dtype", "float32", "--events", "events.jsonl"]


def _dense_argv(inputs: Inputs) -> list[str]:
    """Ask for what must not happen unasked: its log is the control of the one that is searched."""
    return [*_parity_argv("golden", inputs), "--backend", "dense"]


def _collect_load(run_dir: Path, inputs: Inputs) -> dict[str, Any]:
    return gguf_facts(golden_teacher(inputs) if run_dir.name.endswith(".dense") else _large_teacher(inputs))


def _watched(arm: str | None) -> Arm:
    # A fixed number of threads: their buffers are part of what is measured.
    return Arm(arm, _load_argv, timeout_s=180, stall_s=60, interval_s=0.02, env={"OMP_NUM_THREADS": "2"})


for _name, _title, _arms in (
    ("load-teacher", "q4kd logits on a 94 MB Q4_K file, memory sampled from outside", (_watched(None),)),
    (
        "load-teacher-controlled",
        "the same, beside a small file that is dequantised on request",
        (_watched("packed"), Arm("dense", _dense_argv, timeout_s=60)),
    ),
):
    register(
        Experiment(
            name=_name,
            title=_title,
            needs=(),
            arms=_arms,
            prepare=_prepare_load,
            collect=_collect_load,
        )
    )


# --- teacher-parity: logits of two real files against float64, llama.cpp and a frozen golden ---


def _parity_ids(arm: str, inputs: Inputs) -> Path:
    source = GOLDEN_LOGITS if arm == "golden" else golden_path()

    def make(path: Path) -> None:
        with np.load(source, allow_pickle=False) as arrays, path.open("wb") as file:
            np.save(file, arrays["ids"])

    return inputs.file(f"{arm}-ids.npy", make)


def _parity_model(arm: str, inputs: Inputs) -> Path:
    source = GOLDEN_TEACHER if arm == "golden" else teacher_path()
    return inputs.file(f"{arm}.gguf", lambda path: shutil.copyfile(source, path))


def golden_teacher(inputs: Inputs) -> Path:
    """Return the golden teacher as an input of this session."""
    return _parity_model("golden", inputs)


def demo_teacher(inputs: Inputs) -> Path:
    """Return the demo teacher as an input of this session, so that its digest is on record."""
    return _parity_model("demo", inputs)


def _parity_argv(arm: str, inputs: Inputs) -> list[str]:
    model, ids = str(_parity_model(arm, inputs)), str(_parity_ids(arm, inputs))
    return ["logits", model, "--ids", ids, "--out", "logits.npy", "--dtype", "float32", "--events", "events.jsonl"]


def _collect_parity(run_dir: Path, inputs: Inputs) -> dict[str, Any]:
    arm = run_dir.name.partition(".")[2]
    facts = gguf_facts(_parity_model(arm, inputs))
    if not (run_dir / "logits.npy").is_file():
        return facts | {"comparators": {}}
    subject = np.load(run_dir / "logits.npy", allow_pickle=False)
    exact = reference_logits(read_gguf(_parity_model(arm, inputs)), np.load(_parity_ids(arm, inputs)))
    # float32 rounding of the reference (6e-8) is far below the bounds it serves, and halves the evidence.
    exact = exact.astype(np.float32)
    # Every position, and a seeded choice of columns: the evidence of many sabotaged runs is kept for good.
    columns = np.sort(np.random.default_rng(2).choice(exact.shape[1], COLUMNS[arm], replace=False))
    name, source, other_engine = OTHER[arm]
    with np.load(source, allow_pickle=False) as arrays:
        other = arrays["logits"]
    pairs = {"float64": (subject[:, columns], exact[:, columns])}
    comparators = save_pairs(run_dir, pairs, ("q4kd logits", "float64 forward over gguf"))
    pairs = {name: (subject[:, columns], other[:, columns])}
    return facts | {"comparators": comparators | save_pairs(run_dir, pairs, ("q4kd logits", other_engine))}


def _prepare_parity(inputs: Inputs) -> None:
    for arm in ("golden", "demo"):
        _parity_model(arm, inputs)
        _parity_ids(arm, inputs)


register(
    Experiment(
        name="teacher-parity",
        title="q4kd logits of the golden and the demo teacher against float64, llama.cpp and a frozen golden",
        needs=(),
        arms=tuple(
            Arm(arm, functools.partial(_parity_argv, arm), timeout_s=120, stall_s=60) for arm in ("golden", "demo")
        ),
        prepare=_prepare_parity,
        collect=_collect_parity,
    )
)


# --- frozen-teacher: gradient requests, each with a valid twin ---


def _frozen_argv(inputs: Inputs) -> list[str]:
    return ["probe", "frozen-teacher", "--model", str(_parity_model("golden", inputs)), "--out", "probe.json"]


def collect_probe(run_dir: Path, _inputs: Inputs) -> dict[str, Any]:
    """Return what the probe wrote, nothing when it did not come so far."""
    path = run_dir / "probe.json"
    value: dict[str, Any] = read_json(path) if path.is_file() else {}
    return value


register(
    Experiment(
        name="frozen-teacher",
        title="every way to ask the teacher for a gradient, beside its valid twin",
        needs=(),
        arms=(Arm(None, _frozen_argv, timeout_s=60),),
        prepare=_prepare_parity,
        collect=collect_probe,
    )
)


# --- superblock: the trainer's decoders on random and extreme blocks ---


def _blocks(inputs: Inputs) -> Path:
    def make(path: Path) -> None:
        with path.open("wb") as file:
            arrays: dict[str, Any] = dict(block_spec.sample_blocks(seed=3))
            np.savez_compressed(file, **arrays)

    return inputs.file("blocks.npz", make)


def _superblock_argv(inputs: Inputs) -> list[str]:
    return ["probe", "superblock", "--blocks", str(_blocks(inputs)), "--out", "decoded.npz", "--facts", "probe.json"]


def _collect_superblock(run_dir: Path, inputs: Inputs) -> dict[str, Any]:
    facts = collect_probe(run_dir, inputs)
    if not (run_dir / "decoded.npz").is_file():
        return facts | {"comparators": {}}
    with np.load(_blocks(inputs), allow_pickle=False) as arrays:
        blocks = dict(arrays)
    with np.load(run_dir / "decoded.npz", allow_pickle=False) as arrays:
        decoded = dict(arrays)
    comparators: dict[str, Any] = {}
    for name in ("q4_k", "q6_k"):
        kind = getattr(gguf.GGMLQuantizationType, name.upper())
        by_gguf: NDArray[np.float32] = gguf.quants.dequantize(blocks[name], kind)
        by_spec = block_spec.DECODERS[name](blocks[name])
        pairs = {f"{name}-gguf": (decoded[name], by_gguf), f"{name}-spec": (decoded[name], by_spec)}
        comparators |= save_pairs(run_dir, {f"{name}-gguf": pairs[f"{name}-gguf"]}, ("trainer decoder", "gguf.quants"))
        comparators |= save_pairs(
            run_dir, {f"{name}-spec": pairs[f"{name}-spec"]}, ("trainer decoder", "scalar decoder from the layout")
        )
        weights = by_gguf.astype(np.float64)
        product = (decoded[f"{name}-product"], blocks["activations"].astype(np.float64) @ weights.T)
        comparators |= save_pairs(
            run_dir, {f"{name}-product": product}, ("trainer product", "float64 product over gguf.quants")
        )
    comparators |= save_pairs(
        run_dir,
        {"q6_k-zero": (decoded["q6_k-zero"], np.zeros_like(decoded["q6_k-zero"]))},
        ("trainer decoder at q = 32", "zero"),
    )
    sums = block_spec.offset_product(blocks["q4_k-offset"], blocks["activations"])
    comparators |= save_pairs(
        run_dir, {"q4_k-offset": (decoded["q4_k-offset"], sums)}, ("trainer product", "block sums of the activations")
    )
    return facts | {"comparators": comparators}


register(
    Experiment(
        name="superblock",
        title="the trainer's decoders and products on random and extreme superblocks",
        needs=(),
        arms=(Arm(None, _superblock_argv, timeout_s=60),),
        prepare=lambda inputs: _blocks(inputs) and None,
        collect=_collect_superblock,
    )
)
