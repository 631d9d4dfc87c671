"""The tokenizer that a GGUF holds gives the ids of the one that was written into it."""

import dataclasses
import json
import textwrap
from pathlib import Path

import pytest
from tokenizers import Tokenizer

pytest.importorskip("transformers")

from exported_models import FOLDERS, TEXTS, write_folder

from q4kd.harness.__main__ import main
from q4kd.harness.inputs.published.hard_text import hard_lines
from q4kd.harness.inputs.published.tokenizers import BYTE_LEVEL, PIECES, byte_level, pieces
from q4kd.harness.subjects.export.probes_tokenizers import write_vocabulary
from q4kd.trainer.errors import InputError
from q4kd.trainer.formats.gguf import tokenizer
from q4kd.trainer.formats.gguf.tokenizer import read_tokenizer
from q4kd.trainer.formats.gguf.vocabulary import SPACE
from q4kd.trainer.formats.model_file import ModelFile
from q4kd.trainer.formats.open import open_model
from q4kd.trainer.student.model import load_tokenizer

# One folder for each kind of tokenizer.
NAMES = {kind: name for name, (_case, kind) in FOLDERS.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


def exported(folder: Path, kind: str) -> ModelFile:
    out = folder / f"{kind}.gguf"
    if not out.exists():
        source = write_folder(folder / kind, NAMES[kind])
        assert main(["export", str(source), "--format", "gguf", "--quantize", "q8_0", "--out", str(out)]) == 0
    return open_model(out)


@pytest.mark.parametrize("kind", sorted(NAMES))
def test_ids_survive_the_file(folder: Path, kind: str) -> None:
    ours = read_tokenizer(exported(folder, kind))
    theirs = load_tokenizer(folder / kind)
    for text in (*TEXTS, Path(textwrap.__file__).read_text(), "<s>a<|end|>"):
        expected = theirs(text, add_special_tokens=False, verbose=False)["input_ids"]
        assert ours.encode(text, add_special_tokens=False).ids == expected, text[:40]


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer.ggml.pre": "superbpe"},
        {"tokenizer.ggml.pre": None},
        {"tokenizer.ggml.model": "t5"},
        {"tokenizer.ggml.model": None},
        {"tokenizer.ggml.merges": ["no such pair"]},
        {"tokenizer.ggml.merges": ["single"]},
        {"tokenizer.ggml.merges": [7]},
        {"tokenizer.ggml.model": "llama"},
        {"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [1.0]},
    ],
)
def test_what_is_not_known_is_refused(folder: Path, changes: dict[str, object]) -> None:
    model = exported(folder, "qwen2")
    with pytest.raises(InputError, match="--tokenizer DIR"):
        read_tokenizer(dataclasses.replace(model, metadata={**model.metadata, **changes}))


def test_a_file_without_types_has_no_special_tokens(folder: Path) -> None:
    model = exported(folder, "qwen2")
    bare = dataclasses.replace(model, metadata={**model.metadata, "tokenizer.ggml.token_type": "none"})
    assert len(read_tokenizer(bare).encode("<|end|>").ids) > 1
    assert len(read_tokenizer(model).encode("<|end|>").ids) == 1


def test_the_highest_score_is_joined_first_whatever_the_order_of_ids(folder: Path) -> None:
    changes = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.scores": [0.0, 0.0, 0.0, 0.0, -2.0, -1.0],
        "tokenizer.ggml.token_type": [2, 1, 1, 1, 1, 1],
        "tokenizer.ggml.add_space_prefix": False,
    }
    model = exported(folder, "llama")
    small = dataclasses.replace(
        model, tokens=("<unk>", "a", "b", "c", "bc", "ab"), metadata={**model.metadata, **changes}
    )
    assert read_tokenizer(small).encode("abc").tokens == ["ab", "c"]


@pytest.mark.parametrize(
    ("longest", "words"),
    [(60, "more than 1,000 merges"), (256, "pieces of 32,896 characters together")],
)
def test_hostile_pieces_are_refused_before_their_merges_are_made(
    folder: Path, monkeypatch: pytest.MonkeyPatch, longest: int, words: str
) -> None:
    """Each of n pieces "aa…a" is made of all shorter ones, so there are n² / 2 merges."""
    monkeypatch.setattr(tokenizer, "_MAX_MERGES", 1_000)
    monkeypatch.setattr(tokenizer, "_MAX_CHARACTERS", 10_000)
    pieces = ["a" * length for length in range(1, longest + 1)]
    given = {"tokens": pieces, "scores": [0.0] * longest, "token_type": [1] * longest, "model": "llama"}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in given.items()}
    model = exported(folder, sorted(NAMES)[0])
    with pytest.raises(InputError, match=words):
        read_tokenizer(dataclasses.replace(model, tokens=pieces, metadata=metadata))
    few = {"tokens": pieces[:40], "scores": [0.0] * 40, "token_type": [1] * 40, "model": "llama"}
    small = {f"tokenizer.ggml.{key}": value for key, value in few.items()}
    assert read_tokenizer(dataclasses.replace(model, tokens=pieces[:40], metadata=small)).get_vocab_size() == 40


def test_an_unknown_token_is_recognised_and_runs_of_spaces_are_merged_first(folder: Path) -> None:
    changes = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.scores": [0.0, 0.0, -1.0, -2.0, -1000.0, -1000.0],
        "tokenizer.ggml.token_type": [2, 1, 1, 1, 4, 4],
        "tokenizer.ggml.add_space_prefix": False,
    }
    model = exported(folder, "llama")
    tokens = ("<unk>", SPACE, "a", f"{SPACE}a", "  ", "   ")
    spaced = dataclasses.replace(model, tokens=tokens, metadata={**model.metadata, **changes})
    read = read_tokenizer(spaced)
    assert read.encode("a   a a<unk>").ids == [2, 5, 2, 3, 0]
    assert read.encode(f"a{SPACE}  a").ids == [2, 5, 2]


@pytest.mark.parametrize("name", [*BYTE_LEVEL, *PIECES])
def test_ids_of_hard_text_are_those_of_the_models_own_tokenizer(tmp_path: Path, name: str) -> None:
    content = byte_level(name) if name in BYTE_LEVEL else pieces(name)
    own, read = Tokenizer.from_str(json.dumps(content)), read_tokenizer(write_vocabulary(tmp_path / "v.gguf", content))
    lines = hard_lines(2000, 23)
    wanted = [encoding.ids for encoding in own.encode_batch(lines, add_special_tokens=False)]
    assert [encoding.ids for encoding in read.encode_batch(lines)] == wanted


def test_other_names_of_one_split_read_the_same(tmp_path: Path) -> None:
    model = write_vocabulary(tmp_path / "v.gguf", byte_level("dbrx"))
    line = "0123456789 naïve"
    wanted = read_tokenizer(model).encode(line).ids
    for name in ("glm4", "chatglm-bpe"):
        model.metadata["tokenizer.ggml.pre"] = name
        assert read_tokenizer(model).encode(line).ids == wanted
