"""The text that ``q4kd fidelity`` runs two models over, as windows of token ids."""

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError

import numpy as np
import numpy.typing as npt

from q4kd.trainer.data.documents import is_held_out
from q4kd.trainer.data.readers import read_documents
from q4kd.trainer.data.sources.account import SourceAccount
from q4kd.trainer.demo import data_path
from q4kd.trainer.errors import InputError, first_line
from q4kd.trainer.files import read_bounded

_MAX_IDS_BYTES = 1 << 30


@dataclass(frozen=True)
class Sample:
    """Windows of text.

    Attributes:
        name: what the text is.
        windows: int64 ``[N, T]``.
    """

    name: str
    windows: npt.NDArray[np.int64]

    @property
    def sha256(self) -> str:
        """Digest of the ids."""
        return hashlib.sha256(self.windows.tobytes()).hexdigest()


def read_sample(
    data: Path | None,
    *,
    encode: Callable[[list[str]], list[list[int]]],
    end: int | None,
    tokens: int,
    length: int,
    account: SourceAccount | None = None,
) -> Sample:
    """Read about ``tokens`` tokens of text and cut them into windows of ``length``.

    Args:
        data: text file, JSONL file, folder of texts, or an integer .npy of token ids; None takes the files of this
            Python's standard library that the demo teacher was not trained on.
        encode: texts to token ids; not called for an .npy.
        end: id put after each document; None puts none.
        tokens: reading stops after this many.
        length: tokens of a window.
        account: is told what is read and what is not.

    Raises:
        InputError: when there is not even one window, or a document is a chat or token ids.
    """
    if data is not None and data.suffix == ".npy":
        name, ids = data.name, read_ids(data).ravel()[:tokens]
    else:
        name = "Python standard library, held out" if data is None else data.name
        texts = _library() if data is None else _texts(data, account)
        ids = _encode(texts, encode, end, tokens)
    count = len(ids) // length
    if not count:
        subject, expected = "--data" if data is None else str(data), f"at least one window of {length} tokens"
        remedy = "give more text, more --tokens or a smaller --seq-len"
        raise InputError(subject, expected=expected, got=f"{len(ids)} tokens", remedy=remedy)
    return Sample(name, ids[: count * length].reshape(count, length))


def read_ids(path: Path) -> npt.NDArray[np.int64]:
    """Read token ids, integers of any shape.

    Raises:
        InputError: when the file holds something else.
    """
    expected, remedy = "an integer .npy array", "write token ids with numpy.save"
    try:
        ids = np.load(io.BytesIO(read_bounded(path, _MAX_IDS_BYTES)), allow_pickle=False)
    except (ValueError, EOFError, OverflowError, TypeError, SyntaxError, TokenError, MemoryError) as error:
        raise InputError(str(path), expected=expected, got=first_line(error), remedy=remedy) from error
    if not isinstance(ids, np.ndarray) or ids.dtype.kind not in "iu":
        kind = ids.dtype if isinstance(ids, np.ndarray) else "an archive"
        raise InputError(str(path), expected=expected, got=str(kind), remedy=remedy)
    return ids.astype(np.int64)


def _texts(data: Path, account: SourceAccount | None) -> Iterator[str]:
    for document in read_documents(data, account=account):
        if document.messages is not None or document.ids is not None:
            got = "a chat" if document.messages is not None else "token ids"
            remedy = "name texts, or an .npy of token ids such as a chat template and a tokenizer give"
            raise InputError(
                f"document {document.name}", expected="text, or a prompt and completion", got=got, remedy=remedy
            )
        if document.text or document.completion:
            yield document.text + (document.completion or "")


def _library() -> Iterator[str]:
    from q4kd.trainer.demo.corpus import source_files

    root = data_path()
    for name in source_files(root):
        if is_held_out(name):
            yield (root / name).read_text(encoding="utf-8", errors="replace")


def _encode(
    texts: Iterable[str], encode: Callable[[list[str]], list[list[int]]], end: int | None, tokens: int
) -> npt.NDArray[np.int64]:
    """Encode one document after another until there are enough tokens: int64 ``[at most tokens]``."""
    ids: list[int] = []
    for text in texts:
        ids += encode([text])[0]
        if end is not None:
            ids.append(end)
        if len(ids) >= tokens:
            break
    return np.array(ids[:tokens], np.int64)
