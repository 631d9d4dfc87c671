"""Adapters: only they are trained, the merge is peft's, peft loads what we write, and what cannot work is refused."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from q4kd.trainer.config.settings import DistillConfig, make_config
from q4kd.trainer.demo import student_path
from q4kd.trainer.errors import InputError
from q4kd.trainer.loss.config import KDLossConfig
from q4kd.trainer.student.lora import add_adapters, effective_weight, merged_state, save_adapter
from q4kd.trainer.student.model import DistillationModel, load_student
from q4kd.trainer.train.distributed import trained_tensors, whole_state

IDS = torch.arange(40).view(2, 20)


def settings(**values: object) -> DistillConfig:
    return make_config({"teacher": "t", "student": "s", "data": "d", "out": "o", "lora_rank": 4, **values})


def untied(folder: Path) -> Any:
    config = json.loads((student_path() / "config.json").read_text()) | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    return load_student(folder, seed=1)


def scramble(student: Any) -> None:
    generator = torch.Generator().manual_seed(2)
    for name, parameter in student.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.1


def logits(student: Any) -> Any:
    student.eval()
    with torch.no_grad():
        return student(IDS).logits


def test_adapters_change_nothing_at_first_and_are_all_that_is_trained() -> None:
    student: Any = load_student(student_path(), seed=1)
    before = logits(student)
    add_adapters(student, settings())
    assert torch.equal(logits(student), before)
    trained = dict(trained_tensors(student))
    assert trained
    assert all(".lora_" in name for name in trained)
    model = DistillationModel(student, KDLossConfig(alpha=1.0))
    terms = model(IDS[:, :-1], IDS[:, 1:], None, 38)
    terms.loss.backward()
    assert model.head_weight.grad is None
    assert all(parameter.grad is not None for parameter in student.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("targets", ["all-linear", "q_proj,down_proj", "embed_tokens,lm_head,v_proj"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_merge_is_pefts(tmp_path: Path, targets: str, dtype: torch.dtype) -> None:
    student = untied(tmp_path).to(dtype)
    adapted = add_adapters(student, settings(lora_targets=targets, lora_alpha=8))
    scramble(student)
    with_adapters = logits(student)
    merged = merged_state(adapted, whole_state(student, keep=True))
    theirs = copy.deepcopy(adapted).merge_and_unload()
    assert merged.keys() == theirs.state_dict().keys()
    close = 2e-6 if dtype == torch.float32 else 1e-2
    for name, tensor in theirs.state_dict().items():
        assert merged[name].dtype == dtype
        torch.testing.assert_close(merged[name], tensor, rtol=close, atol=close)
    if dtype == torch.float32:
        plain = untied(tmp_path)
        plain.load_state_dict(merged)
        torch.testing.assert_close(logits(plain), with_adapters, rtol=1e-4, atol=1e-5)


def test_an_adapter_on_the_head_is_in_the_loss(tmp_path: Path) -> None:
    student = untied(tmp_path)
    add_adapters(student, settings(lora_targets="lm_head"))
    scramble(student)
    model = DistillationModel(student, KDLossConfig(alpha=1.0)).eval()
    head = student.get_output_embeddings()
    with torch.no_grad():
        torch.testing.assert_close(
            model.hidden(IDS) @ effective_weight(head).T, student(IDS).logits, rtol=1e-4, atol=1e-5
        )
    model(IDS[:, :-1], IDS[:, 1:], None, 38).loss.backward()
    assert float(head.lora_B["default"].weight.grad.abs().max()) > 0
    assert head.base_layer.weight.grad is None


def test_peft_loads_what_is_saved(tmp_path: Path) -> None:
    from peft import PeftModel

    student: Any = load_student(student_path(), seed=1)
    adapted = add_adapters(student, settings())
    scramble(student)
    save_adapter(adapted, tmp_path / "adapter", whole_state(student, keep=True))
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "student"  # not where it lies
    base: Any = load_student(student_path(), seed=1)
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    assert torch.equal(logits(loaded), logits(student))


@pytest.mark.parametrize(
    ("targets", "words"),
    [("q_prj", "q_proj"), ("", "all-linear"), ("lm_head", "tied"), ("q_proj,embed_tokens", "embed_tokens")],
)
def test_targets_that_cannot_work_are_refused(targets: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        add_adapters(load_student(student_path(), seed=1), settings(lora_targets=targets))


def from_config(kind: str, **changes: object) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=64, **changes))


@pytest.mark.parametrize("inner", [32, 64])  # square, where a transposed update fits, and not
@pytest.mark.parametrize("targets", ["all-linear", "c_proj", "wpe,c_attn"])
def test_the_merge_of_layers_that_keep_their_weight_transposed_is_pefts(targets: str, inner: int) -> None:
    """GPT-2's layers are transformers' Conv1D, whose weight is ``[in, out]``."""
    student = from_config("gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=64, n_inner=inner)
    plain = copy.deepcopy(student)
    adapted = add_adapters(student, settings(lora_targets=targets, lora_alpha=8))
    scramble(student)
    with_adapters = logits(student)
    merged = merged_state(adapted, whole_state(student, keep=True))
    for name, tensor in copy.deepcopy(adapted).merge_and_unload().state_dict().items():
        if name in merged:
            torch.testing.assert_close(merged[name], tensor, rtol=2e-6, atol=2e-6)
    missing, unexpected = plain.load_state_dict(merged, strict=False)
    assert set(missing) <= {"lm_head.weight"}
    assert not unexpected
    assert float((with_adapters - logits(copy.deepcopy(plain))).abs().max()) <= 1e-5 * float(with_adapters.abs().max())


def test_adapters_that_are_no_matrices_are_refused_before_training() -> None:
    student = from_config("gpt2", n_embd=32, n_layer=1, n_head=4, n_positions=64)
    student.transformer.filter = torch.nn.Conv1d(4, 4, 3)
    with pytest.raises(InputError, match=r"two matrices, got transformer\.filter, a Conv1d"):
        add_adapters(student, settings(lora_targets="filter"))
    student = from_config("gpt2", n_embd=32, n_layer=1, n_head=4, n_positions=64)
    with pytest.raises(InputError, match="modules that peft has adapters for"):
        add_adapters(student, settings(lora_targets="ln_1"))
    with pytest.raises(InputError, match="c_attn, c_fc, c_proj"):
        add_adapters(student, settings(lora_targets="q_proj"))
