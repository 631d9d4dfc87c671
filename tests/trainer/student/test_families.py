"""The loss of a student of each dense family is transformers' own, and packed documents are each alone."""

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from family_models import CASES, LENGTH, make_family  # noqa: E402

from q4kd.trainer.loss.config import KDLossConfig  # noqa: E402
from q4kd.trainer.student.model import DistillationModel  # noqa: E402

IDS = torch.arange(LENGTH)[None] * 37 % 320


@pytest.fixture(scope="module", params=CASES)
def student(request: pytest.FixtureRequest) -> Any:
    return make_family(CASES[request.param]).float()


def test_loss_and_gradients_are_transformers_own(student: Any) -> None:
    model = DistillationModel(student, KDLossConfig(alpha=1.0)).eval()
    found = model(IDS[:, :-1], IDS[:, 1:], None, LENGTH - 1).loss
    found.backward()
    gradients = {name: value.grad.clone() for name, value in student.named_parameters()}
    student.zero_grad()
    exact = student(IDS, labels=IDS).loss
    exact.backward()
    assert float(found.detach()) == pytest.approx(float(exact.detach()), rel=2e-6)
    for name, parameter in student.named_parameters():
        # The sum of a key bias's gradient is zero, but for rounding.
        scale = float(parameter.grad.norm()) if not name.endswith("k_proj.bias") else 1.0
        assert float((gradients[name] - parameter.grad).norm()) <= 2e-4 * scale + 1e-7, name
    student.zero_grad()


def test_packed_documents_are_each_alone(student: Any) -> None:
    """In a window that no divisors for long texts are taken in, which go by the sequence."""
    length = 30
    model, ids = DistillationModel(student, KDLossConfig()).eval(), IDS[:, :length]
    starts = torch.repeat_interleave(torch.tensor([0, 11, 12]), torch.tensor([11, 1, 18]))[None]
    with torch.no_grad():
        packed = model.head.logits(model.hidden(ids, starts)[0])
        alone = torch.cat([student(part).logits[0] for part in ids.split((11, 1, 18), 1)])
    assert float((packed - alone).norm() / alone.norm()) <= 1e-5
