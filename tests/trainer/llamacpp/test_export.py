"""What ``q4kd export`` writes, read by llama.cpp: run by ``nox -s parity``, which builds it; skipped without it."""

import itertools
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

llama_cpp = pytest.importorskip("llama_cpp", reason="the independent engine; nox -s parity builds it")

from exported_models import FOLDERS, TEXTS, write_folder  # noqa: E402
from llama_cpp.llama_chat_format import Jinja2ChatFormatter  # noqa: E402
from llamacpp_engine import their_logits  # noqa: E402
from parity_rows import parity_row  # noqa: E402
from teachers import load_quietly  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from q4kd.harness.__main__ import main  # noqa: E402
from q4kd.harness.oracles.reference import read_gguf, reference_logits  # noqa: E402

COSINE, ERROR = 0.999, 1e-5
IDS = np.random.default_rng(4).integers(5, 620, 96)
SIZES = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 3, "num_attention_heads": 8}
SIZES["num_key_value_heads"] = 4


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Export a model in a form, once; the model folder itself has the form None."""
    root = tmp_path_factory.mktemp("exported")

    def export(name: str, form: str | None) -> Path:
        source = root / name
        if not source.exists():
            write_folder(source, name, **SIZES)
        if form is None:
            return source
        out = root / (f"{name}-hf" if form == "hf" else f"{name}-{form}.gguf")
        if not out.exists():
            words = ["--format", "hf"] if form == "hf" else ["--format", "gguf", "--quantize", form]
            assert main(["export", str(source), *words, "--out", str(out)]) == 0
        return out

    return export


@pytest.mark.parametrize("name", FOLDERS)
def test_llama_cpp_has_the_logits_of_the_hugging_face_export(
    exported: Callable[..., Path], name: str, record_parity: Callable[[dict[str, Any]], None]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(exported(name, "hf"), use_safetensors=True).eval()
    with torch.no_grad():
        theirs = model(torch.from_numpy(IDS)[None]).logits[0].numpy()
    assert theirs.std(axis=-1).min() > 0.3, "flat logits would agree whatever is computed"
    path = exported(name, "f16")
    row = parity_row(f"{name} f16 export", "", theirs, their_logits(path, IDS), reference_logits(read_gguf(path), IDS))
    record_parity(row)
    assert row["cosine"] >= COSINE
    assert row["top1"] >= 0.97


@pytest.mark.parametrize(
    ("name", "form"),
    [*itertools.product(FOLDERS, ("q8_0", "q6_k", "q4_k_m")), ("qwen2", "f32"), ("qwen2", "bf16")],
)
def test_llama_cpp_has_our_logits_of_the_same_file(
    exported: Callable[..., Path], name: str, form: str, record_parity: Callable[[dict[str, Any]], None]
) -> None:
    path = exported(name, form)
    teacher = load_quietly(path, dtype="float32")
    ours = teacher.logits(torch.from_numpy(IDS)[None])[0].numpy()
    row = parity_row(f"{name} {form} export", "", ours, their_logits(path, IDS), reference_logits(read_gguf(path), IDS))
    record_parity(row)
    assert row["error"] <= ERROR
    assert row["cosine"] >= COSINE


@pytest.mark.parametrize("name", FOLDERS)
def test_llama_cpp_tokenises_as_transformers_does(exported: Callable[..., Path], name: str) -> None:
    engine = llama_cpp.Llama(str(exported(name, "f16")), vocab_only=True, verbose=False)
    tokenizer = AutoTokenizer.from_pretrained(exported(name, "hf"))
    for text in (*TEXTS, Path(textwrap.__file__).read_text()):
        expected = tokenizer(text, verbose=False)["input_ids"]
        found = engine.tokenize(text.encode(), add_bos=expected[:1] == [1], special=False)
        assert found == expected, text[:40]
    assert engine.token_bos() == tokenizer.bos_token_id == 1
    assert engine.token_eos() == tokenizer.eos_token_id == 3
    begins = tokenizer("x")["input_ids"][0] == 1
    assert bool(llama_cpp.llama_vocab_get_add_bos(llama_cpp.llama_model_get_vocab(engine.model))) is begins
    engine.close()


@pytest.mark.parametrize("name", ["qwen2", "mistral"])
def test_llama_cpp_renders_the_chat_as_transformers_does(exported: Callable[..., Path], name: str) -> None:
    engine = llama_cpp.Llama(str(exported(name, "f16")), vocab_only=True, verbose=False)
    tokenizer = AutoTokenizer.from_pretrained(exported(name, "hf"))
    template = engine.metadata["tokenizer.chat_template"]
    assert template == tokenizer.chat_template
    messages = [{"role": "user", "content": " Why? "}, {"role": "assistant", "content": "Ünd so."}]
    formatter = Jinja2ChatFormatter(template=template, eos_token="<|end|>", bos_token="<s>")
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert formatter(messages=messages).prompt == expected
    assert "<|assistant|>" in expected
    special = engine.tokenize(expected.encode(), add_bos=False, special=True)
    assert special == tokenizer(expected, add_special_tokens=False)["input_ids"]
    engine.close()
