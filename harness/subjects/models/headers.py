"""Everything that the header of a GGUF says, as rows that two readers can be compared by."""

import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt

from q4kd.harness.inputs.arrays import read_arrays
from q4kd.harness.inputs.collect import save_pairs
from q4kd.harness.inputs.demo import demo_teacher, golden_teacher
from q4kd.harness.inputs.models.split_models import THREE, shards, write_split
from q4kd.harness.inputs.models.synthetic_models import HIDDEN, LAYERS, MODELS, SmallModel, write_small_model
from q4kd.harness.runs.experiment import ONE_THREAD, Arm, Facts, Inputs, experiment
from q4kd.trainer.files import read_json

_SCALARS: dict[str, object] = {
    "UINT8": 200, "INT8": -7, "UINT16": 60_000, "INT16": -30_000, "UINT32": 1 << 31, "INT32": -(1 << 31),
    "UINT64": 1 << 63, "INT64": -(1 << 63), "FLOAT32": 0.1, "FLOAT64": 0.1, "BOOL": True, "STRING": "\u2581€",
}  # fmt: skip
_TOKENS = 300


def rows(
    metadata: Mapping[str, Any], tensors: Iterable[tuple[str, str, tuple[int, ...], bytes]]
) -> npt.NDArray[np.uint8]:
    """Return a SHA-256 of each value of the metadata, then of each tensor with its name, type, shape and bytes.

    The values are sorted by key and the tensors by name, uint8 ``[n, 32]``.
    """
    parts = [json.dumps([key, metadata[key]]).encode() for key in sorted(metadata)]
    parts += [json.dumps([name, kind, shape]).encode() + data for name, kind, shape, data in sorted(tensors)]
    return np.stack([np.frombuffer(hashlib.sha256(part).digest(), np.uint8) for part in parts])


def every_kind(writer: gguf.GGUFWriter) -> None:
    """Add metadata of every type, a vocabulary with scores, and another alignment than the usual one."""
    for name, value in _SCALARS.items():
        kind = gguf.GGUFValueType[name]
        writer.add_key_value(f"test.{name}", value, kind)
        writer.add_key_value(f"test.{name}.array", [value] * 3, gguf.GGUFValueType.ARRAY, kind)
    writer.add_custom_alignment(128)
    writer.add_token_list(["", *(f"\u2581{number}" * (number % 9) for number in range(1, _TOKENS))])
    writer.add_token_scores([-float(number) / 3 for number in range(_TOKENS)])
    writer.add_token_types([1 + number % 6 for number in range(_TOKENS)])


def _files(inputs: Inputs) -> list[Path]:
    """Return the demo's file (tokens, types, merges), one of llama.cpp's, and one that holds every type."""
    make = functools.partial(write_small_model, model=MODELS["mistral"], change=every_kind)
    return [demo_teacher(inputs), golden_teacher(inputs), inputs.file("models/every-kind.gguf", make)]


def _named_shards(inputs: Inputs) -> list[Path]:
    """Return a shard of each of two splits of the demo's file: a last one, and a first one that has no tensors."""
    named = []
    for name, is_empty, index in (("split", False, -1), ("split-empty-first", True, 0)):
        make = functools.partial(write_split, source=demo_teacher(inputs), tensors=THREE, empty_first=is_empty)
        named.append(shards(inputs.file(f"models/demo-{name}", make))[index])
    return named


def _foreign(writer: gguf.GGUFWriter) -> None:
    """Add what no version of q4kd will know: two types, two settings, two kinds of tensors and a tokenizer."""
    for layer in range(LAYERS):
        writer.add_tensor(f"blk.{layer}.never_seen.weight", np.zeros((4, HIDDEN), np.int16))
    writer.add_tensor("never_seen.weight", np.zeros((4, HIDDEN), np.int8))
    writer.add_string("brandnew.rope.scaling.type", "never seen")
    writer.add_uint32("brandnew.never_seen", 1)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("never-seen")
    writer.add_token_list(["a", "b"])


def _unsupported(inputs: Inputs) -> Path:
    """Return a file of an architecture, types, settings, tensors and a tokenizer that are not supported."""
    model = SmallModel("brandnew", ("Q4_K", "Q6_K"), tied=True)
    return inputs.file("models/brandnew.gguf", functools.partial(write_small_model, model=model, change=_foreign))


def _package_rows(path: Path) -> npt.NDArray[np.uint8]:
    reader = gguf.GGUFReader(path)
    metadata = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    tensors = [
        (tensor.name, tensor.tensor_type.name, tuple(tensor.shape.tolist()[::-1]), np.asarray(tensor.data).tobytes())
        for tensor in reader.tensors
    ]
    return rows(metadata, tensors)


def _argv(inputs: Inputs) -> list[str]:
    files = ["--models", *map(str, _files(inputs)), "--shards", *map(str, _named_shards(inputs))]
    return ["probe", "read-headers", "--out", "rows.npz", *files, "--unsupported", str(_unsupported(inputs))]


@experiment(
    "read-headers",
    "headers of GGUF files as q4kd reads them and as the gguf package does",
    Arm(None, _argv, timeout_s=60, env=ONE_THREAD),
)
def _collect_headers(run_dir: Path, inputs: Inputs) -> Facts:
    if not (found := read_arrays(run_dir / "rows.npz")):
        return {"comparators": {}}
    theirs = [_package_rows(path) for path in _files(inputs)]
    pairs = {"headers": (found["rows"], np.concatenate(theirs))}
    # Every split is of the first model, which the package reads whole.
    pairs["split"] = (found["shards"], np.concatenate(theirs[:1] * len(_named_shards(inputs))))
    comparators = save_pairs(run_dir, pairs, ("q4kd's own reader", "the gguf package"))
    said = read_json(run_dir / "inspect.json")
    parts = {part["found"]: part["part"] for part in said["unsupported"]}
    return {"comparators": comparators, "tables": {"unsupported": parts | {"exit code": said["exit_code"]}}}
