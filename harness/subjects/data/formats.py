"""The experiment on the formats of training data: the same documents, written in each of them.

Files are written here by ``json``, numpy, pyarrow and safetensors; what a run must make of them is worked out from the
texts with the ``tokenizers`` package alone.
"""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from q4kd.harness.inputs.arrays import read_arrays
from q4kd.harness.inputs.command_lines import probe_words
from q4kd.harness.inputs.demo import encode_texts
from q4kd.harness.inputs.training_documents import DOCUMENTS, MASKED, document_texts, run_settings
from q4kd.harness.runs.experiment import ONE_THREAD, Arm, Facts, Inputs, experiment
from q4kd.harness.subjects.data.settings import settings_cases, settings_table
from q4kd.trainer.files import write_json

SEQ_LEN = 24
# Formats whose labels leave out every third token of a document.
_WITH_LABELS = ("ids and labels, JSONL", "ids and labels, safetensors")
# How each format's files are written: folder or file, texts, tokens of each text.
_Write = Callable[[Path, list[str], list[list[int]]], object]


def _labels(ids: list[int]) -> list[int]:
    return [MASKED if position % 3 == 2 else token for position, token in enumerate(ids)]


def _lines(records: list[dict[str, object]]) -> str:
    # An empty line between records is allowed.
    return "\n".join(json.dumps(record) + "\n" for record in records)


def _write_parquet(path: Path, texts: list[str], _tokens: list[list[int]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table({"number": list(range(len(texts))), "text": texts})
    pq.write_table(table, path, row_group_size=17)


def _write_texts(folder: Path, texts: list[str], _tokens: list[list[int]]) -> None:
    for number, text in enumerate(texts):
        path = folder / f"part-{number // 10}" / f"{number:03}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    (folder / "picture.txt").write_bytes(b"\xff\xd8\xff\xe0")  # no text: such files are passed over


def _write_more_texts(folder: Path, texts: list[str], tokens: list[list[int]]) -> None:
    """Write the same files and one beside them that the pattern leaves out."""
    _write_texts(folder, texts, tokens)
    (folder / "notes.txt").write_text(texts[0], encoding="utf-8")


def _write_clone(folder: Path, texts: list[str], _tokens: list[list[int]]) -> None:
    """Write a data set as it is cloned from the hub: records, their card, git's files and the hub client's."""
    files = {
        ".git/hooks/pre-commit.sample": "#!/bin/sh\n" * 40,
        ".git/config": "[core]\n",
        ".cache/huggingface/download/train.metadata": "0123456789\n",
        ".gitattributes": "*.parquet filter=lfs\n",
        "README.md": "# A data set\n" * 20,
        "dataset_infos.json": "{}",
        "data/train.jsonl": _lines([{"text": text} for text in texts]),
    }
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    # Links out of the folder are left out.
    (folder / "data" / "linked.jsonl").symlink_to("../../text.jsonl")


def _write_snapshot(folder: Path, texts: list[str], _tokens: list[list[int]]) -> None:
    """Write a snapshot of a hub cache, whose files are links to its blobs; one file is no link."""
    (folder / "blobs").mkdir(parents=True)
    (folder / "snapshots" / "a").mkdir(parents=True)
    _write_text(folder / "snapshots" / "a" / "own.jsonl", _lines([{"text": text} for text in texts[:15]]))
    _write_text(folder / "blobs" / "0", _lines([{"text": text} for text in texts[15:]]))
    (folder / "snapshots" / "a" / "train.jsonl").symlink_to("../../blobs/0")


def _write_npy(folder: Path, _texts: list[str], tokens: list[list[int]]) -> None:
    folder.mkdir()
    for number, ids in enumerate(tokens):
        np.save(folder / f"{number:03}.npy", np.array(ids, np.uint16))


def _write_safetensors(folder: Path, _texts: list[str], tokens: list[list[int]]) -> None:
    from safetensors.numpy import save_file

    folder.mkdir()
    for number, ids in enumerate(tokens):
        rows = {"input_ids": np.array([ids], np.int32), "labels": np.array([_labels(ids)], np.int32)}
        save_file(rows, folder / f"{number:03}.safetensors")


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


FORMATS: dict[str, tuple[str, _Write, dict[str, object]]] = {
    "JSONL": ("text.jsonl", lambda path, texts, _: _write_text(path, _lines([{"text": t} for t in texts])), {}),
    "JSON, a list": (
        "list.json",
        lambda path, texts, _: _write_text(path, json.dumps([{"text": t} for t in texts])),
        {},
    ),
    "JSON, a record a line": (
        "lines.json",
        lambda path, texts, _: _write_text(path, _lines([{"text": t} for t in texts])),
        {},
    ),
    "another field": (
        "field.jsonl",
        lambda path, texts, _: _write_text(path, _lines([{"title": "no", "body": t} for t in texts])),
        {"text_field": "body"},
    ),
    "parquet": ("text.parquet", _write_parquet, {}),
    "text files": ("texts", _write_texts, {}),
    "text files by a pattern": ("more-texts", _write_more_texts, {"data_glob": "part-*/*.txt", "data_format": "text"}),
    "ids, npy": ("ids-npy", _write_npy, {}),
    "ids and labels, JSONL": (
        "ids.jsonl",
        lambda path, _, tokens: _write_text(
            path, _lines([{"input_ids": ids, "labels": _labels(ids)} for ids in tokens])
        ),
        {"data_format": "tokens"},
    ),
    "ids and labels, safetensors": ("ids-safetensors", _write_safetensors, {}),
}


FOLDERS: dict[str, tuple[str, _Write, str]] = {
    "a clone": ("clone", _write_clone, "."),
    "a snapshot of a cache": ("datasets--it", _write_snapshot, "snapshots/a"),
}


def _expected(inputs: Inputs, *, masked: bool) -> list[tuple[list[int], list[int]]]:
    """Return ids and labels of each window of the joined documents, in their order."""
    flat = [
        (token, label, number)
        for number, ids in enumerate(encode_texts(inputs, document_texts(DOCUMENTS)))
        for token, label in zip(ids, _labels(ids) if masked else ids, strict=True)
    ]
    windows = []
    for start in range(0, len(flat) - SEQ_LEN, SEQ_LEN):
        piece = flat[start : start + SEQ_LEN + 1]
        pairs = itertools.pairwise(piece)
        labels = [label if before[2] == number else MASKED for before, (_, label, number) in pairs]
        windows.append(([token for token, _, _ in piece[:-1]], labels))
    return windows


def _cases(inputs: Inputs) -> Path:
    texts = document_texts(DOCUMENTS)
    tokens = [list(ids) for ids in encode_texts(inputs, texts)]
    steps = len(_expected(inputs, masked=False))

    def data(name: str, write: _Write) -> Path:
        return inputs.file(f"formats/{name}", lambda path: write(path, texts, tokens))

    cases = {
        name: {
            "settings": run_settings(inputs, data(file, write), seq_len=SEQ_LEN, **changes),
            "sequences": 1,
            "steps": steps,
            "resume": 0,
        }
        for name, (file, write, changes) in FORMATS.items()
    }
    for name, (file, write, below) in FOLDERS.items():
        settings = run_settings(inputs, data(file, write) / below, seq_len=SEQ_LEN)
        cases[name] = {"settings": settings, "sequences": 1, "steps": steps, "resume": 0}
    cases |= settings_cases(inputs)
    return inputs.file("format-cases.json", lambda path: write_json(path, cases))


@experiment(
    "data-formats",
    "one epoch on the same documents in ten formats, and under each setting of how data is read",
    Arm(
        None,
        lambda inputs: probe_words("training-batches", cases=_cases(inputs), out="batches.npz"),
        60,
        env=ONE_THREAD,
    ),
)
def _collect_formats(run_dir: Path, inputs: Inputs) -> Facts:
    """Count, for each format, the windows of its epoch that are not the expected ones."""
    if not (found := read_arrays(run_dir / "batches.npz")):
        return {}
    table: dict[str, int | bool] = {"at least 40 windows": len(_expected(inputs, masked=False)) >= 40}
    folders = dict(table)
    for name in (*FORMATS, *FOLDERS):
        expected = sorted(_expected(inputs, masked=name in _WITH_LABELS))
        pairs = sorted(zip(found[f"{name}-ids"].tolist(), found[f"{name}-labels"].tolist(), strict=True))
        wrong = sum(seen != window for seen, window in zip(pairs, expected, strict=True))
        (folders if name in FOLDERS else table)[name] = wrong
    return {"tables": {"formats": table, "folders": folders, "settings": settings_table(inputs, found)}}
