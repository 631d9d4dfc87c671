"""Added tokens and the spaces beside them, in files and in names of files."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from q4kd.harness.inputs.published.tokenizers import byte_level, pieces
from q4kd.harness.subjects.export.probes_tokenizers import write_vocabulary
from q4kd.trainer.errors import InputError
from q4kd.trainer.formats.gguf.added_tokens import name_for
from q4kd.trainer.formats.gguf.tokenizer import read_tokenizer

TEXT = "<|user|>\n a <s> b <|end|>\t\n<|assistant|> c</s>  d<|endoftext|> e"


def changed(content: dict[str, Any], text: str, **flags: bool) -> dict[str, Any]:
    for added in content["added_tokens"]:
        if added["content"] == text:
            added |= flags
    return content


@pytest.mark.parametrize(
    ("title", "of_phi3", "of_others"),
    [
        ("runs-7", "runs-7 (Phi-3)", "runs-7"),
        ("Phi-3-mini", "Phi-3-mini", "Phi 3-mini"),
        ("my PHI3.5 student", "my PHI3.5 student", "my Phi 3.5 student"),
        ("phi-4", "phi-4 (Phi-3)", "phi-4"),
        ("modern-BERT twin", "modern-BERT twin (Phi-3)", "ModernBERT twin"),
    ],
)
def test_a_name_says_what_llama_cpp_goes_by(title: str, of_phi3: str, of_others: str) -> None:
    assert name_for(title, pieces("Phi-3")) == of_phi3
    assert name_for(title, pieces("Llama 2")) == of_others


def test_ids_of_spaces_beside_added_tokens_are_the_tokenizers_own(tmp_path: Path) -> None:
    content = pieces("Phi-3")
    wanted = Tokenizer.from_str(json.dumps(content)).encode(TEXT, add_special_tokens=False).ids
    model = write_vocabulary(tmp_path / "v.gguf", content)
    assert read_tokenizer(model).encode(TEXT).ids == wanted
    model.metadata["general.name"] = "Phi 3 Mini 4k Instruct"  # as llama.cpp's converter writes it
    assert read_tokenizer(model).encode(TEXT).ids != wanted
    model.metadata["general.architecture"] = "phi3"
    assert read_tokenizer(model).encode(TEXT).ids == wanted


@pytest.mark.parametrize("flag", ["lstrip", "single_word"])
def test_flags_that_llama_cpp_has_no_name_for_are_refused(tmp_path: Path, flag: str) -> None:
    with pytest.raises(InputError, match=rf"'<\|end\|>' with {flag}.*set {flag} to false"):
        write_vocabulary(tmp_path / "v.gguf", changed(pieces("Phi-3"), "<|end|>", **{flag: True}))


@pytest.mark.parametrize(("text", "takes"), [("<|end|>", False), ("<unk>", True)])
def test_flags_that_are_not_those_of_phi3_are_refused(tmp_path: Path, text: str, takes: bool) -> None:
    with pytest.raises(InputError, match=r"as Phi-3 has them, got .* with rstrip"):
        write_vocabulary(tmp_path / "v.gguf", changed(pieces("Phi-3"), text, rstrip=takes))


def test_a_vocabulary_that_lacks_a_token_of_phi3_is_refused(tmp_path: Path) -> None:
    content = pieces("Phi-3")
    content["added_tokens"] = [one for one in content["added_tokens"] if one["content"] != "</s>"]
    with pytest.raises(InputError, match="with rstrip"):
        write_vocabulary(tmp_path / "v.gguf", content)


def test_a_normalizer_that_changes_an_added_token_is_refused(tmp_path: Path) -> None:
    content = changed(pieces("Llama 2"), "<s>", normalized=True)  # a space is put before the token that is looked for
    with pytest.raises(InputError, match="'<s>' with normalized"):
        write_vocabulary(tmp_path / "v.gguf", content)
    for harmless in (pieces("Gemma 3"), byte_level("qwen2"), byte_level("dbrx")):
        assert write_vocabulary(tmp_path / "w.gguf", changed(harmless, "<s>", normalized=True))
