"""The loss's logits are transformers' own, for students that scale or cap them; other functions are refused."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention

from q4kd.trainer.errors import InputError
from q4kd.trainer.loss.config import DIVERGENCES, KDLossConfig, LastStep
from q4kd.trainer.loss.fused import kd_loss
from q4kd.trainer.loss.teacher_head import DenseHead
from q4kd.trainer.student.logits import find_last_step
from q4kd.trainer.student.model import DistillationModel

VOCAB = 64
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Logits of some size, so that a cap bends them.
    "initializer_range": 0.5,
}
IDS = torch.arange(3, 23)[None]


def make(kind: str, dtype: torch.dtype = torch.float32, **changes: object) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **changes})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(dtype)


STUDENTS = [
    ("llama", {}, LastStep()),
    ("granite", {"logits_scaling": 8.0}, LastStep(1 / 8)),
    ("granitemoe", {"logits_scaling": 6.0, "num_local_experts": 4, "num_experts_per_tok": 2}, LastStep(1 / 6)),
    ("hyperclovax", {"logits_scaling": 8.0}, LastStep(8.0)),
    ("cohere", {"logit_scale": 0.0625}, LastStep(0.0625)),
    ("cohere2", {"logit_scale": 0.3}, LastStep(0.3)),
    ("gemma2", {"final_logit_softcapping": 30.0}, LastStep(cap=30.0)),
    ("gemma2", {"final_logit_softcapping": None}, LastStep()),
    ("gemma3_text", {"final_logit_softcapping": 7.5}, LastStep(cap=7.5)),
    ("vaultgemma", {}, LastStep(cap=30.0)),
    ("nanochat", {}, LastStep(cap=15.0)),
]
NAMES = [f"{kind}-{step}" for kind, _, step in STUDENTS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "changes", "last_step"), STUDENTS, ids=NAMES)
def test_the_last_step_is_found(kind: str, changes: dict[str, object], last_step: LastStep, dtype: torch.dtype) -> None:
    student = make(kind, dtype, **changes)
    model = DistillationModel(student, KDLossConfig())
    assert model.config.last_step == last_step
    model.eval()
    with torch.no_grad():
        found, expected = model.head.logits(model.hidden(IDS)[0]), student(IDS).logits[0].float()
    assert float((found - expected).norm() / expected.norm()) <= (1e-6 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("mode", ["fast", "low"])
@pytest.mark.parametrize(("kind", "changes"), [student[:2] for student in STUDENTS[1:]], ids=NAMES[1:])
def test_loss_and_gradients_are_those_of_the_models_own_logits(
    kind: str, changes: dict[str, object], mode: Any, divergence: Any
) -> None:
    """By autograd through transformers' own forward pass, sums in float64."""
    student = make(kind, **changes)
    student.eval()
    labels, generator = torch.arange(4, 24), torch.Generator().manual_seed(1)
    teacher = 3 * torch.randn(20, VOCAB, generator=generator)
    config = KDLossConfig(alpha=0.4, divergence=divergence, mode=mode, chunk_tokens=7, vocab_tile=24, temperature=2.0)
    model = DistillationModel(student, config).eval()
    head = DenseHead(torch.eye(VOCAB))

    class Signal:
        def loss(self, hidden: Any, weight: Any, labels: Any, **options: Any) -> Any:
            return kd_loss(hidden, weight, labels, teacher_hidden=teacher, teacher_head=head, **options)

    terms = model(IDS, labels[None], Signal(), 20.0)
    terms.loss.backward()
    found = {name: value.grad.double() for name, value in student.named_parameters() if value.grad is not None}
    student.zero_grad()
    logits = student(IDS).logits[0].double()
    log_q, log_p = F.log_softmax(logits / 2, -1), F.log_softmax(teacher.double() / 2, -1)
    q, p = log_q.exp(), log_p.exp()
    log_m = ((p + q) / 2).log()
    value = {
        "forward_kl": (p * (log_p - log_q)).sum(),
        "reverse_kl": (q * (log_q - log_p)).sum(),
        "jsd": (p * (log_p - log_m)).sum() / 2 + (q * (log_q - log_m)).sum() / 2,
    }[divergence]
    exact = (0.4 * F.cross_entropy(logits, labels, reduction="sum") + 0.6 * 4 * value) / 20
    exact.backward()
    assert float(terms.loss.detach()) == pytest.approx(float(exact.detach()), rel=2e-6)
    for name, parameter in student.named_parameters():
        if parameter.grad is None:
            continue
        expected = parameter.grad.double()
        # Sums whose true value is zero, such as those of key biases, are rounding alone.
        assert float((found[name] - expected).norm()) <= 2e-4 * float(expected.norm()) + 1e-7, name


def bend(student: Any, how: Any) -> Any:
    """Have a student's forward pass do something else to its logits."""
    plain = student.forward

    def forward(*arguments: Any, **options: Any) -> Any:
        out = plain(*arguments, **options)
        out.logits = how(out.logits)
        return out

    student.forward = forward
    return student


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (lambda logits: logits + 0.5, "becoming"),
        (lambda logits: logits.clamp(-20, 20), "becoming"),
        (lambda logits: -logits, "becoming"),
        (lambda logits: torch.cat([logits[..., :-4], torch.full_like(logits[..., -4:], -torch.inf)], -1), "becoming"),
        (lambda logits: logits[..., :-4], "another shape"),
        (lambda logits: torch.log_softmax(logits, -1), "becoming"),
        (lambda logits: 30 * torch.asinh(logits / 30), "becoming"),
    ],
)
def test_other_functions_of_the_head_are_refused(how: Any, said: str) -> None:
    student = bend(make("llama"), how)
    with pytest.raises(InputError, match=said):
        DistillationModel(student, KDLossConfig())


def test_a_head_that_is_given_other_hidden_states_is_refused() -> None:
    """As MiniCPM's, which are divided by a number before the head."""
    student = make("llama")
    student.lm_head.register_forward_pre_hook(lambda _head, inputs: (inputs[0] / 4,))
    with pytest.raises(InputError, match="input of its head"):
        DistillationModel(student, KDLossConfig())


def test_a_scale_and_a_cap_together_and_a_scale_that_no_config_names() -> None:
    student = bend(make("llama"), lambda logits: 12 * torch.tanh(logits * 0.371 / 12))
    found = find_last_step(student, DistillationModel(make("llama"), KDLossConfig()).hidden)
    assert found.scale == pytest.approx(0.371, rel=1e-6)
    assert found.cap == pytest.approx(12, rel=1e-6)


def test_the_check_leaves_no_trace() -> None:
    student = make("gemma2").train()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    state = torch.random.get_rng_state()
    DistillationModel(student, KDLossConfig())
    assert student.training
    assert not student.get_output_embeddings()._forward_hooks
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())


def test_a_forward_pass_that_fails_is_the_students_error() -> None:
    student = make("llama")
    del student.model.norm
    with pytest.raises(InputError, match="AttributeError"):
        DistillationModel(student, KDLossConfig())
