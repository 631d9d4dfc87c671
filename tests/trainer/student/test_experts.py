"""Students that are mixtures of experts: trained as transformers trains them, what is not done is said or refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from q4kd.harness.__main__ import main
from q4kd.harness.inputs.demo import teacher_path
from q4kd.trainer.config.settings import DistillConfig
from q4kd.trainer.demo import student_path
from q4kd.trainer.errors import InputError
from q4kd.trainer.files import read_json
from q4kd.trainer.loss.config import KDLossConfig
from q4kd.trainer.student.experts import StudentExperts, find_experts
from q4kd.trainer.student.lora import add_adapters
from q4kd.trainer.student.model import DistillationModel, load_student
from q4kd.trainer.student.shape import shape_student

SIZES = {
    "vocab_size": 2048,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": 0,
}
KINDS = {
    "qwen3_moe": {"norm_topk_prob": True},
    "mixtral": {"num_local_experts": 4},
    "olmoe": {},
    "gpt_oss": {"num_local_experts": 4, "rope_scaling": None},
}


def write_student(folder: Path, kind: str = "qwen3_moe", **changes: Any) -> Path:
    folder.mkdir()
    settings = {"model_type": kind, **SIZES, **KINDS[kind], **changes}
    (folder / "config.json").write_text(json.dumps(settings))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((student_path() / name).read_bytes())
    return folder


def adapters(targets: str) -> DistillConfig:
    paths = dict.fromkeys(("teacher", "student", "data", "out"), Path("x"))
    return DistillConfig(**paths, lora_rank=2, lora_targets=targets)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_transformers_own_loss(tmp_path: Path, kind: str) -> None:
    student = load_student(write_student(tmp_path / "s", kind), seed=1)
    ids = torch.randint(0, 2048, (2, 12), generator=torch.Generator().manual_seed(3))
    student(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    theirs = {name: weight.grad.clone() for name, weight in student.named_parameters()}
    student.zero_grad()
    labels = torch.cat([ids[:, 1:], torch.full((2, 1), -100)], dim=1)
    DistillationModel(student, KDLossConfig(alpha=1.0))(ids, labels, None, 22.0).loss.backward()
    assert any(".experts." in name and gradient.abs().max() > 0 for name, gradient in theirs.items())
    for name, weight in student.named_parameters():
        assert torch.allclose(weight.grad, theirs[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_config_with_a_router_loss_is_refused(tmp_path: Path, kind: str) -> None:
    folder = write_student(tmp_path / "s", kind, output_router_logits=True, router_aux_loss_coef=0.02)
    said = (
        r"experts without a router loss, got output_router_logits: true, router_aux_loss_coef: 0.02; set output_router"
    )
    with pytest.raises(InputError, match=said):
        shape_student(folder, 1, 16, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_experts_are_found_in_every_layout(tmp_path: Path, kind: str) -> None:
    student = load_student(write_student(tmp_path / "s", kind), seed=1)
    assert find_experts(student, adapted=False) == StudentExperts(4, 2, "none", trained=True)


def test_a_dense_student_has_none() -> None:
    with torch.device("meta"):
        student = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(student_path()))
    assert find_experts(student, adapted=False) is None


def test_adapters_leave_fused_experts_as_they_are_and_say_so(tmp_path: Path) -> None:
    student = load_student(write_student(tmp_path / "s"), seed=1)
    add_adapters(student, adapters("q_proj,k_proj,v_proj,o_proj"))
    found = find_experts(student, adapted=True)
    assert found is not None and not found.trained
    assert found.describe().endswith("experts stay as they are, adapters have none of them")
    trained = {name for name, weight in student.named_parameters() if weight.requires_grad}
    assert trained and all(".self_attn." in name for name in trained)


@pytest.mark.parametrize("target", ["experts", "gate", "gate_up_proj", "down_proj", "all-linear"])
def test_adapters_on_experts_or_router_are_refused(tmp_path: Path, target: str) -> None:
    student = load_student(write_student(tmp_path / "s"), seed=1)
    with pytest.raises(InputError, match=f"setting lora_targets '{target}'"):
        add_adapters(student, adapters(target))


@pytest.mark.parametrize("rank", [0, 2])
def test_a_run_says_it_and_its_model_is_one_that_transformers_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rank: int
) -> None:
    student, run = write_student(tmp_path / "s"), tmp_path / "run"
    (tmp_path / "t.txt").write_text("def add(a, b):\n    return a + b\n" * 80)
    words = ["distill", "--teacher", str(teacher_path()), "--student", str(student), "--from-scratch", "--data"]
    words += [str(tmp_path / "t.txt"), "--out", str(run), "--seq-len", "16", "--dtype", "float32"]
    sets = {"steps": 2, "batch_size": 2, "lora_rank": rank, "lora_targets": "q_proj,v_proj", "checkpoint_every": 0}
    words += [word for key, value in sets.items() for word in ("--set", f"{key}={value}")]
    assert main(words) == 0
    change = "experts stay as they are, adapters have none of them" if rank else "experts are trained"
    said = f"student: 4 experts a layer, 2 a token; no router loss balances them; {change}"
    assert said in capsys.readouterr().out.splitlines()
    stated = {"count": 4, "per_token": 2, "router_loss": "none", "trained": not rank}
    assert read_json(run / "summary.json")["student_experts"] == stated
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    (event,) = [event for event in events if event["event"] == "student_experts"]
    assert {name: event[name] for name in stated} == stated
    ours = load_student(run / "model", seed=9)
    before = load_student(student, seed=0)
    moved = [n for (n, a), b in zip(ours.named_parameters(), before.parameters(), strict=True) if not torch.equal(a, b)]
    assert any(".experts." in name for name in moved) or rank
    ids = torch.arange(20)[None]
    theirs, info = AutoModelForCausalLM.from_pretrained(run / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(theirs(ids).logits, ours(ids).logits)
    assert main(["export", str(run), "--format", "hf", "--out", str(tmp_path / "hf")]) == 2
    assert (
        "Qwen3MoeForCausalLM, whose experts it joins as it loads; take the folder as it is" in capsys.readouterr().err
    )
    assert main(["export", str(run), "--format", "gguf", "--out", str(tmp_path / "m.gguf")]) == 2
    assert "qwen3_moe" in capsys.readouterr().err
