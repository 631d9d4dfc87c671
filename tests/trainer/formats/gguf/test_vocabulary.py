"""What a GGUF says of a tokenizer: read back with the gguf package's own reader."""

import json

import gguf
import pytest

pytest.importorskip("transformers")

from exported_models import SPECIAL, make_backend

from q4kd.trainer.errors import InputError
from q4kd.trainer.formats.gguf.vocabulary import (
    SPACE,
    Vocabulary,
    add_vocabulary,
    adds_special,
    config_special_ids,
    pre_tokenizer_name,
)


def content(kind, **changes):
    return json.loads(make_backend(kind).to_str()) | changes


def sentencepiece(**changes):
    return content("llama", pre_tokenizer=None) | changes


def written(tmp_path, vocabulary, rows=700):
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "llama")
    add_vocabulary(writer, vocabulary, rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    fields = gguf.GGUFReader(tmp_path / "v.gguf").fields
    return {key.removeprefix("tokenizer."): field.contents() for key, field in fields.items()}


@pytest.mark.parametrize("kind", ["gpt-2", "qwen2", "llama-bpe", "smollm"])
def test_byte_level_splits_have_llama_cpps_names(kind):
    assert pre_tokenizer_name(content(kind)) == kind


def test_sentencepiece_is_recognised_in_both_its_spellings():
    assert pre_tokenizer_name(sentencepiece()) == "llama"
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
    assert pre_tokenizer_name(sentencepiece(normalizer=None, pre_tokenizer=metaspace)) == "llama"


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "Lowercase"}},
        {"normalizer": None},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": SPACE, "split": True}},
        {"normalizer": None, "pre_tokenizer": {"type": "Metaspace", "replacement": "_", "split": False}},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": SPACE, "split": False}},  # spaces twice
    ],
)
def test_other_treatments_of_spaces_are_refused(changes):
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        pre_tokenizer_name(sentencepiece(**changes))


def test_gemmas_cut_at_spaces_that_are_gone_is_none():
    cut = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    assert pre_tokenizer_name(sentencepiece(normalizer=replace, pre_tokenizer=cut)) == "llama"
    for changes in ({"normalizer": None}, {"pre_tokenizer": cut | {"behavior": "Isolated"}}):
        with pytest.raises(InputError, match=r"tokenizer\.json"):
            pre_tokenizer_name(sentencepiece(**({"normalizer": replace, "pre_tokenizer": cut} | changes)))


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
def test_an_added_token_that_takes_spaces_is_refused_by_name(tmp_path, flag):
    tokenizer = content("qwen2")
    tokenizer["added_tokens"][-1][flag] = True
    with pytest.raises(InputError, match=f"'<pad>' with {flag}"):
        written(tmp_path, Vocabulary(content=tokenizer))


def test_a_special_token_past_the_rows_is_left_out(tmp_path):
    tokenizer = content("qwen2")
    rows = max(*tokenizer["model"]["vocab"].values(), *(added["id"] for added in tokenizer["added_tokens"])) + 1
    picture = {**tokenizer["added_tokens"][-1], "id": rows, "content": "<image>"}
    tokenizer["added_tokens"].append(picture)
    assert "<image>" not in written(tmp_path, Vocabulary(content=tokenizer), rows)["ggml.tokens"]
    picture["special"] = False
    with pytest.raises(InputError, match=f"ids below vocab_size {rows}"):
        written(tmp_path, Vocabulary(content=tokenizer), rows)


def test_a_unigram_is_refused_by_name():
    with pytest.raises(InputError, match="model Unigram"):
        pre_tokenizer_name({"model": {"type": "Unigram", "byte_fallback": True}})


@pytest.mark.parametrize(("scheme", "prefix"), [("always", True), ("first", True), ("never", False)])
def test_sentencepiece_scores_are_the_ranks_of_merges(tmp_path, scheme, prefix):
    metaspace = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}
    tokenizer = sentencepiece(normalizer=None, pre_tokenizer=metaspace)
    fields = written(tmp_path, Vocabulary(content=tokenizer, special_ids={"unk": 0, "bos": 1}))
    assert fields["ggml.model"] == "llama"
    assert fields["ggml.add_space_prefix"] is prefix
    scores = dict(zip(fields["ggml.tokens"], fields["ggml.scores"], strict=True))
    first, second = ("".join(merge) for merge in tokenizer["model"]["merges"][:2])
    assert (scores[first], scores[second], scores["e"]) == (-1.0, -2.0, 0.0)
    kinds = dict(zip(fields["ggml.tokens"], fields["ggml.token_type"], strict=True))
    wanted = {"<unk>": 2, "<s>": 3, "<|end|>": 3, first: 1, "[PAD699]": 5}
    assert {token: kinds[token] for token in wanted} == wanted
    plain = {**tokenizer, "added_tokens": [a for a in tokenizer["added_tokens"] if a["content"] in SPECIAL]}
    fields = written(tmp_path, Vocabulary(content=plain))
    kinds = dict(zip(fields["ggml.tokens"], fields["ggml.token_type"], strict=True))
    assert kinds["<0x0A>"] == 6
    assert "ggml.merges" not in fields


def test_special_ids_and_templates(tmp_path):
    ids = {"bos": 1, "eos": 3, "pad": 4}
    templates = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    fields = written(tmp_path, Vocabulary(content=content("qwen2"), special_ids=ids, chat_templates=templates))
    assert (fields["ggml.bos_token_id"], fields["ggml.eos_token_id"], fields["ggml.padding_token_id"]) == (1, 3, 4)
    assert fields["chat_template"] == "{{ messages }}"
    assert fields["chat_template.tool_use"] == "{{ tools }}"
    assert fields["ggml.add_bos_token"] is False
    assert "ggml.add_eos_token" not in fields
    bare = written(tmp_path, Vocabulary(content=content("qwen2")))
    assert not any("template" in key or key.endswith("_token_id") for key in bare)


def test_begin_and_end_of_every_text(tmp_path):
    begin, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    for single, flags in (([begin, text], (True, False)), ([text, end], (False, True)), ([text], (False, False))):
        tokenizer = content("qwen2", post_processor={"type": "TemplateProcessing", "single": single})
        assert (adds_special(tokenizer, 0), adds_special(tokenizer, -1)) == flags
        fields = written(tmp_path, Vocabulary(content=tokenizer))
        assert (fields["ggml.add_bos_token"], fields.get("ggml.add_eos_token", False)) == flags


def test_ids_beyond_the_embedding_are_refused(tmp_path):
    with pytest.raises(InputError, match="below vocab_size 600"):
        written(tmp_path, Vocabulary(content=content("qwen2")), rows=600)
    with pytest.raises(InputError, match="got 900"):
        written(tmp_path, Vocabulary(content=content("qwen2"), special_ids={"pad": 900}))


def test_of_several_end_ids_the_first_is_the_files():
    assert config_special_ids({"bos_token_id": 1, "eos_token_id": [7, 8]}) == {"bos": 1, "eos": 7}
    assert config_special_ids({"bos_token_id": None, "eos_token_id": []}) == {}
    assert config_special_ids({"eos_token_id": 0}) == {"eos": 0}
