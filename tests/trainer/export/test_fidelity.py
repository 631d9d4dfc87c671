"""The statistics of ``q4kd fidelity`` against dense float64, and which tokens they are about."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from q4kd.harness.oracles.reference import log_softmax  # noqa: E402
from q4kd.trainer.demo import teacher_path  # noqa: E402
from q4kd.trainer.errors import InputError  # noqa: E402
from q4kd.trainer.export import fidelity  # noqa: E402
from q4kd.trainer.export.fidelity import Scores, check_comparable, compare_rows, score, summarise  # noqa: E402
from q4kd.trainer.formats.open import open_model  # noqa: E402

VOCAB = 50


class Table:
    """A model whose logits depend on the token alone: row ``id`` of a table. It records what it was asked."""

    def __init__(self, seed: int) -> None:
        self.table = torch.from_numpy(np.random.default_rng(seed).normal(0, 2, (VOCAB, VOCAB)).astype(np.float32))
        self.seen: list[Any] = []
        self.largest = 0

    def hidden(self, ids_BT: Any) -> Any:
        self.seen.append(ids_BT.clone())
        return self.table[ids_BT]

    def head_logits(self, hidden_MH: Any) -> Any:
        self.largest = max(self.largest, len(hidden_MH))
        return hidden_MH


def dense(a: Table, b: Table, windows: np.ndarray, begin: int | None) -> Scores:
    """The same by float64 over whole windows: the second half of each, every row on its own."""
    found: list[tuple[float, ...]] = []
    for number, window in enumerate(windows):
        for at in range(len(window) // 2, len(window) - 1):
            token = begin if at == 0 and begin is not None else window[at]
            log_q, log_p = (log_softmax(model.table[token].double().numpy()) for model in (a, b))
            label = window[at + 1]
            kl = float((np.exp(log_p) * (log_p - log_q)).sum())
            found.append((kl, -log_q[label], -log_p[label], log_q.argmax() == log_p.argmax(), number))
    columns = [np.array(column) for column in zip(*found, strict=True)]
    return Scores(*columns)


@pytest.mark.parametrize(("count", "length"), [(5, 8), (3, 9), (40, 128), (1, 4)])
def test_scores_are_those_of_dense_float64(count: int, length: int) -> None:
    a, b = Table(1), Table(2)
    windows = np.random.default_rng(3).integers(0, VOCAB, (count, length))
    progress: list[tuple[int, int, float]] = []
    found = score(a, b, windows, progress=lambda *words: progress.append(words))
    exact = dense(a, b, windows, None)
    assert len(found.kl) == count * (length - 1 - length // 2)
    for name, values in vars(exact).items():
        np.testing.assert_allclose(getattr(found, name), values, atol=1e-12, err_msg=name)
    assert progress[-1][:2] == (count, count)
    assert progress[-1][2] == pytest.approx(exact.kl.mean())


def test_the_begin_token_takes_the_first_place_of_each_window_for_both_models() -> None:
    a, b = Table(1), Table(2)
    windows = np.random.default_rng(3).integers(5, VOCAB, (6, 8))
    kept = windows.copy()
    score(a, b, windows, begin=4)
    for model in (a, b):
        seen = torch.cat(model.seen).numpy()
        assert (seen[:, 0] == 4).all()
        assert np.array_equal(seen[:, 1:], kept[:, 1:])
    assert np.array_equal(windows, kept)


def test_no_more_rows_than_a_chunk_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    original = fidelity.compare_rows
    monkeypatch.setattr(fidelity, "compare_rows", lambda *words: rows.append(len(words[0])) or original(*words))
    a, b = Table(1), Table(2)
    score(a, b, np.random.default_rng(3).integers(0, VOCAB, (30, 64)))
    assert a.largest <= fidelity.CHUNK_TOKENS
    assert max(rows) <= 16
    assert sum(rows) == 30 * 31


def test_a_model_is_nothing_from_itself() -> None:
    scores = score(Table(1), Table(1), np.random.default_rng(3).integers(0, VOCAB, (6, 16)))
    report = summarise(scores)
    assert (scores.kl == 0).all()
    assert report["kl"]["max"] == report["kl"]["error"] == 0
    assert report["top1_agreement"] == {"mean": 1.0, "error": 0.0}
    assert report["perplexity_ratio"]["mean"] == 1
    assert report["perplexity_ratio"]["error"] == 0


def test_the_direction_is_from_the_original() -> None:
    a, b = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(3.0), 0.0]])
    kl, nll_a, nll_b, same = compare_rows(a, b, torch.tensor([1]))
    assert float(kl) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert (float(nll_a), float(nll_b)) == (pytest.approx(math.log(2)), pytest.approx(math.log(4)))
    assert bool(same)


def test_statistics_are_llama_cpps() -> None:
    rng = np.random.default_rng(5)
    nll_b = rng.exponential(2, 400)
    nll_a = nll_b + rng.normal(0.01, 0.1, 400)
    scores = Scores(rng.exponential(0.01, 400), nll_a, nll_b, rng.random(400) < 0.9, np.repeat(np.arange(8), 50))
    report = summarise(scores)

    def mean_and_uncertainty(values: np.ndarray) -> tuple[float, float]:
        # perplexity.cpp: f = Σx / n, f2 = Σx² / n - f², sqrt(f2 / (n - 1))
        mean = values.sum() / len(values)
        return mean, math.sqrt(((values**2).sum() / len(values) - mean**2) / (len(values) - 1))

    mean, error = mean_and_uncertainty(scores.kl)
    assert (report["kl"]["mean"], report["kl"]["error"]) == (pytest.approx(mean), pytest.approx(error))
    assert report["kl"]["99%"] == pytest.approx(np.quantile(scores.kl, 0.99))
    assert report["kl"]["error_over_windows"] == pytest.approx(
        scores.kl.reshape(8, 50).mean(1).std(ddof=1) / math.sqrt(8)
    )
    log_a, error_a = mean_and_uncertainty(nll_a)
    assert report["perplexity"]["a"]["mean"] == pytest.approx(math.exp(log_a))
    assert report["perplexity"]["a"]["error"] == pytest.approx(math.exp(log_a) * error_a)
    # log_ppl_ratio_unc = sqrt(var_a + var_b - 2 cov) of the means
    log_b, error_b = mean_and_uncertainty(nll_b)
    covariance = ((nll_a * nll_b).mean() - log_a * log_b) / (len(nll_a) - 1)
    ratio = report["perplexity_ratio"]
    assert ratio["log_mean"] == pytest.approx(log_a - log_b)
    assert ratio["log_error"] == pytest.approx(math.sqrt(error_a**2 + error_b**2 - 2 * covariance))
    assert ratio["error"] == pytest.approx(math.exp(log_a - log_b) * ratio["log_error"])
    assert ratio["log_correlation"] == pytest.approx(np.corrcoef(nll_a, nll_b)[0, 1])
    share = scores.same_top.mean()
    assert report["top1_agreement"]["error"] == pytest.approx(math.sqrt(share * (1 - share) / 399))
    change = np.exp(-nll_a) - np.exp(-nll_b)
    assert report["probability_change"]["mean"] == pytest.approx(change.mean())
    assert report["probability_change"]["rms"] == pytest.approx(math.sqrt((change**2).mean()))


def test_only_two_precisions_of_one_model_are_compared() -> None:
    model = open_model(teacher_path())
    check_comparable(model, model)
    shorter = dataclasses.replace(
        model.config, context_length=8, tied_head=False, rms_eps=model.config.rms_eps * (1 + 1e-7)
    )
    check_comparable(dataclasses.replace(model, config=shorter), model)
    for change in ({"num_layers": 3}, {"rope_base": 5e5}, {"architecture": "qwen3"}, {"vocab_size": 2049}):
        other = dataclasses.replace(model, config=dataclasses.replace(model.config, **change))
        with pytest.raises(InputError, match=next(iter(change))):
            check_comparable(other, model)
    tokens = list(model.tokens)
    tokens[700], tokens[701] = tokens[701], tokens[700]
    for wrong, said in ((tuple(tokens), "as token 700"), (model.tokens[:-1], "2047"), ((), "token strings")):
        with pytest.raises(InputError, match=said):
            check_comparable(dataclasses.replace(model, tokens=wrong), model)
    factors = {**model.tensors, "rope_freqs.weight": model.tensors["output_norm.weight"]}
    with pytest.raises(InputError, match="rotary divisors"):
        check_comparable(dataclasses.replace(model, tensors=factors), model)


def test_the_file_is_named_in_the_refusal(tmp_path: Path) -> None:
    model = open_model(teacher_path())
    other = dataclasses.replace(
        model, path=tmp_path / "other.gguf", config=dataclasses.replace(model.config, num_heads=3)
    )
    with pytest.raises(InputError, match=r"num_heads 4, got 3 in other\.gguf|num_heads \d+, got 3 in other\.gguf"):
        check_comparable(other, model)


def test_the_error_of_an_agreement_of_two_tokens_is_theirs() -> None:
    scores = Scores(np.ones(2), np.ones(2), np.full(2, 2.0), np.array([True, False]), np.array([0, 1]))
    assert summarise(scores)["top1_agreement"] == {"mean": 0.5, "error": 0.5}
