"""What one step or micro-batch holds: token ids, the labels that are learnt from them, and where documents begin.

Batches are made, checked and counted on the host, and then copied to a device, so that training never waits for the
device to tell what the host knew. Letters in shapes: B sequences, T positions, P positions with a label.
"""

from collections.abc import Iterator, Sequence
from dataclasses import InitVar, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from q4kd.trainer.data.packing import Window
from q4kd.trainer.device.host_copy import copy_from_host
from q4kd.trainer.errors import InputError
from q4kd.trainer.loss.config import IGNORE_INDEX
from q4kd.trainer.loss.sums import target_positions


@dataclass(frozen=True)
class BatchFacts:
    """What was found in a batch when it was made.

    Attributes:
        id_range: lowest and highest token id of the batch, or of a larger one that it was cut from.
        step_targets: labels of the whole step, over all micro-batches and processes: of the batch that was made first.
        counts_B: int64 labels of each sequence, on the host.
        positions_P: int64 positions that have a label, rising, in the flattened ``[B, T]``; on the batch's device.
    """

    id_range: tuple[int, int]
    step_targets: int
    counts_B: npt.NDArray[np.int64]
    positions_P: Tensor


@dataclass(frozen=True)
class Batch:
    """Inputs and labels of some sequences.

    Attributes:
        ids_BT: int64 token ids.
        labels_BT: int64 next-token ids; ``IGNORE_INDEX`` masks a position.
        starts_BT: int64 first position of each position's document, before which it attends to nothing; None when
            every sequence is one document (or documents may see each other), which keeps the causal kernels.
        windows_B: int64 index of each sequence among the training windows, always on the host, by which cached signals
            are found; None for sequences that have none.
        known: facts of a batch that is a part or a copy of another one; without them they are found by reading it.
        facts: what was found in it.

    Raises:
        InputError: for starts that fall, or lie behind their position.
    """

    ids_BT: Tensor
    labels_BT: Tensor
    starts_BT: Tensor | None = None
    windows_B: npt.NDArray[np.int64] | None = None
    known: InitVar[BatchFacts | None] = None
    facts: BatchFacts = field(init=False, repr=False, compare=False)

    def __post_init__(self, known: BatchFacts | None) -> None:
        if known is None and self.starts_BT is not None:
            check_starts(self.starts_BT, self.ids_BT)
        object.__setattr__(self, "facts", self._read() if known is None else known)

    def _read(self) -> BatchFacts:
        ids_BT, counts_B = self.ids_BT, (self.labels_BT != IGNORE_INDEX).sum(1).cpu().numpy()
        id_range = (int(ids_BT.min()), int(ids_BT.max())) if ids_BT.numel() else (0, 0)
        return BatchFacts(id_range, int(counts_B.sum()), counts_B, target_positions(self.labels_BT.flatten()))

    @classmethod
    def from_windows(cls, windows: npt.NDArray[np.int64]) -> "Batch":
        """Make a batch of int64 tokens ``[B, T + 1]``: inputs are all but the last, labels all but the first."""
        tensor = torch.from_numpy(windows)
        return cls(tensor[:, :-1], tensor[:, 1:])

    @classmethod
    def stack(cls, windows: Sequence[Window], indices: npt.NDArray[np.int64] | None = None) -> "Batch":
        """Make a batch of packed windows, with their indices; starts are kept where any window has a border."""
        starts = np.stack([window.starts for window in windows])
        return cls(
            torch.from_numpy(np.stack([window.ids for window in windows])),
            torch.from_numpy(np.stack([window.labels for window in windows])),
            torch.from_numpy(starts) if starts.any() else None,
            indices,
        )

    def __len__(self) -> int:
        return len(self.ids_BT)

    @property
    def num_targets(self) -> int:
        """How many positions have a label."""
        return int(self.facts.counts_B.sum())

    def __getitem__(self, sequences: slice) -> "Batch":
        """Return some of the sequences. Consecutive ones are taken without waiting for the device."""
        labels_BT, facts = self.labels_BT[sequences], self.facts
        start, stop, stride = sequences.indices(len(self))
        if stride == 1:
            before, after = int(facts.counts_B[:start].sum()), int(facts.counts_B[:stop].sum())
            positions_P = facts.positions_P[before:after] - start * labels_BT.shape[1]
        else:
            positions_P = target_positions(labels_BT.flatten())
        return Batch(
            self.ids_BT[sequences],
            labels_BT,
            None if self.starts_BT is None else self.starts_BT[sequences],
            None if self.windows_B is None else self.windows_B[sequences],
            known=replace(facts, counts_B=facts.counts_B[sequences], positions_P=positions_P),
        )

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device; the host does not wait for the copies."""
        return Batch(
            copy_from_host(self.ids_BT, device),
            copy_from_host(self.labels_BT, device),
            None if self.starts_BT is None else copy_from_host(self.starts_BT, device),
            self.windows_B,
            known=replace(self.facts, positions_P=copy_from_host(self.facts.positions_P, device)),
        )

    def split(self, size: int) -> Iterator["Batch"]:
        """Yield micro-batches of at most ``size`` sequences."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def arrays(self) -> dict[str, Any]:
        """Return the batch as arrays on the host, for keeping it."""
        arrays = {"ids": self.ids_BT, "labels": self.labels_BT, "starts": self.starts_BT}
        found = {name: tensor.cpu().numpy() for name, tensor in arrays.items() if tensor is not None}
        return found if self.windows_B is None else {**found, "windows": self.windows_B}


def check_starts(starts_BT: Tensor, ids_BT: Tensor) -> None:
    """Refuse first positions of documents, int64 ``[B, T]``, that do not fit the token ids.

    Raises:
        InputError: when they fall along T, lie behind their position, or have another shape or type.
    """
    fits = starts_BT.shape == ids_BT.shape and starts_BT.dtype == torch.int64
    if fits:
        positions_T = torch.arange(ids_BT.shape[1], device=starts_BT.device)
        rising = (starts_BT.diff(dim=1) >= 0).all()
        fits = bool(rising & ((starts_BT >= 0) & (starts_BT <= positions_T)).all())
    if not fits:
        expected = f"int64 {tuple(ids_BT.shape)}, not falling, each from 0 to its position"
        got, remedy = f"{starts_BT.dtype} {tuple(starts_BT.shape)}", "give each position the first one of its document"
        raise InputError("starts", expected=expected, got=got, remedy=remedy)
