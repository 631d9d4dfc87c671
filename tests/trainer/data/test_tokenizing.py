"""What begins a text, and a completion that goes on in its prompt, with tokenizers of both kinds."""

from collections.abc import Sequence
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from q4kd.trainer.data.documents import Document
from q4kd.trainer.data.encoding import DocumentEncoder
from q4kd.trainer.data.tokenizing import begin_tokens, continuing, describe_begin, file_begin, tokens_with_rows
from q4kd.trainer.demo import student_path
from q4kd.trainer.errors import InputError
from q4kd.trainer.student.model import encoder, load_tokenizer

_PIECES = ("▁return", "return", "▁2", "2", "+", "=", "4", "▁4", "(", "▁(", "x", "▁x", ")", "▁", "a", "▁a", "b")
_BYTES = tuple(f"<0x{value:02X}>" for value in range(256))


def sentencepiece(begins: bool = True) -> Any:
    """Return a tokenizer that puts a space before every text, as Llama 2's and Mistral's do."""
    vocab = {piece: number for number, piece in enumerate(("<unk>", "<s>", "</s>", *_BYTES, *_PIECES, *"▁retun"))}
    vocab = {piece: number for number, piece in enumerate(dict.fromkeys(vocab))}
    whole, merges = "return", []
    for length in range(2, len(whole) + 1):
        vocab.setdefault(whole[:length], len(vocab))
        merges.append((whole[: length - 1], whole[length - 1]))
    merges += [("▁", piece) for piece in ("return", "2", "4", "(", "x", "a")]
    bpe = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def encoded(tokenizer: Any, documents: Sequence[Document], begin: str = "auto", **options: bool) -> list[list[int]]:
    encode = encoder(tokenizer)
    made = DocumentEncoder(
        encode,
        tokenizer.eos_token_id,
        begin=begin_tokens(tokenizer, begin),
        continue_text=continuing(tokenizer, encode),
        **options,
    )
    return [found.ids.tolist() for found in made.encode(documents)]


@pytest.mark.parametrize(
    ("begins", "setting", "begin"),
    [
        (True, "auto", (1,)),
        (False, "auto", ()),
        (True, "false", ()),
        (False, "true", (1,)),
        (True, "true", (1,)),
    ],
)
def test_texts_begin_as_the_tokenizer_or_the_setting_says(begins: bool, setting: str, begin: tuple[int, ...]) -> None:
    tokenizer = sentencepiece(begins)
    assert begin_tokens(tokenizer, setting) == begin
    plain = tokenizer("2+2=", add_special_tokens=False)["input_ids"]
    text, pair = encoded(tokenizer, [Document("1", "2+2="), Document("2", "2+2=", completion="4")], setting)
    assert text == [*begin, *plain, tokenizer.eos_token_id]
    assert pair == [*begin, *plain, tokenizer.convert_tokens_to_ids("4"), tokenizer.eos_token_id]


def test_a_text_that_spells_the_token_has_it_once() -> None:
    tokenizer = sentencepiece()
    (text,) = encoded(tokenizer, [Document("1", "<s>x")])
    assert text.count(1) == 1


def test_a_tokenizer_without_the_token_is_refused_where_it_is_asked_for() -> None:
    tokenizer = load_tokenizer(student_path())
    assert begin_tokens(tokenizer, "auto") == ()
    tokenizer.bos_token = None
    with pytest.raises(InputError, match="begin_of_text"):
        begin_tokens(tokenizer, "true")


@pytest.mark.parametrize(("prompt", "completion"), [("2+2=", "4"), ("return", "(x)"), ("a", " x"), ("a", "\n\nx")])
def test_no_space_is_put_before_a_completion(prompt: str, completion: str) -> None:
    tokenizer = sentencepiece()
    (ids,) = encoded(tokenizer, [Document("1", prompt, completion=completion)], completion_only=True)
    assert tokenizer.decode(ids[1:-1]) == prompt + completion


def test_a_byte_level_tokenizer_is_asked_as_it_is() -> None:
    tokenizer = load_tokenizer(student_path())
    encode = encoder(tokenizer)
    assert continuing(tokenizer, encode) is encode


@pytest.mark.parametrize("decodes", [True, False])
def test_a_vocabulary_of_few_letters_is_asked_as_it_is(decodes: bool) -> None:
    """What it cannot say, or does not give back, is no sign that it puts something before a text."""
    letters = Tokenizer(models.BPE({letter: number for number, letter in enumerate("abmpo")}, []))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    if decodes:
        letters.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, eos_token="a")
    encode = encoder(tokenizer)
    assert continuing(tokenizer, encode) is encode


@pytest.mark.parametrize(
    ("metadata", "begin"),
    [
        ({"model": "llama", "bos_token_id": 1}, 1),
        ({"model": "llama", "bos_token_id": 1, "add_bos_token": False}, None),
        ({"model": "gpt2", "pre": "llama-bpe", "bos_token_id": 5}, 5),
        ({"model": "gpt2", "pre": "qwen2", "bos_token_id": 5}, None),
        ({"model": "gpt2", "pre": "qwen2", "bos_token_id": 5, "add_bos_token": True}, 5),
        ({"model": "gpt2", "add_bos_token": True}, None),
        ({"model": "gpt2", "add_bos_token": True, "bos_token_id": -1}, None),
    ],
)
def test_what_a_file_wants_before_a_text(metadata: dict[str, Any], begin: int | None) -> None:
    assert file_begin({f"tokenizer.ggml.{key}": value for key, value in metadata.items()}) == begin


def test_it_is_said_where_tokenizer_and_teacher_differ() -> None:
    tokenizer = sentencepiece()
    wants = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.bos_token_id": 1}
    assert describe_begin(tokenizer, [1], "auto", wants) == (
        "begin of text: <s> (1), before every text and prompt (as the tokenizer puts it)"
    )
    assert "teacher's file wants <s> (1)" in describe_begin(tokenizer, [], "auto", wants)
    assert "teacher's file wants none" in describe_begin(tokenizer, [1], "auto", {"tokenizer.ggml.model": "gpt2"})
    assert not describe_begin(tokenizer, [], "auto", None)
    assert "begin_of_text false" in describe_begin(tokenizer, [], "false", None)


def test_special_tokens_past_the_rows_are_left_out_and_texts_with_one_refused() -> None:
    tokenizer = load_tokenizer(student_path())
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.add_tokens(["<plain>"])
    assert set(tokenizer.get_vocab()) - set(tokens_with_rows(tokenizer, rows)) == {"<image>"}
    assert tokens_with_rows(tokenizer, rows + 2) == tokenizer.get_vocab()
    documents = DocumentEncoder(encoder(tokenizer), 0, vocab_size=rows)
    with pytest.raises(InputError, match=f"token ids from 0 to {rows - 1}"):
        list(documents.encode([Document("d:1", "see <image>")]))
