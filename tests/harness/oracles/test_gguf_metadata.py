"""The harness's own reader of a GGUF's metadata, beside the gguf package's."""

from pathlib import Path

import gguf
import pytest

from q4kd.harness.inputs.models.synthetic_models import MODELS, write_small_model
from q4kd.harness.oracles import gguf_metadata
from q4kd.harness.oracles.gguf_metadata import read_header, read_metadata
from q4kd.harness.subjects.models.headers import every_kind
from q4kd.trainer.demo import teacher_path


def test_the_demo_teacher_reads_as_by_the_gguf_package() -> None:
    fields = gguf.GGUFReader(teacher_path()).fields
    expected = {name: field.contents() for name, field in fields.items() if not name.startswith("GGUF.")}
    assert read_metadata(teacher_path()) == expected


@pytest.mark.parametrize("alignment", [None, 128])
def test_tensors_lie_where_the_gguf_package_finds_them(tmp_path: Path, alignment: int | None) -> None:
    path = tmp_path / "m.gguf"
    change = None if alignment is None else lambda writer: writer.add_custom_alignment(alignment)
    write_small_model(path, MODELS["llama3"], change=change)
    found = read_header(path)[1]
    theirs = gguf.GGUFReader(path).tensors
    assert [(one.name, one.kind, one.begin) for one in found] == [
        (one.name, one.tensor_type, one.data_offset) for one in theirs
    ]
    assert [one.shape for one in found] == [tuple(one.shape.tolist()) for one in theirs]


def test_arrays_of_every_type_read_as_by_the_gguf_package(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_small_model(path, MODELS["qwen2"], change=every_kind)
    fields = gguf.GGUFReader(path).fields
    assert read_metadata(path) == {
        key: field.contents() for key, field in fields.items() if not key.startswith("GGUF.")
    }


def test_kinds_of_tokens_are_those_of_llama_cpp() -> None:
    for kind in gguf.TokenType:
        assert getattr(gguf_metadata, kind.name) == kind


def test_what_is_no_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"GGML" + bytes(20))
    with pytest.raises(ValueError, match="no GGUF of version 3"):
        read_metadata(tmp_path / "other")
    writer = gguf.GGUFWriter(tmp_path / "twice.gguf", "qwen2")
    writer.add_uint32("a.key", 1)
    writer.add_uint32("b.key", 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    data = (tmp_path / "twice.gguf").read_bytes().replace(b"b.key", b"a.key")
    (tmp_path / "twice.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=r"a\.key comes twice"):
        read_metadata(tmp_path / "twice.gguf")
