"""A GGUF header is read as the gguf package reads it, decodes nothing that is not asked for, and has bounds."""

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from model_files import write_model

from q4kd.harness.inputs.demo import GOLDEN_TEACHER
from q4kd.harness.inputs.models.synthetic_models import MODELS, write_small_model
from q4kd.trainer.demo import teacher_path
from q4kd.trainer.errors import InputError
from q4kd.trainer.formats.gguf.header import MAX_STRINGS, Header, read_header
from q4kd.trainer.formats.gguf.metadata import MetadataArray
from q4kd.trainer.formats.open import open_model
from q4kd.trainer.mapped import MappedFile

_V = gguf.GGUFValueType
_SCALARS = {
    "UINT8": 200, "INT8": -7, "UINT16": 60_000, "INT16": -30_000, "UINT32": 1 << 31, "INT32": -(1 << 31),
    "UINT64": 1 << 63, "INT64": -(1 << 63), "FLOAT32": 0.1, "FLOAT64": 0.1, "BOOL": True, "STRING": "ä\u2581€😀",
}  # fmt: skip


def header_of(path: Path) -> Header:
    return read_header(path, MappedFile(path).data)


def plain(value: Any) -> Any:
    return list(value) if isinstance(value, MetadataArray) else value


def same_as_the_package(path: Path) -> Header:
    """Compare everything that a header says with what the gguf package reads."""
    header, reader = header_of(path), gguf.GGUFReader(path)
    theirs = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert {key: plain(value) for key, value in header.metadata.items()} == theirs
    assert [type(plain(value)) for value in header.metadata.values()] == [type(value) for value in theirs.values()]
    for entry, tensor in zip(header.tensors, reader.tensors, strict=True):
        assert (entry.name, entry.type_id) == (tensor.name, tensor.tensor_type)
        assert entry.shape == tuple(reversed(tensor.shape.tolist()))
        assert header.data_start + entry.offset == tensor.data_offset
    assert header.alignment == reader.alignment
    return header


def _every_type(writer: gguf.GGUFWriter) -> None:
    for kind, value in _SCALARS.items():
        writer.add_key_value(f"x.{kind}", value, _V[kind])
        writer.add_key_value(f"x.{kind}s", [value] * 3, _V.ARRAY, _V[kind])
    writer.add_array("x.texts", ["", "a", "b" * 300, "", "\u2581c"])


def test_every_type_is_read_as_the_gguf_package_does(tmp_path: Path) -> None:
    header = same_as_the_package(write_model(tmp_path / "m.gguf", _every_type))
    assert header.metadata["x.FLOAT32"] == float(np.float32(0.1))
    assert header.metadata["x.STRINGs"][1:] == ["ä\u2581€😀"] * 2 and header.metadata["x.STRINGs"].holds_strings
    assert list(header.metadata["x.BOOLs"]) == [True] * 3 and not header.metadata["x.BOOLs"].holds_strings


def test_committed_and_generated_files_are_read_as_the_gguf_package_does(tmp_path: Path) -> None:
    same_as_the_package(GOLDEN_TEACHER)
    demo = same_as_the_package(teacher_path())
    assert len(demo.metadata["tokenizer.ggml.merges"]) > 1000
    for name, model in MODELS.items():
        write_small_model(tmp_path / f"{name}.gguf", model)
        same_as_the_package(tmp_path / f"{name}.gguf")


@pytest.mark.parametrize("alignment", [8, 64, 4096])
def test_another_alignment_is_followed(tmp_path: Path, alignment: int) -> None:
    def align(writer: gguf.GGUFWriter) -> None:
        writer.add_custom_alignment(alignment)

    path = write_model(tmp_path / "m.gguf", align)
    assert same_as_the_package(path).alignment == alignment
    assert open_model(path).config.vocab_size == 40


# --- Hostile headers: made by hand, since no writer makes them. ---


def _text(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def _array(key: str, kind: int, count: int, body: bytes) -> bytes:
    return _text(key.encode()) + struct.pack("<IIQ", 9, kind, count) + body


def _scalar(key: str, kind: int, body: bytes) -> bytes:
    return _text(key.encode()) + struct.pack("<I", kind) + body


_QWEN2 = _scalar("general.architecture", 8, _text(b"qwen2"))


def _file(path: Path, *pairs: bytes, tensors: bytes = b"", num_tensors: int = 0, version: bytes = b"\3\0\0\0") -> Path:
    path.write_bytes(b"GGUF" + version + struct.pack("<QQ", num_tensors, len(pairs)) + b"".join(pairs) + tensors)
    return path


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ([_array("a", 8, 3, struct.pack("<Q", 1 << 63))], "3 strings in 'a', got one that does not end"),
        ([_array("a", 8, 1, struct.pack("<Q", 100))], "1 strings in 'a', got one that does not end"),
        ([_array("a", 8, 2, _text(b"x"))], "2 strings in 'a', got one that does not end"),
        ([_array("a", 8, 1 << 40, b"")], "at most 4000000 entries"),
        (
            [_array("a", 8, MAX_STRINGS, b"\0" * 8 * MAX_STRINGS), _array("b", 8, 1, _text(b""))],
            "in arrays, got 2000001",
        ),
        ([_array("a", 12, 3, b"\0" * 20)], "24 bytes of a, got 20 bytes left"),
        ([_array("a", 9, 1, b"\0" * 12)], "entries of type 9 for 'a'"),
        ([_scalar("a", 13, b"\0" * 8)], "a known metadata type, got type 13"),
        ([_scalar("a", 8, struct.pack("<Q", 1 << 40))], "at most 16777216 bytes of a"),
        ([_scalar("a", 8, _text(b"\xff"))], "UTF-8 in a"),
        ([_scalar("a\x1b[31m", 4, b"\0" * 4)], "printable"),
        ([_scalar("k" * 5000, 4, b"\0" * 4)], "at most 4096 bytes of a metadata key"),
        ([_scalar("general.alignment", 4, struct.pack("<I", 0))], "a power of two"),
        ([_scalar("general.alignment", 4, struct.pack("<I", 48))], "a power of two"),
        ([_scalar("general.alignment", 4, struct.pack("<I", 1 << 31))], "a power of two"),
        ([_scalar("general.alignment", 8, _text(b"32"))], "a power of two"),
        ([_QWEN2, _QWEN2], "twice"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, pairs: list[bytes], words: str) -> None:
    with pytest.raises(InputError, match="at byte") as caught:
        header_of(_file(tmp_path / "m.gguf", *pairs))
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": b"\0\0\0\3"}, "version 3, big-endian"),
        ({"version": b"\1\0\0\0"}, "version 1"),
        ({"version": b"\4\0\0\0"}, "version 4"),
        ({"num_tensors": 1 << 60}, "at most 65536 tensors"),
        ({"num_tensors": 1, "tensors": _text(b"t") + struct.pack("<I", 5)}, "1 to 4 dimensions"),
        ({"num_tensors": 1, "tensors": _text(b"t") + struct.pack("<IQQ", 2, 1 << 40, 1 << 40)}, "plausible element"),
    ],
)
def test_a_head_that_makes_no_sense_is_named(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as caught:
        header_of(_file(tmp_path / "m.gguf", _QWEN2, **change))
    assert words in str(caught.value)


def _tensor(name: str, *shape: int) -> bytes:
    return _text(name.encode()) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, 0, 0)


@pytest.mark.parametrize(
    ("largest", "larger", "words"),
    [
        ([_scalar("k" * 1024, 4, bytes(4))], [_scalar("k" * 1025, 4, bytes(4))], "at most 1024 characters"),
        (
            [_scalar("\u4e00" * 1024, 4, bytes(4))],
            [_scalar("k" * 4097, 4, bytes(4))],
            "at most 4096 bytes of a metadata",
        ),
        ([_tensor("t" * 256, 1)], [_tensor("t" * 257, 1)], "at most 256 characters"),
        ([_tensor("t", 1, 1, 1, 1)], [_tensor("t", 1, 1, 1, 1, 1)], "1 to 4 dimensions"),
        ([_tensor("t", (1 << 48) - 1)], [_tensor("t", 1 << 24, 1 << 24)], "a plausible element count"),
        (
            [_scalar("general.alignment", 4, struct.pack("<I", 1 << 20))],
            [_scalar("general.alignment", 4, struct.pack("<I", 1 << 21))],
            "a power of two up to 1048576",
        ),
        (
            [_array("a", 0, 4_000_000, bytes(4_000_000))],
            [_array("a", 0, 4_000_001, bytes(4_000_001))],
            "at most 4000000 entries",
        ),
        (
            [_scalar("a", 8, _text(bytes(1 << 24)))],
            [_scalar("a", 8, _text(bytes((1 << 24) + 1)))],
            "at most 16777216 bytes of a",
        ),
    ],
    ids=["key", "key in bytes", "name", "dimensions", "elements", "alignment", "entries", "text"],
)
def test_what_is_largest_is_read_and_what_is_larger_is_refused(
    tmp_path: Path, largest: list[bytes], larger: list[bytes], words: str
) -> None:
    def head(pairs: list[bytes]) -> Path:
        tensors = pairs if words.startswith(("at most 256", "1 to 4", "a plausible")) else []
        keys = [] if tensors else pairs
        return _file(tmp_path / "m.gguf", *keys, tensors=b"".join(tensors), num_tensors=len(tensors))

    header = header_of(head(largest))
    assert len(header.metadata) + len(header.tensors) == 1
    with pytest.raises(InputError, match=words):
        header_of(head(larger))


def test_as_many_keys_and_tensors_as_may_be_are_read(tmp_path: Path) -> None:
    keys = [_scalar(f"{n}", 0, b"\1") for n in range(65_537)]
    tensors = [_tensor(f"{n}", 1) for n in range(65_536)]
    path = tmp_path / "m.gguf"
    header = header_of(_file(path, *keys[:-1], tensors=b"".join(tensors), num_tensors=65_536))
    assert len(header.metadata) == len(header.tensors) == 65_536
    for many in (_file(path, *keys), _file(path, num_tensors=65_537)):
        with pytest.raises(InputError, match="at most 65536 tensors and 65536 keys"):
            header_of(many)


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        (_array("tokenizer.ggml.tokens", 8, 1_000_000, b"\0" * 8_000_000), "no tensor"),
        (_array("qwen2.new", 8, 1_000_000, b"\0" * 8_000_000), "an array of 1000000 strings"),
        (_array("qwen2.new", 7, 4_000_000, b"\1" * 4_000_000), "an array of 4000000 truth values"),
        (_array("general.type", 1, 4_000_000, b"\1" * 4_000_000), "an array of 4000000 numbers"),
        (_array("split.count", 7, 4_000_000, b"\1" * 4_000_000), "an array of 4000000 truth values"),
    ],
)
def test_a_large_array_costs_no_object_an_entry(tmp_path: Path, pair: bytes, words: str) -> None:
    path = _file(tmp_path / "m.gguf", _QWEN2, pair)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=words):
            open_model(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # An empty string that is met costs the four bytes of its end, twice while their list grows.
    assert peak < 12_000_000


def test_an_architecture_is_refused_without_its_vocabulary_decoded(tmp_path: Path) -> None:
    pairs = (_scalar("general.architecture", 8, _text(b"gemma9")), _array("a", 8, 2, _text(b"\xff") + _text(b"b")))
    path = _file(tmp_path / "m.gguf", *pairs)
    with pytest.raises(InputError, match="got 'gemma9'"):
        open_model(path)
    with pytest.raises(InputError, match=r"m\.gguf: a: expected strings in UTF-8"):
        list(header_of(path).metadata["a"])


# --- Where the tensors lie ---


def _moved(path: Path, name: str, move: Callable[[int], int]) -> Path:
    """Change the offset of a tensor in a file's header."""
    data = bytearray(path.read_bytes())
    at = data.index(_text(name.encode())) + 8 + len(name)
    at += 4 + 8 * int(struct.unpack_from("<I", data, at)[0]) + 4
    struct.pack_into("<Q", data, at, move(int(struct.unpack_from("<Q", data, at)[0])))
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("name", "move", "words"),
    [
        ("blk.0.ffn_up.weight", lambda at: at - 96 * 64 * 4, "on the bytes of another tensor"),
        ("blk.0.ffn_up.weight", lambda at: 0, "on the bytes of another tensor"),
        ("blk.0.ffn_up.weight", lambda at: at + 32, "a gap of 32 bytes"),
        ("blk.0.ffn_up.weight", lambda at: at + 4, "not a multiple of the alignment, 32"),
        ("token_embd.weight", lambda at: 64, "a gap of 64 bytes"),
        ("blk.0.ffn_down.weight", lambda at: at - 32, "on the bytes of another tensor"),
        ("blk.0.ffn_down.weight", lambda at: at + (1 << 63), "within the file's"),
    ],
)
def test_a_tensor_begins_where_the_one_before_it_ends(
    tmp_path: Path, name: str, move: Callable[[int], int], words: str
) -> None:
    path = write_model(tmp_path / "m.gguf")
    assert open_model(path).tensors[name].num_bytes
    with pytest.raises(InputError, match=f"tensor {name}") as caught:
        open_model(_moved(path, name, move))
    assert words in str(caught.value)


def test_tensors_in_another_order_than_their_data_are_refused(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf")
    offsets = {entry.name: entry.offset for entry in header_of(path).tensors}
    pair = ("blk.0.attn_q.weight", "blk.0.attn_output.weight")
    for name, other in (pair, pair[::-1]):
        _moved(path, name, lambda _at, other=other: offsets[other])  # type: ignore[misc]
    with pytest.raises(InputError, match="tensor blk"):
        open_model(path)


@pytest.mark.parametrize(
    ("type_id", "words"),
    [
        (9, "Q8_1"),
        (15, "Q8_K"),
        (26, "I32"),
        (42, "type number 42, which is newer"),
        (4, "type number 4, which is newer"),
    ],
)
def test_a_type_that_is_not_computed_is_named(tmp_path: Path, type_id: int, words: str) -> None:
    path = write_model(tmp_path / "m.gguf")
    data = bytearray(path.read_bytes())
    at = data.index(_text(b"blk.0.attn_q.weight")) + 8 + 19
    struct.pack_into("<I", data, at + 4 + 16, type_id)
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"tensor blk\.0\.attn_q\.weight: expected type Q4_K") as caught:
        open_model(path)
    assert f"got {words}" in str(caught.value)
