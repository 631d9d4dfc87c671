"""Tokens to windows of seq_len inputs, each with the label that follows it.

``documents`` and ``stream`` cut the joined documents in sequence: window i holds tokens ``i T .. i T + T``; inputs are
all but the last, labels all but the first, so every token but the first is a label exactly once, and what is left at
the end (at most T tokens) is dropped. ``documents`` also bars a position from what lies before its document, and the
last token of a document has no label: the first token of the next one is not predicted. The end-of-text token that
ends a document is a label like any other. ``none`` cuts each document by itself in the same way and pads its last
window; padding follows every real token, so causal attention never sees it, and has no label.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from q4kd.trainer.data.encoding import Encoded
from q4kd.trainer.data.token_set import TokenSet
from q4kd.trainer.loss.config import IGNORE_INDEX


@dataclass(frozen=True)
class Window:
    """One sequence: int64 ``[T]`` each; ``starts`` is all zero without a border."""

    ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]


def make_labels(ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return next-token labels ``[n - 1]`` of tokens ``[n]``."""
    return ids[1:].copy()


@dataclass(frozen=True)
class Windows:
    """The windows of a set of tokens.

    Attributes:
        tokens: tokens of every document.
        seq_len: T.
        packing: ``documents``, ``stream`` or ``none``.
    """

    tokens: TokenSet
    seq_len: int
    packing: str

    def __len__(self) -> int:
        if self.packing == "none":
            return int(self._ends[-1]) if len(self._ends) else 0
        return max(0, (len(self.tokens.ids) - 1) // self.seq_len)

    @cached_property
    def _ends(self) -> npt.NDArray[np.int64]:
        """Number of windows up to and with each document, where each document is cut by itself."""
        lengths = np.diff(self.tokens.offsets)
        return np.cumsum(-(-(lengths - 1) // self.seq_len))

    @property
    def num_used(self) -> int:
        """Tokens of the whole windows, without the one more that the last label needs."""
        return len(self.tokens.ids) if self.packing == "none" else len(self) * self.seq_len

    def __getitem__(self, index: int) -> Window:
        """Return a window."""
        if self.packing == "none":
            document = int(np.searchsorted(self._ends, index, side="right"))
            before = int(self._ends[document - 1]) if document else 0
            begin, end = (int(offset) for offset in self.tokens.offsets[document : document + 2])
            start = begin + (index - before) * self.seq_len
            return self._cut(start, min(start + self.seq_len + 1, end))
        start = index * self.seq_len
        return self._cut(start, start + self.seq_len + 1)

    def _cut(self, start: int, stop: int) -> Window:
        """Return the window of tokens ``[start, stop)``, padded to ``seq_len`` by repeating the last one."""
        tokens = self.tokens
        ids = tokens.ids[start:stop].astype(np.int64)
        labels = make_labels(ids)
        if tokens.learnt is not None:
            labels[~tokens.learnt[start + 1 : stop]] = IGNORE_INDEX
        starts = np.zeros(self.seq_len, np.int64)
        if self.packing == "documents":
            inside = tokens.offsets[np.searchsorted(tokens.offsets, start, side="right") :]
            inside = inside[: np.searchsorted(inside, stop)] - start
            labels[inside - 1] = IGNORE_INDEX
            for first in inside[inside < self.seq_len]:
                starts[first:] = first
        missing = self.seq_len - len(labels)
        if missing:
            inputs = np.concatenate([ids[:-1], np.full(missing, ids[-1])])
            return Window(inputs, np.concatenate([labels, np.full(missing, IGNORE_INDEX)]), starts)
        return Window(ids[:-1], labels, starts)

    def count_unlabelled(self) -> int:
        """Count the windows none of whose next tokens is learnt, such as those that a long prompt fills."""
        learnt, total = self.tokens.learnt, len(self)
        if learnt is None or not total:
            return 0
        if self.packing != "none":
            nexts = np.asarray(learnt[1 : total * self.seq_len + 1])
            return total - int(nexts.reshape(total, self.seq_len).any(1).sum())
        counts = np.diff(self._ends, prepend=0)
        begins, ends = (np.repeat(self.tokens.offsets[part], counts) for part in (slice(-1), slice(1, None)))
        number = np.arange(total) - np.repeat(self._ends - counts, counts)
        starts = begins + number * self.seq_len
        # Every other sum is that from a window's second token to its end; the rest lies between two windows.
        borders = np.stack([starts + 1, np.minimum(starts + self.seq_len + 1, ends)], 1).ravel()[:-1]
        return total - int(np.logical_or.reduceat(learnt, borders)[::2].sum())

    def has_label(self) -> bool:
        """Return whether any window has a label; it looks no further than the first that has one."""
        return any(bool((self[index].labels != IGNORE_INDEX).any()) for index in range(len(self)))


def pack(documents: Iterable[Encoded], seq_len: int, packing: str) -> Iterator[Window]:
    """Yield the windows of documents as they come: those of ``Windows`` over all of them, in the same order."""
    held: list[Encoded] = []
    size = 0
    for document in documents:
        held.append(document)
        size += len(document.ids)
        if packing != "none" and size <= seq_len:
            continue
        windows = Windows(TokenSet.join(held), seq_len, packing)
        yield from map(windows.__getitem__, range(len(windows)))
        held = _after(held, windows.num_used)
        size = sum(len(part.ids) for part in held)


def _after(documents: Sequence[Encoded], count: int) -> list[Encoded]:
    """Return documents without their first ``count`` tokens."""
    rest = []
    for document in documents:
        cut = min(count, len(document.ids))
        count -= cut
        if cut < len(document.ids):
            rest.append(Encoded(document.ids[cut:], None if document.learnt is None else document.learnt[cut:]))
    return rest
