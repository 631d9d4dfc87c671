"""Packed rows: where the document of each position starts."""

import torch
from torch import Tensor


def starts_of(lengths: list[list[int]]) -> Tensor:
    """Return starts ``[B, T]`` of rows made of documents of these lengths."""
    return torch.tensor(
        [[sum(row[:index]) for index, length in enumerate(row) for _ in range(length)] for row in lengths]
    )
