"""The fused loss: the written equation, its gradients, masks, types, and nothing larger than a chunk or a tile."""

import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loss_arrays import LAST_STEPS, arrays, exact_loss, relative
from teachers import load_quietly

from q4kd.harness.inputs.demo import GOLDEN_TEACHER
from q4kd.harness.oracles.reference import reference_loss
from q4kd.trainer.loss.config import DIVERGENCES, IGNORE_INDEX, MODES, KDLossConfig
from q4kd.trainer.loss.divergence import sum_rows
from q4kd.trainer.loss.fused import kd_loss
from q4kd.trainer.loss.teacher_head import DenseHead


def run(a, config: KDLossConfig, num_targets: float | None = None, head=None):  # type: ignore[no-untyped-def]
    hidden, weight = a["hidden"].clone().requires_grad_(), a["weight"].clone().requires_grad_()
    terms = kd_loss(
        hidden,
        weight,
        a["labels"],
        teacher_hidden=a["teacher_hidden"],
        teacher_head=head or DenseHead(a["teacher_weight"]),
        num_targets=num_targets or float((a["labels"] != IGNORE_INDEX).sum()),
        config=config,
    )
    terms.loss.backward()
    return terms, hidden.grad, weight.grad


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    divergence=st.sampled_from(DIVERGENCES),
    alpha=st.sampled_from([0.0, 0.2, 1.0]),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    beta=st.sampled_from([0.1, 0.5, 0.9]),
    mode=st.sampled_from(MODES),
    chunk=st.integers(0, 30),
    tile=st.sampled_from([0, 13, 64, 119, 121]),
    unmasked=st.sampled_from(["some", "one", "all"]),
    last_step=st.sampled_from(LAST_STEPS),
)
def test_loss_and_gradients_are_the_dense_float64_ones(  # type: ignore[no-untyped-def]
    seed, divergence, alpha, temperature, beta, mode, chunk, tile, unmasked, last_step
) -> None:
    a = arrays(seed)
    if unmasked == "some":
        a["labels"][::4] = IGNORE_INDEX
    if unmasked == "one":
        a["labels"][torch.arange(24) != seed % 24] = IGNORE_INDEX
    config = KDLossConfig(
        alpha=alpha,
        temperature=temperature,
        divergence=divergence,
        beta=beta,
        mode=mode,
        chunk_tokens=chunk,
        vocab_tile=tile,
        last_step=last_step,
    )
    terms, grad_hidden, grad_weight = run(a, config)
    exact, want_hidden, want_weight = exact_loss(a, config)
    # Products in float32 move the logits, which no loss can mend: of a single token up to 1.2e-6 of its loss.
    rounding = abs(exact_loss(a, config, products=torch.float32)[0].loss - exact.loss)
    assert abs(float(terms.loss.detach()) - exact.loss) <= 1e-6 * abs(exact.loss) + 2 * rounding
    assert abs(float(terms.ce) - exact.ce) <= 1e-6 * exact.ce
    assert relative(grad_hidden, want_hidden) <= 1e-5
    assert relative(grad_weight, want_weight) <= 1e-5


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("seed", "name", "beta"), [(417, "reverse_kl", 0.5), (413, "reverse_kl", 0.5), (2804, "jsd", 0.1), (53, "jsd", 0.9)]
)
def test_gradients_of_one_nearly_certain_token_keep_their_digits(mode, seed, name, beta) -> None:  # type: ignore[no-untyped-def]
    """Of q * (f - mean of f) next to nothing is left; a mean that was rounded, or of rounded products, was 1e-3 off."""
    a = arrays(seed)
    a["labels"][torch.arange(24) != seed % 24] = IGNORE_INDEX
    config = KDLossConfig(alpha=0.0, temperature=0.5, divergence=name, beta=beta, mode=mode, vocab_tile=13)
    _, grad_hidden, grad_weight = run(a, config)
    exact, want_hidden, want_weight = exact_loss(a, config)
    assert np.abs(exact.grad_logits).max() < 0.01
    assert max(relative(grad_hidden, want_hidden), relative(grad_weight, want_weight)) <= 5e-6


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_distributions_without_anything_in_common_give_finite_gradients(mode, name) -> None:  # type: ignore[no-untyped-def]
    a = arrays(5)
    a["hidden"], a["teacher_hidden"] = 60 * a["hidden"], 60 * a["teacher_hidden"]
    terms, grad_hidden, grad_weight = run(a, KDLossConfig(divergence=name, mode=mode, vocab_tile=50))
    assert all(bool(found.isfinite().all()) for found in (terms.loss.detach(), grad_hidden, grad_weight))


@pytest.mark.parametrize("mode", MODES)
def test_equality_costs_exactly_nothing(mode) -> None:  # type: ignore[no-untyped-def]
    a = arrays(4)
    # The same rows, and others past the student's vocabulary.
    a["teacher_hidden"], a["teacher_weight"] = a["hidden"], torch.cat([a["weight"], 9 * a["weight"][:8]])
    for divergence, bound in (("forward_kl", 0.0), ("reverse_kl", 0.0), ("jsd", 1e-7)):
        for temperature in (1.0, 2.0):
            config = KDLossConfig(alpha=0.0, divergence=divergence, temperature=temperature, mode=mode, vocab_tile=50)  # type: ignore[arg-type]
            head = (lambda rows: rows @ a["teacher_weight"].T) if mode == "fast" else None
            terms, grad_hidden, grad_weight = run(a, config, head=head)
            assert abs(float(terms.kd)) <= bound
            assert max(float(grad_hidden.abs().max()), float(grad_weight.abs().max())) <= 10 * bound


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_students_are_widened_and_get_bfloat16_gradients(mode) -> None:  # type: ignore[no-untyped-def]
    a = arrays(5, vocab=200)
    a["hidden"], a["weight"] = a["hidden"].bfloat16(), a["weight"].bfloat16()
    config = KDLossConfig(alpha=0.3, mode=mode, chunk_tokens=3, vocab_tile=64)
    terms, grad_hidden, grad_weight = run(a, config)
    exact, want_hidden, want_weight = exact_loss(a, config)
    assert abs(float(terms.loss.detach()) - exact.loss) <= 1e-6 * exact.loss
    assert grad_hidden.dtype == grad_weight.dtype == torch.bfloat16
    # One rounding, however many chunks: eight of them would show.
    assert relative(grad_hidden.float(), want_hidden) <= 2**-9
    assert relative(grad_weight.float(), want_weight) <= 2**-9


@pytest.mark.parametrize("mode", MODES)
def test_a_gradient_nobody_asks_for_is_not_made(mode) -> None:  # type: ignore[no-untyped-def]
    a, config = arrays(6), KDLossConfig(mode=mode, vocab_tile=50)
    _, want_hidden, want_weight = run(a, config)
    for asked in ("hidden", "weight"):
        tensors = {name: a[name].clone().requires_grad_(name == asked) for name in ("hidden", "weight")}
        terms = kd_loss(
            tensors["hidden"],
            tensors["weight"],
            a["labels"],
            teacher_hidden=a["teacher_hidden"],
            teacher_head=DenseHead(a["teacher_weight"]),
            num_targets=24.0,
            config=config,
        )
        terms.loss.backward()
        assert torch.equal(tensors[asked].grad, want_hidden if asked == "hidden" else want_weight)
        assert tensors["weight" if asked == "hidden" else "hidden"].grad is None
    with torch.no_grad():
        terms, *_ = (
            kd_loss(
                tensors["hidden"],
                tensors["weight"],
                a["labels"],
                teacher_hidden=a["teacher_hidden"],
                teacher_head=DenseHead(a["teacher_weight"]),
                num_targets=24.0,
                config=config,
            ),
            None,
        )
    assert not terms.loss.requires_grad


@pytest.mark.parametrize(("chunk_tokens", "is_held"), [(24, False), (23, True)])
def test_a_head_that_one_chunk_reads_is_not_held(chunk_tokens: int, is_held: bool) -> None:
    """Decoded whole it would be the largest thing of a step, and took twice the time of its tiles."""
    a, asked = arrays(6), []
    assert int((a["labels"] != IGNORE_INDEX).sum()) == 24

    class Head(DenseHead):
        def decoded(self) -> torch.Tensor:
            asked.append("whole")
            return super().decoded()

    run(a, KDLossConfig(chunk_tokens=chunk_tokens), head=Head(a["teacher_weight"]))
    assert asked == ["whole"] * is_held


def test_backward_scales_and_runs_once() -> None:
    a, config = arrays(7), KDLossConfig()
    _, want, _ = run(a, config)
    hidden = a["hidden"].clone().requires_grad_()
    terms = kd_loss(
        hidden,
        a["weight"],
        a["labels"],
        teacher_hidden=a["teacher_hidden"],
        teacher_head=DenseHead(a["teacher_weight"]),
        num_targets=24.0,
        config=config,
    )
    (terms.loss * 4).backward(retain_graph=True)
    assert torch.equal(hidden.grad, want * 4)
    with pytest.raises(RuntimeError, match="second time"):
        terms.loss.backward()


def test_a_batch_without_targets_adds_nothing() -> None:
    # One of several micro-batches may have none: the divisor is that of them all.
    for mode in MODES:
        a = arrays(8)
        a["labels"][:] = IGNORE_INDEX
        terms, grad_hidden, grad_weight = run(a, KDLossConfig(mode=mode), num_targets=5.0)
        assert float(terms.loss.detach()) == 0.0
        assert not grad_hidden.any()
        assert not grad_weight.any()


def test_reference_gradient_is_the_numerical_derivative() -> None:
    # The reference itself is checked by finite differences, since everything else is checked against it.
    rng = np.random.default_rng(0)
    student, teacher, labels = rng.normal(size=(3, 7)), rng.normal(size=(3, 7)), np.array([1, 0, 6])
    for divergence in DIVERGENCES:
        options = {"alpha": 0.3, "temperature": 1.7, "divergence": divergence, "beta": 0.4}
        exact = reference_loss(student, teacher, labels, **options).grad_logits  # type: ignore[arg-type]
        for index in np.ndindex(student.shape):
            step = np.zeros_like(student)
            step[index] = 1e-6
            up = reference_loss(student + step, teacher, labels, **options).loss  # type: ignore[arg-type]
            down = reference_loss(student - step, teacher, labels, **options).loss  # type: ignore[arg-type]
            assert abs((up - down) / 2e-6 - exact[index]) < 1e-8


def test_masked_positions_and_normalisation() -> None:
    a = arrays(1)
    a["labels"][5:] = IGNORE_INDEX
    terms, grad_hidden, _ = run(a, KDLossConfig(alpha=0.5, chunk_tokens=2))
    assert torch.all(grad_hidden[5:] == 0)
    halves, _, _ = run(a, KDLossConfig(alpha=0.5, chunk_tokens=2), num_targets=10.0)
    assert float(halves.loss.detach()) == pytest.approx(float(terms.loss.detach()) / 2, rel=1e-12)


class Live(torch.utils._python_dispatch.TorchDispatchMode):
    """Bytes of the storages that operators made and that are still held: their sum's peak, and the largest result."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        self.peak = self.largest = self.made = 0

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        given = {
            x.untyped_storage().data_ptr() for x in torch.utils._pytree.tree_leaves((args, kwargs)) if is_tensor(x)
        }
        for tensor in filter(is_tensor, torch.utils._pytree.tree_leaves(result)):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in given:
                self.made += 1
                self.largest = max(self.largest, tensor.numel())
                self.held[storage.data_ptr()] = (weakref.ref(storage), storage.nbytes())
        self.held = {key: entry for key, entry in self.held.items() if entry[0]() is not None}
        self.peak = max(self.peak, sum(size for _, size in self.held.values()))
        return result


def is_tensor(value: object) -> bool:
    return isinstance(value, torch.Tensor)


def test_fast_makes_nothing_larger_than_a_chunk_of_logits() -> None:
    a = arrays(2, tokens=100, vocab=900)
    with Live() as live:
        run(a, KDLossConfig(alpha=0.5, chunk_tokens=16), head=lambda rows: rows @ a["teacher_weight"].T)
    parameters = max(a["weight"].numel(), a["hidden"].numel(), a["teacher_hidden"].numel())
    assert live.largest <= max(16 * (900 + 8), parameters) < 100 * 900
    assert live.made > 100


@pytest.fixture
def row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum's float64 copy is of one row, as it is of few in a chunk of many."""
    monkeypatch.setattr("q4kd.trainer.loss.divergence._COPIED", 4000)


@pytest.mark.usefixtures("row_by_row")
@pytest.mark.parametrize(("name", "count"), [("forward_kl", 6), ("reverse_kl", 6), ("jsd", 7)])
def test_fast_holds_as_many_chunks_of_logits_as_it_says(name, count) -> None:  # type: ignore[no-untyped-def]
    tokens, vocab, hidden, chunk = 96, 4000, 8, 32
    a = arrays(4, tokens=tokens, vocab=vocab, hidden=hidden)
    for temperature in (1.0, 2.0):
        config = KDLossConfig(divergence=name, temperature=temperature, chunk_tokens=chunk)
        with Live() as live:
            run(a, config, head=lambda rows: rows @ a["teacher_weight"].T)
        gradients = 4 * (vocab + tokens) * hidden * 2  # and the clones that this test's run makes
        held = (live.peak - gradients) / (4 * chunk * vocab)
        # Half a buffer: a few rows in float64, and vectors of rows. What a sum copies inside torch is not seen here.
        assert count - 0.5 < held <= count + 0.5


@pytest.mark.parametrize("rows", [0, 1, 349, 350, 700])
def test_sums_of_rows_are_those_of_float64(rows: int) -> None:
    values = torch.randn(rows, 3000, generator=torch.Generator().manual_seed(0)) * 1e4
    found, weighted = sum_rows(values), sum_rows(values, weights := values.sigmoid())
    assert found.dtype == weighted.dtype == torch.float64
    torch.testing.assert_close(found, values.double().sum(-1), rtol=1e-13, atol=1e-9)
    torch.testing.assert_close(weighted, (values.double() * weights.double()).sum(-1), rtol=1e-13, atol=1e-9)


@pytest.mark.usefixtures("row_by_row")
def test_low_stays_within_its_arithmetic() -> None:
    """Sizes are those of the account in loss/tiled.py, scaled down: all that is alive, and the largest tensor."""
    tokens, vocab, hidden, chunk, tile = 256, 4000, 16, 64, 256
    a = arrays(3, tokens=tokens, vocab=vocab, hidden=hidden)
    for divergence in DIVERGENCES:
        config = KDLossConfig(divergence=divergence, temperature=2.0, mode="low", chunk_tokens=chunk, vocab_tile=tile)
        with Live() as live:
            run(a, config)
        gradients = 4 * (vocab + tokens) * hidden * 2  # and the clones that this test's run makes
        rows = 4 * tokens * (hidden + 20) + 8 * 10 * tokens  # of hidden states; sums of every row, and temporary ones
        beyond = (9 if divergence == "jsd" else 7) * 4 * chunk * tile + 4 * tile * 20 + rows
        assert chunk * tile < live.largest <= vocab * hidden < chunk * vocab < tokens * vocab
        assert live.peak <= gradients + beyond
        assert gradients + beyond < 0.4 * 4 * tokens * vocab


def test_packed_teacher_heads_serve_both_modes(tmp_path) -> None:  # type: ignore[no-untyped-def]
    teacher = load_quietly(GOLDEN_TEACHER, dtype="float32")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, teacher.vocab_size, (1, 20), generator=generator)
    vocab, source = teacher.vocab_size - 3, teacher.hidden(ids)[0]
    losses = {}
    hidden, weight = torch.randn(20, 8, generator=generator), torch.randn(vocab, 8, generator=generator)
    labels = torch.randint(0, vocab, (20,), generator=generator)
    for name, head, mode in (
        ("function", teacher.head_logits, "fast"),
        ("fast", teacher.head, "fast"),
        ("low", teacher.head, "low"),
    ):
        config = KDLossConfig(mode=mode, vocab_tile=100)  # type: ignore[arg-type]
        losses[name] = float(
            kd_loss(
                hidden, weight, labels, teacher_hidden=source, teacher_head=head, num_targets=20.0, config=config
            ).loss
        )
    assert losses["fast"] == pytest.approx(losses["function"], rel=1e-6)
    assert losses["low"] == pytest.approx(losses["function"], rel=1e-6)


def test_what_cannot_be_computed_is_refused() -> None:
    a = arrays(3)
    with pytest.raises(ValueError, match="needs a teacher"):
        kd_loss(
            a["hidden"], a["weight"], a["labels"], teacher_hidden=None, teacher_head=None, num_targets=1,
            config=KDLossConfig(alpha=0.5),
        )  # fmt: skip
    with pytest.raises(ValueError, match="no label is unmasked"):
        kd_loss(
            a["hidden"], a["weight"], a["labels"], teacher_hidden=None, teacher_head=None, num_targets=0,
            config=KDLossConfig(alpha=1.0),
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"pass Teacher\.head"):
        run(a, KDLossConfig(mode="low"), head=lambda rows: rows)
