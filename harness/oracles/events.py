"""The loss against a cached teacher in float64: over the tokens that it lists and all others together."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from q4kd.harness.oracles.reference import reference_loss

Floats = NDArray[np.float64]


def exact_topk(
    student: Floats,
    teacher: Floats,
    labels: NDArray[np.integer[Any]],
    ids: NDArray[np.integer[Any]],
    settings: Mapping[str, Any],
) -> tuple[float, Floats, float]:
    """Return the loss over k + 1 events, its gradient with respect to the student's logits, and D, in float64.

    The events' logits are the listed tokens' own and the log of the sum of exp of the others'; the dense reference is
    taken over these, and its gradient carried back through the sum. Cross-entropy is over the whole vocabulary.

    Args:
        student: logits ``[P, V]``.
        teacher: logits ``[P, V]``.
        labels: ``[P]``.
        ids: the listed tokens ``[P, k]``.
        settings: settings of the case.
    """
    rows = np.arange(len(labels))[:, None]
    rest = np.ones(student.shape, bool)
    rest[rows, ids] = False
    has_rest = bool(rest.any())

    def events(logits: Floats) -> Floats:
        parts = [logits[rows, ids]]
        if has_rest:
            left = np.where(rest, logits, -np.inf)
            most = left.max(1, keepdims=True)
            parts.append(most + np.log(np.exp(left - most).sum(1, keepdims=True)))
        return np.concatenate(parts, 1)

    options = {"temperature": 1.0, "divergence": settings["divergence"], "beta": settings["beta"]}
    first = np.zeros(len(labels), np.int64)  # the events' own cross-entropy is not asked for
    merged = reference_loss(events(student), events(teacher), first, alpha=0.0, **options)
    plain = reference_loss(student, teacher, labels, alpha=1.0, **options)
    grad = np.zeros_like(student)
    grad[rows, ids] = merged.grad_logits[:, : ids.shape[1]]
    if has_rest:
        left = np.where(rest, student, -np.inf)
        shares = np.exp(left - left.max(1, keepdims=True))
        grad += merged.grad_logits[:, -1:] * shares / shares.sum(1, keepdims=True)
    alpha = settings["alpha"]
    loss = alpha * plain.ce + (1 - alpha) * merged.kd
    return float(loss), alpha * plain.grad_logits + (1 - alpha) * grad, merged.kd
