"""The inputs that experiments share: teachers, students and texts, most of them made from the demo.

Each is a file of the session, made once, so that its digest is on record.
"""

import argparse
import functools
import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np

from q4kd.harness.inputs.arrays import Ints, array_input, read_arrays
from q4kd.harness.inputs.synthetic_students import write_student
from q4kd.harness.runs.experiment import Inputs
from q4kd.trainer.bench.synthetic import write_large_teacher
from q4kd.trainer.demo import student_path, teacher_path
from q4kd.trainer.files import read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer

GOLDEN = Path(__file__).parent / "golden"
GOLDEN_TEACHER = GOLDEN / "qwen2-q4_k_m.gguf"
GOLDEN_LOGITS = GOLDEN / "qwen2-q4_k_m.llamacpp.npz"
# VOCAB is the demo's; small runs train on BATCH sequences of SEQ_LEN tokens in a step.
VOCAB = 2048
SEQ_LEN, BATCH = 32, 4


# --- teachers ---


def demo_teacher(inputs: Inputs) -> Path:
    """Return the demo teacher."""
    return inputs.file("demo.gguf", functools.partial(shutil.copyfile, teacher_path()))


def golden_teacher(inputs: Inputs) -> Path:
    """Return the golden teacher, whose logits llama.cpp has computed."""
    return inputs.file("golden.gguf", functools.partial(shutil.copyfile, GOLDEN_TEACHER))


def golden_ids(inputs: Inputs) -> Path:
    """Return the token ids of the golden logits, int ``[T]``."""
    return array_input(inputs, "golden-ids.npy", lambda: read_arrays(GOLDEN_LOGITS)["ids"])


def teacher_7b(inputs: Inputs) -> Path:
    """Return a 7B-shaped Q4_K_M file with random weights, 4.4 GB."""
    make = functools.partial(write_large_teacher, layers=28, hidden=3584, ffn=18944, vocab=152064, kv_heads=8)
    return inputs.file("teacher-7b.gguf", make)


def gguf_facts(path: Path) -> dict[str, object]:
    """Measure a GGUF with the gguf package alone: bytes of its tensors, in all and by type, and of the file."""
    by_type: dict[str, int] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        by_type[tensor.tensor_type.name] = by_type.get(tensor.tensor_type.name, 0) + int(tensor.n_bytes)
    return {
        "gguf_tensor_bytes": sum(by_type.values()),
        "gguf_bytes_by_type": by_type,
        "gguf_file_bytes": path.stat().st_size,
    }


# --- students ---


def demo_student(inputs: Inputs) -> Path:
    """Return the demo student: a config and a tokenizer, no weights."""
    return inputs.file("fresh-student", functools.partial(shutil.copytree, student_path()))


def changed_student(inputs: Inputs, name: str, changes: Mapping[str, object]) -> Path:
    """Return the demo student, without weights, under ``name`` and with other values in its config."""
    return inputs.file(name, functools.partial(write_student, source=demo_student(inputs), changes=changes))


def weighted_student(inputs: Inputs) -> Path:
    """Return the demo student with weights on disk, so that the harness's own forward pass knows them."""

    def make(folder: Path) -> None:
        from q4kd.trainer.student.model import load_student, load_tokenizer

        load_student(demo_student(inputs), seed=7).save_pretrained(folder)  # type: ignore[operator]
        load_tokenizer(demo_student(inputs)).save_pretrained(folder)

    return inputs.file("weighted-student", make)


# --- texts and their tokens ---


def demo_tokenizer(inputs: Inputs) -> "Tokenizer":
    """Return the demo student's tokenizer, by the ``tokenizers`` package alone."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(demo_student(inputs) / "tokenizer.json"))


def encode_texts(inputs: Inputs, texts: Iterable[str]) -> list[list[int]]:
    """Return the tokens of each text, the end-of-text token at its end."""
    tokenizer = demo_tokenizer(inputs)
    end: Any = tokenizer.token_to_id(str(read_json(demo_student(inputs) / "tokenizer_config.json")["eos_token"]))
    return [[*tokenizer.encode(text, add_special_tokens=False).ids, end] for text in texts]


def cut_text(inputs: Inputs, text: str, tokens: int) -> str:
    """Return the beginning of a text that makes ``tokens`` + 1 tokens, the last of them the end-of-text token."""
    return text[: demo_tokenizer(inputs).encode(text, add_special_tokens=False).offsets[tokens - 1][1]]


def windows_of(inputs: Inputs, text: Path, seq_len: int) -> Ints:
    """Return the windows that packing makes of a text, int ``[windows, seq_len + 1]``: inputs and the next token."""
    (ids,) = encode_texts(inputs, [text.read_text(encoding="utf-8")])
    return np.array([ids[start : start + seq_len + 1] for start in range(0, len(ids) - seq_len, seq_len)])


def training_text(inputs: Inputs, batches: int) -> Path:
    """Return a text of exactly ``batches`` batches of ``BATCH`` x ``SEQ_LEN`` tokens: an epoch is that many steps."""

    def make(path: Path) -> None:
        text = Path(argparse.__file__).read_text(encoding="utf-8")
        path.write_text(cut_text(inputs, text, batches * BATCH * SEQ_LEN), encoding="utf-8")

    return inputs.file(f"argparse-{batches}.txt", make)


def argparse_documents(inputs: Inputs) -> Path:
    """Return a JSONL file of many short documents, so that a hash of their names holds some out."""

    def make(path: Path) -> None:
        text = Path(argparse.__file__).read_text(encoding="utf-8")
        parts = [text[start : start + 800] for start in range(0, len(text), 800)]
        path.write_text("".join(json.dumps({"text": part}) + "\n" for part in parts), encoding="utf-8")

    return inputs.file("argparse-parts.jsonl", make)
