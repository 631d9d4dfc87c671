"""llama.cpp cuts text as the tokenizers whose files name its splits do, on 10,000 lines of hard text."""

import json
import re
import unicodedata
from pathlib import Path
from typing import Any

import gguf
import pytest

llama_cpp: Any = pytest.importorskip("llama_cpp")

from tokenizers import Tokenizer  # noqa: E402

from q4kd.harness.inputs.published.hard_text import hard_lines  # noqa: E402
from q4kd.harness.inputs.published.tokenizers import BYTE_LEVEL, PIECES, byte_level, pieces  # noqa: E402
from q4kd.harness.subjects.export.probes_tokenizers import write_vocabulary  # noqa: E402
from q4kd.trainer.formats.gguf.added_tokens import name_for  # noqa: E402
from q4kd.trainer.formats.gguf.tokenizer import read_tokenizer  # noqa: E402
from q4kd.trainer.formats.gguf.vocabulary import Vocabulary, add_vocabulary  # noqa: E402

LINES = 10_000
# llama.cpp 0.3.36 (binding) tells letters from marks by its own rule in these two splits.
WITHOUT_MARKS = ("gpt-4o", "tekken")
# Its tables of Unicode are others than those of tokenizers: of a character that one alone knows these splits differ.
BY_KIND = (*WITHOUT_MARKS, "deepseek-v3")
# An added token of Phi-3 takes the spaces after it; llama.cpp takes those of ASCII for spaces, and no other.
OTHER_SPACE = re.compile(r">\s*[^\S \t\n\v\f\r]")


def write_tokenizer(path: Path, content: dict[str, Any]) -> None:
    """Write a model of a tokenizer alone, which llama.cpp loads with ``vocab_only``."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name_for("model", content))
    for size in ("block_count", "context_length", "embedding_length", "feed_forward_length", "head_count"):
        getattr(writer, f"add_{size}")(1)
    writer.add_layer_norm_rms_eps(1e-5)
    rows = 1 + max(*content["model"]["vocab"].values(), *(added["id"] for added in content["added_tokens"]))
    special = dict.fromkeys(("bos", "eos"), next(a["id"] for a in content["added_tokens"] if a["content"] == "<s>"))
    add_vocabulary(writer, Vocabulary(content=content, special_ids=special), rows)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def is_told_alike(name: str, line: str) -> bool:
    """Return whether llama.cpp knows the kinds of a line's characters, which change with the version of Unicode."""
    kinds = {unicodedata.category(character) for character in line}
    if name == "Phi-3" and OTHER_SPACE.search(line):
        return False
    return not (name in BY_KIND and "Cn" in kinds) and not (name in WITHOUT_MARKS and kinds & {"Mn", "Mc", "Me"})


@pytest.mark.parametrize("name", [*BYTE_LEVEL, *PIECES])
def test_llama_cpp_gives_the_ids_of_the_models_own_tokenizer(tmp_path: Path, name: str) -> None:
    content = byte_level(name) if name in BYTE_LEVEL else pieces(name)
    path = tmp_path / "v.gguf"
    write_tokenizer(path, content)
    engine = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    own = Tokenizer.from_str(json.dumps(content))
    # llama.cpp does not compose characters.
    composed = [unicodedata.normalize("NFC", line) for line in hard_lines(LINES, 31)]
    lines = [line for line in composed if is_told_alike(name, line)]
    assert len(lines) > LINES // 2
    lines += ["a\n\n\n\n\nb", "\n" * 12, "x" + "\n" * 8 + "y"]
    wanted = [encoding.ids for encoding in own.encode_batch(lines, add_special_tokens=False)]
    found = [engine.tokenize(line.encode(), add_bos=False, special=True) for line in lines]
    assert [line for line, ids, right in zip(lines, found, wanted, strict=True) if ids != right] == []
    read = read_tokenizer(write_vocabulary(tmp_path / "ours.gguf", content))
    assert [one.ids for one in read.encode_batch(lines)] == wanted
    engine.close()
