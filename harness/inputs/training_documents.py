"""Documents and chats that experiments train on, and the windows that packing must make of them.

The windows are worked out here from the texts with the ``tokenizers`` package alone, document by document.
"""

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from q4kd.harness.inputs.demo import demo_student, demo_teacher, encode_texts
from q4kd.harness.runs.experiment import Inputs

MASKED = -100
DOCUMENTS, CHATS = 40, 12
# More than are tokenised at once (512), read of a parquet file at once (256) or in one of its row groups (400).
MANY, ROW_GROUP = 1100, 400


def document_texts(count: int) -> list[str]:
    """Return pieces of a library file of 40 to 200 characters, different in length."""
    source, pieces, start = Path(argparse.__file__).read_text(encoding="utf-8"), [], 2000
    for number in range(count):
        length = 40 + (number * 97) % 160
        pieces.append(source[start : start + length])
        start += length
    return pieces


def write_jsonl(inputs: Inputs, name: str, records: Sequence[Mapping[str, object]]) -> Path:
    """Return the JSONL input ``name``, which has one record a line."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    return inputs.file(name, lambda path: path.write_text(text, encoding="utf-8"))


def text_documents(inputs: Inputs) -> Path:
    """Return a JSONL file of the text documents."""
    return write_jsonl(inputs, "documents.jsonl", [{"text": text} for text in document_texts(DOCUMENTS)])


def short_texts() -> list[str]:
    """Return many pieces of a library file of 4 to 20 characters."""
    source, pieces, start = Path(argparse.__file__).read_text(encoding="utf-8"), [], 9000
    for number in range(MANY):
        length = 4 + (number * 7) % 17
        pieces.append(source[start : start + length])
        start += length
    return pieces


def many_documents(inputs: Inputs) -> tuple[Path, Path]:
    """Return the short texts as a parquet file of several row groups, and as JSONL."""

    def make(path: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": short_texts()}), path, row_group_size=ROW_GROUP)

    lines = write_jsonl(inputs, "many.jsonl", [{"text": text} for text in short_texts()])
    return inputs.file("many.parquet", make), lines


def prompts_and_completions() -> list[tuple[str, str]]:
    """Return prompts with a completion each, some of one token."""
    texts = document_texts(2 * CHATS)
    return [(prompt, text[: 3 + 17 * n]) for n, (prompt, text) in enumerate(zip(texts[::2], texts[1::2], strict=True))]


def chat_messages() -> list[list[dict[str, str]]]:
    """Return chats of two turns each; in every third the answer begins with a character that the tokenizer merges.

    A newline makes one token with the end of the role before it, which then belongs to both.
    """
    texts = document_texts(4 * CHATS)
    texts[1::12] = ["\n" + text for text in texts[1::12]]
    roles = ("user", "assistant", "user", "assistant")
    return [
        [{"role": role, "content": text} for role, text in zip(roles, texts[4 * n : 4 * n + 4], strict=True)]
        for n in range(CHATS)
    ]


def run_settings(inputs: Inputs, data: Path, **changes: object) -> dict[str, object]:
    """Return the settings of a run on ``data``, its evaluation data too, so that every document is trained on."""
    return {
        "teacher": str(demo_teacher(inputs)),
        "student": str(demo_student(inputs)),
        "data": str(data),
        "held_out": str(data),
        "out": "run",
        "seed": 3,
        "steps": 100,
        **changes,
    }


def packed_windows(
    inputs: Inputs, length: int, texts: Sequence[str] | None = None
) -> list[tuple[list[int], list[int], list[int]]]:
    """Return ids, labels and the number of its document for each position of the windows of the joined documents.

    Without ``texts`` they are the text documents.
    """
    tokens_of_documents = encode_texts(inputs, document_texts(DOCUMENTS) if texts is None else texts)
    flat = [(token, number) for number, tokens in enumerate(tokens_of_documents) for token in tokens]
    windows = []
    for start in range(0, len(flat) - length, length):
        piece = flat[start : start + length + 1]
        labels = [token if number == before else MASKED for (_, before), (token, number) in itertools.pairwise(piece)]
        windows.append(([token for token, _ in piece[:-1]], labels, [number for _, number in piece[:-1]]))
    return windows
