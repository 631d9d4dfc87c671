"""``inspect`` says every part of a file that is not supported, and what would be, not the first alone."""

import json
import os
from pathlib import Path

import gguf
import numpy as np
import pytest
from model_files import write_model

from q4kd.harness.__main__ import main
from q4kd.harness.inputs.models.split_models import shards, write_split
from q4kd.trainer.demo import teacher_path
from q4kd.trainer.formats.blocks.layout import FORMATS
from q4kd.trainer.formats.families import FAMILIES
from q4kd.trainer.formats.gguf.unsupported import find_unsupported


def _foreign(writer: gguf.GGUFWriter) -> None:
    """Add two types without a decoder, three settings, two kinds of tensors, and a tokenizer nobody knows."""
    rows = np.zeros((32, 64), np.float32)
    for name, dtype in (("ffn_gate_inp", np.int16), ("ffn_gate_up", np.int16), ("attn_sinks", np.int8)):
        writer.add_tensor(f"blk.0.{name}.weight", np.zeros((32, 64), dtype))
    writer.add_tensor("blk.1.ffn_gate_inp.weight", rows)
    writer.add_tensor("per_layer_token_embd.weight", rows)
    writer.add_string("brandnew.rope.scaling.type", "yarn")
    writer.add_float32("brandnew.final_logit_softcapping", 30.0)
    writer.add_uint32("brandnew.attention.sliding_window", 64)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("brandnew-bpe")
    writer.add_token_list(["a", "b"])


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    return write_model(tmp_path / "m.gguf", _foreign, architecture="brandnew")


def test_every_part_is_named_with_what_would_be_taken(foreign: Path) -> None:
    found = {(part.part, part.found): part.supported for part in find_unsupported(foreign)}
    types = ", ".join(FORMATS)
    assert found.pop(("architecture", "'brandnew'")) == ", ".join(FAMILIES)
    assert found.pop(("tensor type", "I16 in 2 tensors")) == found.pop(("tensor type", "I8 in 1 tensor")) == types
    assert "none" in found.pop(("setting", "brandnew.rope.scaling.type 'yarn'"))
    assert found.pop(("setting", "brandnew.final_logit_softcapping 30.0")) == "0.0"
    assert found.pop(("setting", "brandnew.attention.sliding_window 64 of 128 positions")) == "full attention"
    assert "gpt2 with pre-tokenizer" in found.pop(("tokenizer", "'gpt2' with 'brandnew-bpe'"))
    assert {name for _part, name in found} == {
        "blk.N.ffn_gate_inp.weight in 2 layers",
        "blk.N.ffn_gate_up.weight",
        "blk.N.attn_sinks.weight",
        "per_layer_token_embd.weight",
    }
    assert {part for part, _name in found} == {"tensor"}


def test_inspect_says_them_all_and_exits_with_2(foreign: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(foreign)]) == 2
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 12 and "blk.N.ffn_gate_inp.weight in 2 layers; supported: " in said.out
    assert said.err.count("\n") == 1 and "architecture 'brandnew' and tensor type I16 in 2 tensors and " in said.err
    assert main(["inspect", str(foreign), "--json"]) == 2
    listed = json.loads(capsys.readouterr().out)["unsupported"]
    assert len(listed) == 11 and all(set(part) == {"part", "found", "supported"} for part in listed)


def test_a_split_model_is_looked_at_whole(foreign: Path) -> None:
    write_split(foreign.parent / "split", foreign, tensors=4)
    paths = shards(foreign.parent / "split")
    assert find_unsupported(paths[-1]) == find_unsupported(foreign)


def test_one_part_keeps_its_own_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def windowed(writer: gguf.GGUFWriter) -> None:
        writer.add_sliding_window(64)

    assert main(["inspect", str(write_model(tmp_path / "m.gguf", windowed))]) == 2
    said = capsys.readouterr()
    assert "attention beyond the window would be silently wrong" in said.err
    # Such a file has no tokenizer, and that is named beside what stands in the way.
    assert [line.split()[0] for line in said.out.splitlines()[1:]] == ["setting", "tokenizer"]


def test_dimensions_and_companions_are_named(tmp_path: Path) -> None:
    def partial(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_dimension_count(8)
        writer.add_type("adapter")

    parts = [(part.part, part.found) for part in find_unsupported(write_model(tmp_path / "m.gguf", partial))]
    assert ("kind of file", "'adapter'") in parts and ("qwen2.rope.dimension_count", "8") in parts


def test_a_file_that_is_supported_or_none_has_no_such_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert find_unsupported(teacher_path()) == []
    (tmp_path / "text.gguf").write_text("no model at all")
    os.mkfifo(tmp_path / "pipe.gguf")
    for name in ("text.gguf", "pipe.gguf", "gone.gguf", "."):
        assert main(["inspect", str(tmp_path / name)]) == 2
        said = capsys.readouterr()
        assert not said.out and said.err.count("\n") == 1


def test_many_parts_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def many(writer: gguf.GGUFWriter) -> None:
        for number in range(40):
            writer.add_uint32(f"qwen2.new{number}", 1)

    assert main(["inspect", str(write_model(tmp_path / "m.gguf", many))]) == 2
    said = capsys.readouterr()
    assert "  and 17 more; --json lists all" in said.out and "and 34 more; name a file" in said.err


@pytest.mark.parametrize(("kind", "pre"), [("t5", None), ("bert", None), ("rwkv", None), ("gpt2", "superbpe")])
def test_the_tokenizer_of_a_teacher_is_named_where_it_is_not_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str, pre: str | None
) -> None:
    def named(writer: gguf.GGUFWriter) -> None:
        writer.add_tokenizer_model(kind)
        writer.add_token_list([f"t{number}" for number in range(40)])
        if pre:
            writer.add_tokenizer_pre(pre)

    path = write_model(tmp_path / "m.gguf", named)
    assert main(["inspect", str(path)]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.split()[:4] == ["tokenizer", repr(kind), "with", repr(pre)] and "supported: gpt2 with pre-token" in line
    assert main(["inspect", str(path), "--json"]) == 0
    assert [part["part"] for part in json.loads(capsys.readouterr().out)["unsupported"]] == ["tokenizer"]
    capsys.readouterr()
    assert main(["inspect", str(teacher_path())]) == 0
    assert "not read" not in capsys.readouterr().out
