"""How far a quantised model is from its original: KL divergence, agreement, perplexity. ``q4kd fidelity`` prints it.

The answer to "does quantising the teacher hurt?" reads, for A the quantised file and B its original,

    KL(B || A)        mean ± standard error, median, 99 %, largest      nats per token, 0 for equal models
    top-1 agreement   share of tokens at which both prefer the same next token
    perplexity        of A, of B, and A/B with the error of the ratio: below 1 + 2 errors, nothing was lost

The statistics, their errors and which tokens count are those of llama.cpp's ``llama-perplexity --kl-divergence``: the
text is cut into windows of T tokens, the first token of each is the begin token where the model wants one, and the
predictions of the second half are scored, so that each has at least T/2 tokens of context. llama.cpp keeps the
original's logits in 16 bits; here both models run side by side, and a chunk of logits is the largest thing that exists.

Letters in shapes: B sequences, T positions, M scored tokens of a batch, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from q4kd.trainer.errors import InputError
from q4kd.trainer.formats.model_file import ModelFile
from q4kd.trainer.teacher.teacher import Teacher

Floats = npt.NDArray[np.float64]
# The first bounds the rows of logits at one time, the second how many of those are in float64 at one time.
CHUNK_TOKENS = 256
_EXACT_ROWS = 16
_TOKENS_AT_ONCE = 2048
QUANTILES = {"min": 0.0, "1%": 0.01, "5%": 0.05, "10%": 0.1, "median": 0.5}
QUANTILES |= {"90%": 0.9, "95%": 0.95, "99%": 0.99, "99.9%": 0.999, "max": 1.0}


def check_comparable(a: ModelFile, b: ModelFile) -> None:
    """Check that two files can be the same model in two precisions: equal dimensions, the same token at every id.

    Raises:
        InputError: naming the first thing that differs.
    """
    for name, value in vars(b.config).items():
        other = getattr(a.config, name)
        close = isinstance(value, float) and math.isclose(value, other, rel_tol=1e-6)
        # A tied head may be stored a second time, and a file may promise a shorter context.
        if name not in ("tied_head", "context_length") and other != value and not close:
            raise _other(f"{name} {value}", f"{other} in {a.path.name}")
    factors = "rope_freqs.weight"
    if (factors in a.tensors) != (factors in b.tensors):
        raise _other("the same rotary divisors in both", "rope_freqs.weight in one of them only")
    if not a.tokens or not b.tokens:
        raise _other("token strings in both files", f"none in {(b if a.tokens else a).path.name}")
    if len(a.tokens) != len(b.tokens):
        raise _other(f"{len(b.tokens)} tokens", f"{len(a.tokens)} in {a.path.name}")
    for index, (token, other) in enumerate(zip(b.tokens, a.tokens, strict=True)):
        if token != other:
            raise _other(f"{token!r} as token {index}", f"{other!r} in {a.path.name}")


def _other(expected: str, got: str) -> InputError:
    remedy = "compare a model with its own original: no figure of two different models would mean anything"
    return InputError("the two models", expected=expected, got=got, remedy=remedy)


@dataclass(frozen=True)
class Scores:
    """What was measured at each scored token, float64 ``[M]`` (``same_top`` bool).

    Attributes:
        kl: KL(B || A), nats.
        nll_a: negative log-likelihood of the text's next token under A, nats.
        nll_b: the same under B.
        same_top: whether both prefer the same next token.
        windows: which window each token belongs to, int64.
    """

    kl: Floats
    nll_a: Floats
    nll_b: Floats
    same_top: npt.NDArray[np.bool_]
    windows: npt.NDArray[np.int64]


def score(
    a: Teacher,
    b: Teacher,
    windows_NT: npt.NDArray[np.int64],
    *,
    begin: int | None = None,
    progress: Callable[[int, int, float], None] | None = None,
) -> Scores:
    """Run both models over windows of text.

    Args:
        a: the quantised model.
        b: its original; the expectation of the KL is over its distribution.
        windows_NT: int64 token ids ``[N, T]``, T at least 4.
        begin: id that takes the place of each window's first token; None leaves it.
        progress: called with (windows done, all, mean KL so far).

    Raises:
        InputError: for ids that are out of range or windows longer than the models' context.
    """
    parts: list[Scores] = []
    count, length = windows_NT.shape
    at_once = max(1, _TOKENS_AT_ONCE // length)
    for start in range(0, count, at_once):
        ids_BT = torch.from_numpy(windows_NT[start : start + at_once].copy())
        labels_BT, first = ids_BT[:, 1:].clone(), length // 2
        if begin is not None:
            ids_BT[:, 0] = begin
        hidden_a, hidden_b = (model.hidden(ids_BT)[:, first:-1].flatten(0, 1) for model in (a, b))
        rows = list(_chunks(a, b, hidden_a, hidden_b, labels_BT[:, first:].flatten()))
        kl, nll_a, nll_b, same = (torch.cat(values).cpu().numpy() for values in zip(*rows, strict=True))
        numbers = np.repeat(np.arange(start, start + len(ids_BT)), length - 1 - first)
        parts.append(Scores(kl, nll_a, nll_b, same, numbers))
        if progress:
            progress(start + len(ids_BT), count, float(np.mean(np.concatenate([part.kl for part in parts]))))
    return Scores(*(np.concatenate(values) for values in zip(*(vars(part).values() for part in parts), strict=True)))


def _chunks(
    a: Teacher, b: Teacher, hidden_a: Tensor, hidden_b: Tensor, labels_M: Tensor
) -> Iterator[tuple[Tensor, ...]]:
    for rows in torch.split(torch.arange(len(labels_M)), CHUNK_TOKENS):
        chunk = slice(int(rows[0]), int(rows[-1]) + 1)
        logits_a, logits_b = a.head_logits(hidden_a[chunk]), b.head_logits(hidden_b[chunk])
        labels = labels_M[chunk].to(logits_a.device)
        for part in torch.split(torch.arange(len(labels)), _EXACT_ROWS):
            few = slice(int(part[0]), int(part[-1]) + 1)
            yield compare_rows(logits_a[few], logits_b[few], labels[few])


def compare_rows(logits_a: Tensor, logits_b: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return KL(B || A), both negative log-likelihoods and whether the top tokens agree, ``[m]`` each.

    Logits are float32 ``[m, V]``, the softmax and the sums float64; labels, the tokens that follow, are int64 ``[m]``.
    """
    log_q, log_p = torch.log_softmax(logits_a.double(), -1), torch.log_softmax(logits_b.double(), -1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    at = labels.unsqueeze(1)
    nll_a, nll_b = (-log.gather(1, at).squeeze(1) for log in (log_q, log_p))
    return kl, nll_a, nll_b, logits_a.argmax(-1) == logits_b.argmax(-1)


def summarise(scores: Scores) -> dict[str, Any]:
    """Return the statistics, with llama.cpp's errors: those of a mean of independent tokens.

    Tokens of one window are not independent, so ``kl`` also has the error of a mean over windows.
    """
    difference = scores.nll_a - scores.nll_b
    agreement, count = float(scores.same_top.mean()), len(scores.kl)
    probability = np.exp(-scores.nll_a) - np.exp(-scores.nll_b)
    ratio, ratio_error = math.exp(difference.mean()), _error(difference)
    by_window = [float(scores.kl[scores.windows == number].mean()) for number in np.unique(scores.windows)]
    quantiles = np.quantile(scores.kl, list(QUANTILES.values()))
    spread = scores.nll_a.std() * scores.nll_b.std()
    return {
        "tokens": count,
        "kl": {
            "mean": float(scores.kl.mean()),
            "error": _error(scores.kl),
            "error_over_windows": _error(np.array(by_window)),
            **{name: float(value) for name, value in zip(QUANTILES, quantiles, strict=True)},
        },
        "top1_agreement": {"mean": agreement, "error": math.sqrt(agreement * (1 - agreement) / max(1, count - 1))},
        "perplexity": {"a": _perplexity(scores.nll_a), "b": _perplexity(scores.nll_b)},
        "perplexity_ratio": {
            "mean": ratio,
            "error": ratio * ratio_error,
            "log_mean": float(difference.mean()),
            "log_error": ratio_error,
            "log_correlation": float(np.cov(scores.nll_a, scores.nll_b, ddof=0)[0, 1] / spread) if spread else 1.0,
        },
        "probability_change": {
            "mean": float(probability.mean()),
            "error": _error(probability),
            "rms": float(np.sqrt(np.mean(probability**2))),
        },
    }


def _error(values: Floats) -> float:
    """Return the standard error of a mean."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0


def _perplexity(nll: Floats) -> dict[str, float]:
    value = math.exp(nll.mean())
    return {"mean": value, "error": value * _error(nll)}
