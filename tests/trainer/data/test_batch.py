"""A batch's parts stay together, and documents in one window see nothing of each other, in teacher and student."""

import pytest
import torch
from document_starts import starts_of
from teachers import load_quietly

from q4kd.trainer.data.batch import Batch
from q4kd.trainer.data.encoding import Encoded
from q4kd.trainer.data.packing import Windows
from q4kd.trainer.data.token_set import TokenSet
from q4kd.trainer.demo import student_path, teacher_path
from q4kd.trainer.errors import InputError
from q4kd.trainer.kernels import attention
from q4kd.trainer.kernels.attention import causal_attention, document_mask
from q4kd.trainer.loss.config import IGNORE_INDEX, KDLossConfig
from q4kd.trainer.student.model import DistillationModel, load_student
from q4kd.trainer.teacher.teacher import OnlineSignal, Teacher


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return load_quietly(teacher_path(), dtype="float32")


def test_a_batch_is_cut_and_kept_with_its_starts() -> None:
    ids = torch.arange(12).view(3, 4)
    labels = torch.full((3, 4), IGNORE_INDEX)
    labels[0, 1] = 7
    batch = Batch(ids, labels, starts_of([[4], [2, 2], [1, 3]]))
    parts = list(batch.split(2))
    assert [len(part) for part in parts] == [2, 1]
    assert parts[1].starts_BT is not None
    assert parts[1].starts_BT.tolist() == [[0, 1, 1, 1]]
    assert batch.num_targets == 1
    assert parts[1].num_targets == 0
    assert set(batch.arrays()) == {"ids", "labels", "starts"}
    joined = Windows(TokenSet.join([Encoded.make(range(9))]), 4, "documents")
    plain = Batch.stack([joined[0], joined[1]])
    assert plain.starts_BT is None
    assert plain.to(torch.device("cpu"))[slice(1, None)].labels_BT.tolist() == [[5, 6, 7, 8]]
    assert set(plain.arrays()) == {"ids", "labels"}


@pytest.mark.parametrize("own_products", [True, False])
@pytest.mark.parametrize("lengths", [[[3, 5, 1]], [[100, 30, 170], [256, 43, 1]], [[1] * 300], [[513]]])
def test_each_document_attends_as_if_alone(
    lengths: list[list[int]], own_products: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if own_products and not attention._OWN_PRODUCTS:
        pytest.skip("this CPU has no product of our own")
    monkeypatch.setattr(attention, "_OWN_PRODUCTS", own_products)
    generator = torch.Generator().manual_seed(sum(map(len, lengths)))
    batch, length = len(lengths), sum(lengths[0])
    q, k, v = (torch.randn(batch, count, length, 16, generator=generator) for count in (6, 2, 2))
    found = causal_attention(q, k, v, starts_of(lengths))
    for row, documents in enumerate(lengths):
        start = 0
        for document in documents:
            span = (slice(row, row + 1), slice(None), slice(start, start + document))
            wide = (part[span].double().repeat_interleave(3, 1) for part in (k, v))
            alone = torch.nn.functional.scaled_dot_product_attention(q[span].double(), *wide, is_causal=True)
            assert torch.allclose(found[row, start : start + document].double(), alone[0].transpose(0, 1), atol=1e-5)
            start += document


def test_the_mask_is_the_documents_causal_squares() -> None:
    assert document_mask(starts_of([[2, 1]]))[0, 0].int().tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]


def test_packed_logits_are_those_of_each_document_alone(teacher: Teacher) -> None:
    student = DistillationModel(load_student(student_path(), seed=3), KDLossConfig()).eval()
    generator = torch.Generator().manual_seed(2)
    lengths = [40, 1, 23]
    ids = torch.randint(0, 2048, (1, sum(lengths)), generator=generator)
    starts = starts_of([lengths])
    with torch.no_grad():
        for model in (teacher, student):
            packed, joined = model.hidden(ids, starts), model.hidden(ids)
            alone = torch.cat([model.hidden(part) for part in ids.split(lengths, 1)], 1)
            scale = float(alone.abs().max())
            assert float((packed - alone).abs().max()) < 2e-5 * scale
            assert float((joined - alone)[:, 40:].abs().max()) > 1e-2 * scale


def test_changing_one_document_leaves_the_bits_of_the_next(teacher: Teacher) -> None:
    student = DistillationModel(load_student(student_path(), seed=3), KDLossConfig()).eval()
    ids = torch.arange(60)[None] + 100
    changed = ids.clone()
    changed[:, :20] += 500
    starts = starts_of([[20, 40]])
    with torch.no_grad():
        for model in (teacher, student):
            assert torch.equal(model.hidden(ids, starts)[:, 20:], model.hidden(changed, starts)[:, 20:])


def test_eager_attention_masks_too() -> None:
    model = load_student(student_path(), seed=3)
    eager = load_student(student_path(), seed=3)
    eager.set_attn_implementation("eager")  # type: ignore[operator]
    ids, starts = torch.arange(16)[None] + 100, starts_of([[6, 10]])
    with torch.no_grad():
        one, other = (DistillationModel(part, KDLossConfig()).eval().hidden(ids, starts) for part in (model, eager))
    assert torch.allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("starts", [[[0, 2, 2]], [[0, 1, 0]], [[-1, 0, 0]], [[0, 0]], [[0.0, 0.0, 0.0]]])
def test_starts_that_mean_nothing_are_refused(teacher: Teacher, starts: list[list[float]]) -> None:
    with pytest.raises(InputError, match="starts"):
        teacher.hidden(torch.zeros(1, 3, dtype=torch.long), torch.tensor(starts))


def test_a_fused_loss_of_no_label_is_zero(teacher: Teacher) -> None:
    model = DistillationModel(load_student(student_path(), seed=3), KDLossConfig())
    ids = torch.arange(8)[None]
    labels = torch.full((1, 8), IGNORE_INDEX)
    terms = model(ids, labels, OnlineSignal(teacher.hidden(ids), teacher.head_logits), 5.0)
    terms.loss.backward()
    assert float(terms.loss.detach()) == 0.0
    assert all(not bool(p.grad.any()) for p in model.parameters() if p.grad is not None)
