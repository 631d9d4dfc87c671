"""Documents to windows, and the order in which a run takes them: written a second time, position by position.

The rules are those of docs/how-to/data.md: windows of T inputs are cut from the joined documents, each input's
label is the token after it, and the batch of a step is a function of (data, seed, step) alone.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Packing = Literal["documents", "stream", "none"]
MASKED = -100


@dataclass(frozen=True)
class Document:
    """A document's tokens, its end-of-text token included, and whether each is learnt."""

    ids: tuple[int, ...]
    learnt: tuple[bool, ...]


@dataclass(frozen=True)
class Windows:
    """Ids, labels and the number of the document that each position may see, int64 ``[N, T]`` each."""

    ids: Ints
    labels: Ints
    documents: Ints

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, chosen: Ints) -> "Windows":
        """Return some of the windows."""
        return Windows(self.ids[chosen], self.labels[chosen], self.documents[chosen])


def cut_windows(documents: Sequence[Document], length: int, packing: Packing) -> Windows:
    """Return the windows of ``length`` inputs that packing makes of documents.

    ``documents`` cuts them joined; a position sees its own document alone, and no document predicts the next one.
    ``stream`` joins them into one text. ``none`` cuts each by itself and pads its last window.
    """
    tokens = [
        [(token, learns, number) for token, learns in zip(document.ids, document.learnt, strict=True)]
        for number, document in enumerate(documents)
    ]
    rows = []
    for joined in tokens if packing == "none" else [list(itertools.chain.from_iterable(tokens))]:
        for start in range(0, len(joined) - 1, length):
            row = []
            for (token, _, number), (label, learns, next_number) in itertools.pairwise(joined[start:][: length + 1]):
                crosses = packing == "documents" and number != next_number
                row.append(
                    (token, label if learns and not crosses else MASKED, number if packing == "documents" else 0)
                )
            if packing == "none":
                row += [(0, MASKED, 0)] * (length - len(row))
            if len(row) == length:
                rows.append(row)
    found = np.array(rows, np.int64)
    return Windows(found[..., 0], found[..., 1], found[..., 2])


def chosen_windows(count: int, per_step: int, seed: int, step: int) -> Ints:
    """Return which of ``count`` windows a step takes, counted from 0: each epoch has an order of its own.

    The order of epoch e is ``numpy.random.default_rng((seed, e)).permutation(count)``; what is left over after the
    epoch's whole steps is dropped.
    """
    epoch, position = divmod(step, count // per_step)
    order = np.random.default_rng((seed, epoch)).permutation(count)
    return np.asarray(order[position * per_step :][:per_step], np.int64)
