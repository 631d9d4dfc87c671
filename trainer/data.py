"""Training data: documents to tokens, tokens to packed windows, windows to batches that are a function of the step.

A batch depends only on (data, seed, step), so a resumed run needs no reader state.
"""

import fnmatch
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from q4kd.trainer.errors import InputError
from q4kd.trainer.split import is_held_out

Tokens = npt.NDArray[np.int32]
MAX_DOCUMENT_BYTES = 64 << 20


@dataclass(frozen=True)
class Document:
    """A piece of text and the name by which it is assigned to training or held-out."""

    name: str
    text: str


def _decode(path: Path, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(
            str(path),
            expected="UTF-8 text",
            got=f"byte {error.object[error.start]:#04x} at {error.start}",
            remedy="convert it",
        ) from error


def _read_jsonl(path: Path) -> Iterator[Document]:
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_DOCUMENT_BYTES), b""), start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise InputError(
                    f"{path}:{number}",
                    expected='a JSON object with a "text" string',
                    got=line[:60].decode(errors="replace").strip(),
                    remedy="correct the line",
                ) from error
            if not isinstance(text, str):
                raise InputError(
                    f"{path}:{number}", expected="text", got=type(text).__name__, remedy="correct the line"
                )
            yield Document(f"{path.name}:{number}", text)


def _read_folder(folder: Path, pattern: str) -> Iterator[Document]:
    root = folder.resolve()
    for path in sorted(root.glob(pattern)):
        relative = path.relative_to(root)
        if not path.is_file() or any(part in ("__pycache__", "site-packages") for part in relative.parts):
            continue
        if not path.resolve().is_relative_to(root) or path.stat().st_size > MAX_DOCUMENT_BYTES:
            continue
        try:
            yield Document(relative.as_posix(), path.read_bytes().decode())
        except UnicodeDecodeError:
            continue  # a folder may hold pictures and archives beside its texts


def read_documents(path: Path, pattern: str) -> Iterator[Document]:
    """Yield the documents of a text file, a JSONL file or a folder (sorted by name).

    Raises:
        InputError: when the path is missing or a file cannot be read as what it claims to be.
    """
    try:
        if path.is_dir():
            yield from _read_folder(path, pattern)
        elif fnmatch.fnmatch(path.name, "*.jsonl"):
            yield from _read_jsonl(path)
        else:
            yield Document(path.name, _decode(path, path.read_bytes()))
    except OSError as error:
        raise InputError(
            str(path), expected="a readable file or folder", got=str(error.strerror), remedy="check --data"
        ) from error


@dataclass(frozen=True)
class TokenSet:
    """Tokens of all documents of one split, joined, each document ended by the end-of-text token."""

    tokens: Tokens
    num_documents: int

    def num_windows(self, seq_len: int) -> int:
        """Count windows: seq_len inputs, each with a target, so one token more is read."""
        return max(0, (len(self.tokens) - 1) // seq_len)

    def window(self, index: int, seq_len: int) -> Tokens:
        """Return int32 ``[seq_len + 1]``: inputs are all but the last, labels all but the first."""
        start = index * seq_len
        return self.tokens[start : start + seq_len + 1]

    @cached_property
    def sha256(self) -> str:
        """Digest of the tokens, computed once: every checkpoint states it."""
        return hashlib.sha256(self.tokens.tobytes()).hexdigest()


@dataclass(frozen=True)
class Corpus:
    """Training and held-out tokens."""

    train: TokenSet
    held_out: TokenSet


def load_corpus(
    path: Path, *, pattern: str, max_bytes: int, encode: Callable[[list[str]], list[list[int]]], end_of_text: int
) -> Corpus:
    """Read, split (by a hash of each document's name; one single document is all training data) and tokenise.

    Args:
        path: file or folder, as ``read_documents``.
        pattern: glob for a folder.
        max_bytes: stop after this many bytes of text; 0 reads all.
        encode: texts to token ids.
        end_of_text: appended to every document.

    Raises:
        InputError: when nothing is left to train on.
    """
    documents: list[Document] = []
    total = 0
    for document in read_documents(path, pattern):
        documents.append(document)
        total += len(document.text.encode())
        if max_bytes and total >= max_bytes:
            break
    if not documents:
        raise InputError(
            str(path),
            expected=f"UTF-8 text files matching {pattern!r}",
            got="none",
            remedy="check --data and data_glob",
        )
    held = [len(documents) > 1 and is_held_out(document.name) for document in documents]

    def tokenise(wanted: bool) -> TokenSet:
        texts = [document.text for document, is_held in zip(documents, held, strict=True) if is_held is wanted]
        pieces = [[*ids, end_of_text] for ids in (encode(texts) if texts else [])]
        flat = np.concatenate([np.asarray(piece, np.int32) for piece in pieces]) if pieces else np.zeros(0, np.int32)
        return TokenSet(flat, len(texts))

    return Corpus(train=tokenise(False), held_out=tokenise(True))


class BatchOrder:
    """Windows in a seeded order, reshuffled every epoch; the batch of a step is computed, never remembered."""

    def __init__(self, tokens: TokenSet, *, seq_len: int, sequences_per_step: int, seed: int, path: Path) -> None:
        self.num_windows = tokens.num_windows(seq_len)
        if self.num_windows < sequences_per_step:
            raise InputError(
                str(path),
                expected=f"at least {sequences_per_step} windows of {seq_len} tokens",
                got=f"{self.num_windows} ({len(tokens.tokens)} tokens)",
                remedy="give more data, a smaller batch_size or a smaller seq_len",
            )
        self._tokens, self._seq_len = tokens, seq_len
        self.sequences_per_step, self._seed = sequences_per_step, seed
        self._order: tuple[int, npt.NDArray[np.int64]] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Whole steps in one pass."""
        return self.num_windows // self.sequences_per_step

    def batch(self, step: int) -> npt.NDArray[np.int64]:
        """Return the windows of a step (counted from 0): int64 ``[sequences, seq_len + 1]``."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng((self._seed, epoch)).permutation(self.num_windows))
        chosen = self._order[1][position * self.sequences_per_step : (position + 1) * self.sequences_per_step]
        return np.stack([self._tokens.window(int(index), self._seq_len) for index in chosen]).astype(np.int64)
