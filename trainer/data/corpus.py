"""Training data: documents to tokens, tokens to windows, windows to batches that are a function of the step.

A batch depends only on (data, seed, step), so a resumed run needs no reader state.
"""

import itertools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from q4kd.trainer.data.batch import Batch
from q4kd.trainer.data.documents import Document, SourceSettings, is_held_out
from q4kd.trainer.data.encoding import DocumentEncoder
from q4kd.trainer.data.packing import Windows
from q4kd.trainer.data.readers import read_documents
from q4kd.trainer.data.sources.account import SourceAccount
from q4kd.trainer.data.token_set import TokenSet, TokenWriter
from q4kd.trainer.errors import InputError

_SAY_EVERY_TOKENS = 50_000_000


@dataclass(frozen=True)
class Corpus:
    """Training and held-out tokens."""

    train: TokenSet
    held_out: TokenSet

    @property
    def sha256(self) -> str:
        """Digest of what is trained on."""
        return self.train.sha256


def limit_bytes(documents: Iterable[Document], max_bytes: int) -> Iterator[Document]:
    """Yield documents until they are ``max_bytes`` together; 0 yields all."""
    total = 0
    for document in documents:
        yield document
        total += document.num_bytes if max_bytes else 0
        if max_bytes and total >= max_bytes:
            return


def split_rule(documents: Iterator[Document], has_own_file: bool) -> tuple[Iterator[Document], bool]:
    """Return the documents again, and whether some are held out: none where others are given, or there is only one."""
    first = list(itertools.islice(documents, 2))
    return itertools.chain(first, documents), len(first) > 1 and not has_own_file


def refuse_empty(path: Path, settings: SourceSettings, account: SourceAccount | None = None) -> InputError:
    """Return the error for data without a document; it names what was left out."""
    expected = f"UTF-8 text files, JSONL, parquet or token shards matching {settings.pattern!r}"
    remedy = "name a folder or file that holds some with --data, or set data_glob to a pattern that their names match"
    left_out = [line.removeprefix("data: ") for line in account.lines()] if account is not None else []
    got = "; ".join(["no document", *left_out])
    return InputError(str(path), expected=expected, got=got, remedy=remedy)


def load_corpus(
    path: Path,
    encoder: DocumentEncoder,
    settings: SourceSettings,
    *,
    max_bytes: int = 0,
    held_out: Path | None = None,
    folder: Path | None = None,
    account: SourceAccount | None = None,
    held_out_account: SourceAccount | None = None,
) -> Corpus:
    """Read, split and tokenise, a bounded group of documents at a time.

    Without ``held_out`` a hash of each document's name chooses what is held out; one single document is all training
    data.

    Args:
        path: file or folder of training data.
        encoder: encoder of documents.
        settings: settings by which files are read.
        max_bytes: bytes of text after which reading stops; 0 reads all.
        held_out: file or folder of evaluation data.
        folder: where tokens that do not fit in memory are kept; None keeps all in memory.
        account: is told what is read of the training data and what is not.
        held_out_account: is told the same of the evaluation data.

    Raises:
        InputError: when a file or record cannot be used, or nothing is left to train on.
    """
    account = account or SourceAccount()
    documents = limit_bytes(read_documents(path, settings=settings, account=account), max_bytes)
    documents, splits = split_rule(documents, held_out is not None)
    train, held = TokenWriter(folder), TokenWriter(folder)
    # The writer of each document, in the order in which the encoder returns them.
    order: list[TokenWriter] = []

    def assigned() -> Iterator[Document]:
        for document in documents:
            order.append(held if splits and is_held_out(document.name) else train)
            yield document

    said = found = 0
    for encoded in encoder.encode(assigned()):
        number, parts = encoded.part
        found += number == 0
        account.count_example(encoded)
        order[0].add(encoded)
        if number == parts - 1:
            order.pop(0)
        if train.num_tokens - said >= _SAY_EVERY_TOKENS:
            said = train.num_tokens
            print(f"tokenising: {said} tokens of {found} documents", file=sys.stderr, flush=True)
    if not found:
        raise refuse_empty(path, settings, account)
    if held_out is not None:
        held_out_account = held_out_account or SourceAccount("held-out")
        for encoded in encoder.encode(read_documents(held_out, settings=settings, account=held_out_account)):
            held_out_account.count_example(encoded)
            held.add(encoded)
    return Corpus(train=train.finish(), held_out=held.finish())


class BatchOrder:
    """Windows in a seeded order, reshuffled every epoch; the batch of a step is computed, never remembered.

    Raises:
        InputError: when there are fewer windows than one step needs.
    """

    def __init__(self, windows: Windows, *, sequences_per_step: int, seed: int, path: Path) -> None:
        if len(windows) < sequences_per_step:
            expected = f"at least {sequences_per_step} windows of {windows.seq_len} tokens"
            got = f"{len(windows)} ({len(windows.tokens.ids)} tokens)"
            remedy = "give more data, a smaller batch_size or a smaller seq_len"
            raise InputError(str(path), expected=expected, got=got, remedy=remedy)
        self.windows = windows
        self.sequences_per_step, self._seed = sequences_per_step, seed
        self._order: tuple[int, npt.NDArray[np.int64]] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Whole steps in one pass; the windows left over differ from epoch to epoch."""
        return len(self.windows) // self.sequences_per_step

    def batch(self, step: int) -> Batch:
        """Return the sequences of a step (counted from 0)."""
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng((self._seed, epoch)).permutation(len(self.windows)))
        chosen = self._order[1][position * self.sequences_per_step : (position + 1) * self.sequences_per_step]
        return Batch.stack([self.windows[int(index)] for index in chosen], chosen)

    def has_label(self) -> bool:
        """Return whether any window has a label."""
        return self.windows.has_label()
