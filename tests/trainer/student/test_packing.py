"""Packed documents in students with a sliding window: a layer sees of a document what it sees of it alone."""

from typing import Any

import pytest
import torch

from q4kd.trainer.errors import InputError
from q4kd.trainer.loss.config import KDLossConfig
from q4kd.trainer.student import packing
from q4kd.trainer.student.model import DistillationModel
from q4kd.trainer.train.guards import check_isolation

WINDOW, LENGTH = 12, 64
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "sliding_window": WINDOW,
    "initializer_range": 0.3,
}
KINDS = ("mistral", "phi3", "starcoder2", "mixtral", "qwen3_moe")
# These have layers of two kinds, and take a mask for each.
LAYERED = ("gemma2", "gemma3_text", "olmo3", "cohere2", "gpt_oss")


def make(kind: str, dtype: torch.dtype = torch.float32, **changes: object) -> DistillationModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SIZES, **changes})
    student = AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(dtype)
    return DistillationModel(student, KDLossConfig()).eval()


def check(model: DistillationModel) -> None:
    check_isolation(model, model.student.config, 64, LENGTH, torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS + LAYERED)
def test_documents_of_a_window_are_transformers_own(kind: str, dtype: torch.dtype) -> None:
    model = make(kind, dtype)
    check(model)
    ids = torch.arange(LENGTH)[None] * 7 % 64
    lengths = (23, 1, WINDOW, 28)
    starts = torch.repeat_interleave(torch.tensor((0, 23, 24, 36)), torch.tensor(lengths))[None]
    with torch.no_grad():
        packed = model.head.logits(model.hidden(ids, starts)[0])
        alone = torch.cat([model.student(part).logits[0].float() for part in ids.split(lengths, 1)])
    assert float((packed - alone).norm() / alone.norm()) <= (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_window_that_is_left_out_is_seen_by_numbers(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("mistral", dtype)
    monkeypatch.setattr(model, "window", None)
    with pytest.raises(InputError, match="packed documents are not what they are alone"):
        check(model)


def test_windows() -> None:
    from transformers import AutoConfig

    def window(kind: str, **changes: object) -> int | None:
        return packing.sliding_window(make(kind, **changes).student.config)

    assert window("mistral") == window("phi3") == WINDOW
    assert window("mistral", sliding_window=None) is None
    assert window("llama") is None
    assert window("qwen2", use_sliding_window=False) is None
    assert window("gemma2") == window("gemma3_text") == WINDOW
    assert window("gemma3_text", layer_types=["full_attention"] * 2) is None
    kinds = ["full_attention", "sliding_attention"]
    llama = AutoConfig.for_model("llama", sliding_window=WINDOW, num_hidden_layers=2, layer_types=kinds)
    assert packing.sliding_window(llama) is None  # It does nothing with a window, whatever its config says.
    gemma = AutoConfig.for_model("gemma3_text", sliding_window=WINDOW, num_hidden_layers=2)
    gemma.layer_types = ["sliding_attention", "linear_attention"]
    assert not packing.has_layer_types(gemma)
    assert packing.sliding_window(gemma) is None


@pytest.mark.parametrize("kind", LAYERED)
def test_one_mask_for_layers_that_differ_is_seen_by_numbers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if all layers had the window, and as if none had."""
    model = make(kind, num_hidden_layers=6)
    assert set(model.student.config.layer_types) == {"sliding_attention", "full_attention"}
    check(model)
    monkeypatch.setattr(model, "_by_kind", False)
    with pytest.raises(InputError, match="packed documents are not what they are alone"):
        check(model)
    monkeypatch.setattr(model, "window", None)
    with pytest.raises(InputError, match="packed documents are not what they are alone"):
        check(model)


def test_a_window_that_is_longer_than_a_sequence_is_nothing() -> None:
    model = make("mistral", sliding_window=LENGTH)
    ids, starts = torch.arange(LENGTH)[None] % 64, torch.zeros(1, LENGTH, dtype=torch.int64)
    found: Any = packing.packed_inputs(starts, torch.float32, model.window)["attention_mask"]
    assert torch.equal(found, packing.packed_inputs(starts, torch.float32, None)["attention_mask"])
    assert model.hidden(ids, starts).isfinite().all()
