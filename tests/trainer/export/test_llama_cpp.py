"""A Phi-3 student, whose window llama.cpp leaves out and whose added tokens take spaces, as a GGUF."""

import json
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers import Phi3Config, Phi3ForCausalLM

from q4kd.harness.__main__ import main
from q4kd.harness.inputs.published.tokenizers import pieces
from q4kd.trainer.export.llama_cpp import differences
from q4kd.trainer.formats.gguf.tokenizer import read_tokenizer
from q4kd.trainer.formats.open import open_model
from q4kd.trainer.student.model import load_tokenizer

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = "<|user|>\n what <|end|>\n<|assistant|>\n\tthis </s>  that"


def write_phi3(folder: Path, window: int | None) -> Path:
    content = pieces("Phi-3")
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    sizes = SIZES | ids | {"vocab_size": 1152, "max_position_embeddings": 64}
    Phi3ForCausalLM(Phi3Config(**sizes, sliding_window=window)).save_pretrained(folder)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **named}))
    return folder


@pytest.mark.parametrize(("window", "words"), [(16, "note: llama.cpp leaves out the window of Phi-3"), (64, None)])
def test_what_llama_cpp_leaves_out_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], window: int, words: str | None
) -> None:
    source, out = write_phi3(tmp_path / "student", window), tmp_path / "s.gguf"
    assert main(["export", str(source), "--format", "gguf", "--quantize", "f32", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert (words in said and f"from position {window} on" in said) if words else "note" not in said
    model = open_model(out)
    assert model.metadata["general.name"] == "student (Phi-3)"
    assert model.config.windows == ((window,) if words else ())
    wanted = load_tokenizer(source)(TEXT, add_special_tokens=False)["input_ids"]
    assert read_tokenizer(model).encode(TEXT).ids == wanted


def test_a_space_before_the_first_text_alone_is_said(tmp_path: Path) -> None:
    source, out = write_phi3(tmp_path / "student", None), tmp_path / "s.gguf"
    assert main(["export", str(source), "--format", "gguf", "--quantize", "f32", "--out", str(out)]) == 0
    config = open_model(out).config
    for scheme, count in (("first", 1), ("always", 0)):
        step = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False}
        assert len(differences(config, {"pre_tokenizer": step})) == count
