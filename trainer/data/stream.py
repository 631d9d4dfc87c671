"""Streaming: documents read, shuffled and tokenised as training goes, within bounded memory.

The order of files is drawn for each pass; from then on a buffer of documents is kept full, and each next document is
drawn from it and replaced by the one read. Everything follows from (data, seed), so a resumed run reads again from
the start up to its step: about the time of reading and tokenising that much, and the same batches to the bit.
``datasets.IterableDataset`` restores a stream without that, but not what its shuffle buffer held.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from q4kd.trainer.data.batch import Batch
from q4kd.trainer.data.corpus import limit_bytes, refuse_empty, split_rule
from q4kd.trainer.data.documents import Document, SourceSettings, is_held_out
from q4kd.trainer.data.encoding import DocumentEncoder, Encoded
from q4kd.trainer.data.packing import Window, pack
from q4kd.trainer.data.readers import list_files, read_documents
from q4kd.trainer.data.sources.account import SourceAccount
from q4kd.trainer.data.token_set import TokenSet, TokenWriter
from q4kd.trainer.errors import InputError

# This bounds the bytes of documents in the shuffle buffer, whatever their number.
MAX_BUFFER_BYTES = 256 << 20
_SAMPLED = 1 << 20
# A label is looked for in this many batches.
_LOOKED = 64


def shuffle(documents: Iterator[Document], size: int, rng: np.random.Generator) -> Iterator[Document]:
    """Yield every document once, each drawn from a buffer of at most ``size`` documents and ``MAX_BUFFER_BYTES``."""
    buffer: list[Document] = []
    held = 0

    def draw() -> Document:
        index = int(rng.integers(len(buffer)))
        buffer[index], buffer[-1] = buffer[-1], buffer[index]
        return buffer.pop()

    for document in documents:
        buffer.append(document)
        held += document.num_bytes
        while len(buffer) > size or (held > MAX_BUFFER_BYTES and buffer):
            drawn = draw()
            held -= drawn.num_bytes
            yield drawn
    while buffer:
        yield draw()


@dataclass(frozen=True)
class Stream:
    """A source that is read again and again.

    Attributes:
        path: file or folder.
        encoder: encoder of documents.
        settings: settings by which files are read.
        max_bytes: bytes of one pass; 0 reads all.
        held_out: whether evaluation data has a file of its own.
        buffer: documents in the shuffle buffer.
        seed: seed of the order.
        account: is told what is read and what is not.
    """

    path: Path
    encoder: DocumentEncoder
    settings: SourceSettings
    max_bytes: int
    held_out: bool
    buffer: int
    seed: int
    account: SourceAccount = field(default_factory=SourceAccount)

    def _documents(self, order: list[int] | None = None) -> tuple[Iterator[Document], bool]:
        # With a limit every pass reads by name, so that each reads the same files.
        chosen = None if self.max_bytes else order
        files = read_documents(self.path, settings=self.settings, order=chosen, account=self.account)
        return split_rule(limit_bytes(files, self.max_bytes), self.held_out)

    def training_documents(self, after_pass: Callable[[int], object] = lambda _count: None) -> Iterator[Document]:
        """Yield the training documents of one pass after another, without end.

        Args:
            after_pass: called after each pass with its number of documents.

        Raises:
            InputError: when a pass has no document.
        """
        for epoch in itertools.count():
            rng = np.random.default_rng((self.seed, epoch))
            files = rng.permutation(len(list_files(self.path, self.settings))).tolist()
            documents, splits = self._documents(files)
            kept = (document for document in documents if not (splits and is_held_out(document.name)))
            found = 0
            for document in shuffle(kept, self.buffer, rng):
                found += 1
                yield document
            if not found:
                raise refuse_empty(self.path, self.settings, self.account)
            after_pass(found)

    def held_out_tokens(self, count: int) -> TokenSet:
        """Return the tokens of the first held-out documents by name, at least ``count`` where there are so many."""
        documents, splits = self._documents()
        writer = TokenWriter(None)
        if splits and count:
            held = (document for document in documents if is_held_out(document.name))
            for encoded in self.encoder.encode(held):
                writer.add(encoded)
                if writer.num_tokens > count:
                    break
        return writer.finish()

    @property
    def sha256(self) -> str:
        """Digest of each file's name, size, first and last MiB; reading a stream whole would defeat its purpose."""
        digest = hashlib.sha256()
        for path, name in list_files(self.path, self.settings):
            size = path.stat().st_size
            digest.update(f"{len(name)} {name} {size} ".encode("utf-8", "surrogateescape"))
            with path.open("rb") as file:
                digest.update(file.read(_SAMPLED))
                file.seek(max(0, size - _SAMPLED))
                digest.update(file.read(_SAMPLED))
        return digest.hexdigest()


class StreamOrder:
    """Batches of a stream in sequence. An earlier step than the last one asked for starts it again.

    Args:
        windows: function that starts the stream of windows.
        sequences_per_step: sequences of a batch.
        steps: steps of the full run; a stream has no end of a pass to report.
    """

    def __init__(self, windows: Callable[[], Iterator[Window]], *, sequences_per_step: int, steps: int) -> None:
        self._start, self.sequences_per_step, self.steps_per_epoch = windows, sequences_per_step, steps
        self._windows, self._next = windows(), 0
        self._last: tuple[int, list[Window]] | None = None

    def batch(self, step: int) -> Batch:
        """Return the sequences of a step (counted from 0), reading up to it."""
        if self._last is None or self._last[0] != step:
            if step < self._next:
                self._windows, self._next = self._start(), 0
            while self._next <= step:
                self._last = (self._next, list(itertools.islice(self._windows, self.sequences_per_step)))
                self._next += 1
        assert self._last is not None
        return Batch.stack(self._last[1])

    def has_label(self) -> bool:
        """Return whether one of the first batches has a label: a long prompt may fill the very first one."""
        return any(self.batch(step).num_targets for step in range(_LOOKED))


def open_stream(
    stream: Stream, *, seq_len: int, packing: str, sequences_per_step: int, steps: int | None
) -> StreamOrder:
    """Return the batches of a stream.

    Raises:
        InputError: when the number of steps is not given.
    """
    if steps is None:
        expected, remedy = "steps: a stream is not counted before it is read", "set steps, or streaming to false"
        raise InputError("streaming", expected=expected, got="epochs alone", remedy=remedy)

    # By itself a document gives a window where it has a token to learn after another; joined, every token counts.
    least = 2 if packing == "none" else 1

    def windows() -> Iterator[Window]:
        in_a_pass: list[int] = []

        def useful() -> Iterator[Encoded]:
            useless = 0
            for document in stream.encoder.encode(stream.training_documents(in_a_pass.append)):
                useless = useless + (document.part[0] == 0) if len(document.ids) < least else 0
                stream.account.count_example(document)
                if in_a_pass and useless > in_a_pass[0]:
                    expected, got = f"a document of at least {least} tokens", "none in a whole pass"
                    remedy = "give longer documents, or set packing to documents"
                    raise InputError(str(stream.path), expected=expected, got=got, remedy=remedy)
                yield document

        return pack(useful(), seq_len, packing)

    return StreamOrder(windows, sequences_per_step=sequences_per_step, steps=steps)
