"""What one micro-batch holds: token ids, the labels that are learnt from them, and where documents begin.

Letters in shapes: B sequences, T positions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from q4kd.trainer.loss_terms import IGNORE
from q4kd.trainer.packing import Window


@dataclass(frozen=True)
class Batch:
    """Inputs and labels of some sequences.

    Attributes:
        ids_BT: int64 token ids.
        labels_BT: int64 next-token ids; ``IGNORE`` masks a position.
        starts_BT: int64 first position of each position's document, before which it attends to nothing; None when
            every sequence is one document (or documents may see each other), which keeps the causal kernels.
        windows_B: int64 index of each sequence among the training windows, always on the host, by which cached signals
            are found; None for sequences that have none.
    """

    ids_BT: Tensor
    labels_BT: Tensor
    starts_BT: Tensor | None = None
    windows_B: npt.NDArray[np.int64] | None = None

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

    def __getitem__(self, sequences: slice) -> "Batch":
        """Return some of the sequences."""
        starts_BT = None if self.starts_BT is None else self.starts_BT[sequences]
        windows_B = None if self.windows_B is None else self.windows_B[sequences]
        return Batch(self.ids_BT[sequences], self.labels_BT[sequences], starts_BT, windows_B)

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device."""
        starts_BT = None if self.starts_BT is None else self.starts_BT.to(device)
        return Batch(self.ids_BT.to(device), self.labels_BT.to(device), starts_BT, self.windows_B)

    def split(self, size: int) -> Iterator["Batch"]:
        """Yield micro-batches of at most ``size`` sequences."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    def count_targets(self) -> Tensor:
        """Return how many positions have a label, int64 scalar."""
        return (self.labels_BT != IGNORE).sum()

    def arrays(self) -> dict[str, Any]:
        """Return the batch as arrays on the host, for keeping it."""
        arrays = {"ids": self.ids_BT, "labels": self.labels_BT, "starts": self.starts_BT}
        found = {name: tensor.cpu().numpy() for name, tensor in arrays.items() if tensor is not None}
        return found if self.windows_B is None else {**found, "windows": self.windows_B}
