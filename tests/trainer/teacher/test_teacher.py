"""The teacher's forward against three independent engines, and its refusals."""

from pathlib import Path

import numpy as np
import pytest
import torch
from model_files import write_model
from teachers import load_quietly

from q4kd.harness.inputs.demo import GOLDEN_LOGITS, GOLDEN_TEACHER
from q4kd.harness.oracles.reference import read_gguf, reference_logits
from q4kd.trainer.bench.synthetic import write_large_teacher
from q4kd.trainer.demo import golden_path, teacher_path
from q4kd.trainer.errors import FrozenTeacherError, InputError
from q4kd.trainer.kernels.attention import causal_attention
from q4kd.trainer.teacher.teacher import Teacher


def load(path: Path, backend: str | None = None) -> Teacher:
    return load_quietly(path, backend=backend, dtype="float32")


def ids_of(path: Path) -> np.ndarray:
    with np.load(path, allow_pickle=False) as arrays:
        return arrays["ids"]


def row_errors(found: np.ndarray, exact: np.ndarray) -> np.ndarray:
    return np.linalg.norm(found - exact, axis=-1) / np.linalg.norm(exact, axis=-1)


@pytest.mark.parametrize(("model", "ids"), [(GOLDEN_TEACHER, GOLDEN_LOGITS), (teacher_path(), golden_path())])
def test_every_position_is_within_1e_5_of_float64(model: Path, ids: Path) -> None:
    tokens = ids_of(ids)
    logits = load(model).logits(torch.from_numpy(tokens).long()[None])[0].numpy()
    exact = reference_logits(read_gguf(model), tokens)
    assert row_errors(logits, exact).max() <= 1e-5


def test_every_position_agrees_with_llama_cpp() -> None:
    with np.load(GOLDEN_LOGITS, allow_pickle=False) as arrays:
        tokens, theirs = arrays["ids"], arrays["logits"].astype(np.float64)
    ours = load(GOLDEN_TEACHER).logits(torch.from_numpy(tokens).long()[None])[0].numpy()
    cosine = (ours * theirs).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(theirs, axis=1)
    assert cosine.min() >= 0.999


def test_both_backends_agree_and_say_what_they_hold() -> None:
    ids = torch.from_numpy(ids_of(GOLDEN_LOGITS)).long()[None]
    packed, dense = load(GOLDEN_TEACHER), load(GOLDEN_TEACHER, "dense")
    assert row_errors(packed.logits(ids)[0].numpy(), dense.logits(ids)[0].numpy()).max() <= 1e-5
    held = packed.residency()
    assert held.dense_bytes_of_quantised == 0
    assert sum(held.resident_bytes.values()) == held.tensor_bytes
    assert dense.residency().dense_bytes_of_quantised > 5 * held.tensor_bytes


def test_a_batch_is_its_sequences_and_the_future_is_not_seen() -> None:
    teacher = load(GOLDEN_TEACHER)
    ids = torch.from_numpy(ids_of(GOLDEN_LOGITS)).long().view(4, 24)
    together = teacher.logits(ids)
    for row in range(4):
        assert torch.allclose(together[row], teacher.logits(ids[row : row + 1])[0], atol=1e-4)
    changed = ids.clone()
    changed[:, 12:] = 3
    assert torch.allclose(teacher.logits(changed)[:, :12], together[:, :12], atol=1e-4)


def test_gradients_are_refused_and_outputs_carry_none() -> None:
    teacher = load(GOLDEN_TEACHER)
    ids = torch.arange(6)[None]
    logits = teacher.logits(ids)
    assert not logits.requires_grad
    assert logits.grad_fn is None
    assert teacher.requires_grad_(False) is teacher
    for ask in (
        lambda: teacher.requires_grad_(),
        lambda: teacher.parameters(),
        lambda: teacher.backward(),
        lambda: teacher.head_logits(torch.zeros(2, 256, requires_grad=True)),
    ):
        with pytest.raises(FrozenTeacherError, match="frozen"):
            ask()


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        (torch.tensor([[0, 512]]), "0 to 511"),
        (torch.tensor([[-1]]), "0 to 511"),
        (torch.zeros(3, dtype=torch.long), "[B, T]"),
        (torch.zeros(1, 0, dtype=torch.long), "not empty"),
        (torch.zeros(1, 2049, dtype=torch.long), "2048 positions"),
    ],
)
def test_ids_that_mean_nothing_are_refused(ids: torch.Tensor, words: str) -> None:
    with pytest.raises(InputError) as caught:
        load(GOLDEN_TEACHER).logits(ids)
    assert words in str(caught.value)


def test_a_file_without_k_quants_gets_the_dense_backend(tmp_path: Path) -> None:
    teacher = load(write_model(tmp_path / "f32.gguf"))
    assert teacher.choice.backend == "dense"
    assert teacher.residency().dense_bytes_of_quantised == 0


def test_a_synthetic_teacher_is_alive_in_every_layer(tmp_path: Path) -> None:
    # The memory experiment's model must be a real computation: finite, varied, and sensitive to its input.
    path = tmp_path / "synthetic.gguf"
    write_large_teacher(path, layers=3, hidden=256, ffn=512, vocab=256)
    teacher = load(path)
    first, second = (teacher.logits(torch.tensor([[1, 2, token]]))[0] for token in (3, 4))
    assert torch.isfinite(first).all()
    assert first.std() > 0.01
    assert not torch.allclose(first[2], second[2], rtol=0.05)
    exact = reference_logits(read_gguf(path), np.array([1, 2, 3]))
    assert row_errors(first.numpy(), exact).max() <= 1e-5


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (7, 1)])
@pytest.mark.parametrize("length", [1, 17, 255, 256, 300, 513])
def test_attention_in_blocks_is_attention(heads: int, kv_heads: int, length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(2, count, length, 16, generator=generator) for count in (heads, kv_heads, kv_heads))
    wide = (tensor.double().repeat_interleave(heads // kv_heads, 1) for tensor in (k, v))
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), *wide, is_causal=True).transpose(1, 2)
    found = causal_attention(q, k, v)
    assert found.shape == (2, length, heads, 16)
    assert found.is_contiguous()
    assert torch.allclose(found.double(), exact, atol=1e-5)


def test_bfloat16_rounds_products_and_keeps_float32_around_them() -> None:
    tokens = ids_of(GOLDEN_LOGITS)
    exact = reference_logits(read_gguf(GOLDEN_TEACHER), tokens)
    teacher = load_quietly(GOLDEN_TEACHER, dtype="bfloat16")
    ids = torch.from_numpy(tokens).long()[None]
    assert teacher.hidden(ids).dtype == teacher.logits(ids).dtype == torch.float32
    errors = row_errors(teacher.logits(ids)[0].numpy(), exact)
    # Really in bfloat16, whose unit roundoff is 2^-9, and no worse than that over a few layers.
    assert errors.min() > 2.0**-11
    assert errors.max() < 2.0**-5
