"""A row of the table of ``nox -s parity``: one file run by us, by llama.cpp and in float64."""

from typing import Any

import numpy as np
from architecture_models import row_errors

from q4kd.harness.oracles.reference import log_softmax


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of the logits at each position, in float64: ``[T, V]`` twice to ``[T]``."""
    a, b = a.astype(np.float64), b.astype(np.float64)
    return (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)


def parity_row(file: str, types: str, ours: np.ndarray, theirs: np.ndarray, exact: np.ndarray) -> dict[str, Any]:
    """Compare logits ``[T, V]`` of our teacher and of llama.cpp with each other and with float64 ones.

    Raises:
        AssertionError: when the exact logits are so flat that they would agree whatever is computed.
    """
    assert exact.std(axis=-1).min() > 0.3, "flat logits would agree whatever is computed"
    log_p, log_q = log_softmax(theirs.astype(np.float64)), log_softmax(ours.astype(np.float64))
    return {
        "file": file,
        "types": types,
        "positions": len(ours),
        "cosine": float(cosines(ours, theirs).min()),
        "error": float(row_errors(ours, exact).max()),
        "their_error": float(row_errors(theirs, exact).max()),
        "top1": float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
        "kl": float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean()),
    }
