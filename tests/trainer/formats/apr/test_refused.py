"""Files that look like .apr and must not be read as such: refused in one clear line; mutated ones refused or valid."""

import json
import random
import re
import struct
import time
import zlib
from pathlib import Path

import pytest
from apr_checks import EMBEDDING, Change, opened, refusal
from apr_files import Q4_K, AprImage, Entry, seal, tiny_metadata, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from q4kd.harness.__main__ import main
from q4kd.trainer.errors import InputError
from q4kd.trainer.formats.apr import header as apr_header
from q4kd.trainer.formats.open import open_model

# --- what is refused ---


def field(name: str, value: int) -> Change:
    return lambda image: image.forged.update({name: value})


def attribute(name: str, value: object) -> Change:
    return lambda image: setattr(image, name, value)


def entry(name: str, attribute_name: str, value: object) -> Change:
    return lambda image: setattr(image.entry(name), attribute_name, value)


def added(*entries: Entry) -> Change:
    return lambda image: image.entries.extend(entries)


def stated(**metadata: object) -> Change:
    return lambda image: image.metadata.update(metadata)  # type: ignore[union-attr]


def unsorted(image: AprImage) -> None:
    image.sort = False
    image.entries.sort(key=lambda each: each.name, reverse=True)


def cut_index(image: AprImage) -> None:
    """Let the data start inside the index, where the tensor count still seems to fit."""
    index_offset = struct.unpack_from("<Q", image.build(), 24)[0]
    image.forged["data_offset"] = index_offset + 512


def text(raw: bytes) -> Change:
    return attribute("metadata", raw)


REFUSED: list[tuple[str, Change, tuple[str, ...]]] = [
    ("APR2", attribute("magic", b"APR2"), ("version 1", "APR2")),
    ("APRN", attribute("magic", b"APRN"), ("version 1", "APRN")),
    ("major version", attribute("version", (3, 0)), ("version", "3.0")),
    ("minor version", attribute("version", (2, 1)), ("version", "2.1")),
    ("column-major", attribute("flags", 2048), ("flags", "column-major")),
    ("both layouts", attribute("flags", 2048 | 1024), ("flags", "column-major")),
    ("encrypted", attribute("flags", 4), ("flags", "encrypted")),
    ("sharded", attribute("flags", 16), ("flags", "shard")),
    ("LZ4", attribute("flags", 1), ("flags", "LZ4")),
    ("zstd", attribute("flags", 2), ("flags", "zstd")),
    ("unknown flag", attribute("flags", 4096), ("flags", "0x1000")),
    ("header checksum", attribute("header_checksum", 7), ("header checksum", "00000007")),
    ("footer", attribute("footer", 7), ("footer CRC-32", "00000007")),
    ("metadata in the header", field("metadata_offset", 16), ("sections",)),
    ("metadata past the end", field("metadata_offset", 1 << 40), ("sections",)),
    ("metadata overflow", field("metadata_offset", (1 << 64) - 1), ("sections",)),
    ("metadata over the index", field("metadata_size", 4000), ("sections",)),
    ("metadata of 17 MiB", field("metadata_size", 17 << 20), ("metadata", "16 MiB")),
    ("index in the metadata", field("index_offset", 128), ("sections",)),
    ("index past the end", field("index_offset", 1 << 63), ("sections",)),
    ("index over the data", field("data_offset", 576), ("tensor count",)),
    ("data past the end", field("data_offset", 1 << 62), ("sections",)),
    ("no tensors", field("tensor_count", 0), ("token_embd.weight",)),
    ("absurd tensor count", field("tensor_count", 0xFFFFFFFF), ("tensor count", "4294967295")),
    ("one tensor too many", field("tensor_count", 15), ("a tensor name of 1 to 256 bytes",)),
    ("not JSON", text(b"{'a': 1}"), ("metadata", "JSON")),
    ("not UTF-8", text(b'{"a": "\xff\xff"}'), ("metadata", "JSON")),
    ("empty metadata", text(b""), ("metadata", "JSON")),
    ("not an object", text(b"[1]"), ("metadata", "a JSON object", "list")),
    ("duplicate key", text(b'{"a": 1, "a": 1}'), ("metadata", "duplicate key")),
    ("NaN", text(b'{"rope_theta": NaN}'), ("metadata", "NaN")),
    ("deep metadata", text(b"[" * 100_000 + b"]" * 100_000), ("metadata", "JSON")),
    ("giant metadata", text(b"[" + b"[[]]," * 1_000_000 + b"1]"), ("metadata", "2000000 items")),
    ("architecture", stated(architecture="mamba"), ("architecture", "mamba")),
    ("no architecture", stated(architecture=None), ("architecture", "None")),
    ("architecture of another kind", stated(architecture={"a": 1}), ("architecture", "dict")),
    ("two architectures", stated(hf_model_type="llama"), ("hf_model_type", "llama")),
    ("missing size", stated(hidden_size=None), ("embedding_length", "nothing")),
    ("negative size", stated(num_layers=-1), ("block_count", "-1")),
    ("huge size", stated(num_heads=10**30), ("head_count", "1000000")),
    ("fractional size", stated(num_layers=1.5), ("num_layers", "1.5")),
    ("true as a size", stated(num_layers=True), ("num_layers", "True")),
    ("text as a size", stated(hidden_size="256\n"), ("hidden_size", "an integer")),
    ("nested size", stated(hidden_size=[[256]]), ("hidden_size", "list value")),
    ("infinite base", text(json.dumps(tiny_metadata()).replace("1000000.0", "1e999").encode()), ("freq_base", "inf")),
    ("rope_type", stated(rope_type=1), ("rope_type", "1")),
    ("rope_type of another kind", stated(rope_type=[0]), ("rope_type", "list value")),
    ("rope_type of 4,000 digits", stated(rope_type=10**4000), ("rope_type", "int value")),
    ("rope_scaling", stated(rope_scaling={"rope_type": "yarn"}), ("rope_scaling", "yarn")),
    ("experts", stated(num_experts=8), ("num_experts", "8")),
    ("activation", stated(hidden_act="gelu"), ("hidden_act", "gelu")),
    ("sliding window", stated(sliding_window=16), ("sliding_window", "16")),
    ("shards in the metadata", stated(sharding={"shard_count": 3}), ("sharding", "shard")),
    ("surrogate in a token", stated(vocab=["\ud800"]), ("vocab", "surrogate")),
    ("layers without tensors", stated(num_layers=2), ("blk.1.",)),
    ("another size than the tensors'", stated(intermediate_size=4), ("ffn_",)),
    ("unknown tensor", added(Entry(b"extra", 0, (1,), bytes(4))), ("extra",)),
    ("name twice", added(Entry(b"a", 0, (1,), bytes(4)), Entry(b"a", 0, (1,), bytes(4))), ("each name once",)),
    ("both names of one tensor", added(Entry(b"output_norm.weight", 0, (256,), bytes(1024))), ("output_norm", "twice")),
    ("unsorted", unsorted, ("sorted by name",)),
    ("name of 257 bytes", added(Entry(b"x" * 257, 0, (1,), bytes(4))), ("256 bytes", "257")),
    ("no name", added(Entry(b"", 0, (1,), bytes(4))), ("tensor name", "got 0")),
    ("name not UTF-8", added(Entry(b"\xff\xfe", 0, (1,), bytes(4))), ("UTF-8",)),
    ("line break in a name", added(Entry(b"a\nb", 0, (1,), bytes(4))), ("printable",)),
    ("nine dimensions", entry(EMBEDDING, "shape", (3, 256, *[1] * 7)), ("1 to 8 dimensions", "9")),
    ("no dimension", entry(EMBEDDING, "shape", ()), ("1 to 8 dimensions", "0")),
    ("zero rows", entry(EMBEDDING, "shape", (0, 256)), ("positive dimensions",)),
    ("overflowing shape", entry(EMBEDDING, "shape", ((1 << 64) - 1, 1 << 63)), ("bytes for Q4_K",)),
    ("shape of another size", entry(EMBEDDING, "shape", (4, 256)), ("576 bytes for Q4_K", "432")),
    ("broken superblock", entry(EMBEDDING, "shape", (3, 128)), ("multiple of 256",)),
    ("three dimensions", entry(EMBEDDING, "shape", (1, 3, 256)), ("token_embd.weight",)),
    ("size of one more", entry(EMBEDDING, "size", 433), ("432 bytes", "433")),
    ("offset overflow", entry(EMBEDDING, "offset", (1 << 64) - 64), ("2**64", "18446744073709551552")),
    ("size overflow", entry(EMBEDDING, "size", (1 << 64) - 1), ("end",)),
    ("size into the footer", entry("model.norm.weight", "size", 1028), ("an end at byte",)),
    ("index cut short", cut_index, ("left in the tensor index",)),
    ("offset past the end", entry(EMBEDDING, "offset", 1 << 20), ("an end at byte",)),
    ("misaligned", entry(EMBEDDING, "offset", 4), ("multiple of 64",)),
    ("overlapping tensors", entry(EMBEDDING, "offset", 64), ("of its own",)),
    ("Q4_K vector", entry("model.norm.weight", "dtype", Q4_K), ("bytes for Q4_K",)),
    *((f"dtype {code}", entry(EMBEDDING, "dtype", code), (name, "export the model again"))
      for code, name in ((3, "F64"), (4, "I32"), (5, "I64"), (6, "I8"), (7, "U8"), (2, "unknown dtype 2"),
                         (8, "apr-q4"), (9, "apr-q8"), (128, "apr-q4"), (129, "apr-q8"), (255, "unknown dtype 255"))),
]  # fmt: skip


@pytest.mark.parametrize(("change", "words"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_what_cannot_be_read_rightly_is_refused_by_name(tmp_path: Path, change: Change, words: tuple[str, ...]) -> None:
    image = tiny_model()
    change(image)
    content = image.build()
    started = time.perf_counter()
    line = refusal(tmp_path, content)
    assert time.perf_counter() - started < 2
    for word in words:
        assert word in line.removeprefix(str(tmp_path))


def test_a_refusal_names_the_key_then_what_was_expected_then_what_was_found(tmp_path: Path) -> None:
    image = tiny_model()
    stated(num_layers=1.5)(image)
    assert re.search(r"\.apr: num_layers: expected an integer\b[^;]*, got 1\.5; ", refusal(tmp_path, image.build()))


def test_dtype_8_is_not_taken_for_ggml_q8_0(tmp_path: Path) -> None:
    image = tiny_model()
    embedding = image.entry(EMBEDDING)
    embedding.dtype, embedding.data = 8, bytes(3 * 256 // 32 * 34)  # the bytes that Q8_0 would have
    assert "apr-q4" in refusal(tmp_path, image.build())


def test_too_many_tensors_are_refused_before_they_are_read(tmp_path: Path) -> None:
    entry_bytes = struct.pack("<H", 1) + b"a" + struct.pack("<BBQQQ", 0, 1, 1, 0, 4)
    image = AprImage(tiny_metadata(), [], forged={"tensor_count": 65_537})
    content = bytearray(image.build())
    data_offset = struct.unpack_from("<Q", content, 32)[0] + 65_600 * len(entry_bytes)
    struct.pack_into("<Q", content, 32, data_offset)
    content[-4:] = 65_600 * entry_bytes + bytes(64)
    assert "at most 65536" in refusal(tmp_path, seal(content))


@pytest.mark.parametrize("keep", [0, 3, 4, 63, 64, 67, 68, 300, 700, 1500, 5000, -64, -4, -1])
def test_a_truncated_file_is_one_clear_line(tmp_path: Path, keep: int) -> None:
    refusal(tmp_path, tiny_model().build()[:keep])


def test_one_damaged_bit_of_the_data_is_found(tmp_path: Path) -> None:
    content = bytearray(tiny_model().build())
    content[-200] ^= 4
    assert "footer CRC-32" in refusal(tmp_path, bytes(content))
    (tmp_path / "sealed.apr").write_bytes(seal(content))
    open_model(tmp_path / "sealed.apr")


def test_the_footer_of_a_file_longer_than_one_piece_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apr_header, "_CHUNK", 1000)
    content = tiny_model().build()
    assert len(content) > 5000 and zlib.crc32(content[:-4]) == int.from_bytes(content[-4:], "little")
    opened(tmp_path, tiny_model())
    assert "footer CRC-32" in refusal(tmp_path, content[:-2000] + b"\1" + content[-1999:])


def test_the_command_line_takes_an_apr_by_its_content(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tiny_model().write(tmp_path / "model.bin")
    assert main(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["architecture"] == "qwen2"
    image = tiny_model()
    image.flags = 4
    assert main(["inspect", str(image.write(tmp_path / "model.gguf"))]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "encrypted" in lines[0] and "Traceback" not in lines[0]


# --- fuzzing: an InputError of one line, or a model whose every tensor lies in the file ---


def outcome(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    try:
        model = open_model(path)
    except InputError as error:
        assert "\n" not in str(error)
        return "refused"
    for tensor in model.tensors.values():
        assert tensor.data.nbytes == tensor.num_bytes <= len(content)
        int(tensor.data.sum())  # touches every byte
    assert model.config.num_layers * 9 <= len(model.tensors)
    return "opened"


@pytest.mark.parametrize("sealed", [False, True], ids=["checksums as they were", "checksums right"])
def test_mutated_files_are_refused_or_valid(tmp_path: Path, sealed: bool) -> None:
    rng = random.Random(20)
    original = tiny_model().build()
    structure = struct.unpack_from("<Q", original, 32)[0]  # everything before the data
    seen = {"refused": 0, "opened": 0}
    for _ in range(1500):
        content = bytearray(original)
        for _ in range(rng.choice((1, 1, 2, 8))):
            place = rng.randrange(structure if rng.random() < 0.8 else len(content))
            content[place] = rng.choice((0, 1, 127, 128, 255, content[place] ^ 1 << rng.randrange(8)))
        if rng.random() < 0.1:
            del content[rng.randrange(len(content)) :]
        if rng.random() < 0.1:
            place = rng.randrange(len(content) + 1)
            content[place:place] = rng.randbytes(rng.randrange(1, 80))
        sealable = sealed and len(content) >= 68
        seen[outcome(tmp_path / "f.apr", seal(content) if sealable else bytes(content))] += 1
    # Damage with stale checksums is found unless the mutation changed nothing.
    assert seen["refused"] > 700
    assert (seen["opened"] > 100) if sealed else (seen["opened"] < 100)


EDGES = st.sampled_from(
    [0, 1, 63, 64, 255, 256, 1 << 31, (1 << 32) - 1, 1 << 40, 1 << 63, (1 << 64) - 64, (1 << 64) - 1]
)
ENTRY_FIELDS = st.sampled_from(["offset", "size", "shape", "dtype"])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    header=st.dictionaries(
        st.sampled_from(["metadata_offset", "index_offset", "data_offset"]), EDGES | st.integers(0, 12_000), max_size=2
    ),
    place=st.integers(0, 13),
    name=ENTRY_FIELDS,
    value=EDGES | st.integers(0, 12_000),
    key=st.sampled_from(sorted(tiny_metadata())),
    setting=st.none() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8) | st.lists(st.integers()),
)
def test_forged_fields_are_refused_or_valid(
    tmp_path_factory: pytest.TempPathFactory,
    header: dict[str, int],
    place: int,
    name: str,
    value: int,
    key: str,
    setting: object,
) -> None:
    image = tiny_model(**{key: setting})
    image.forged = header
    target = image.entries[place]
    values = {"shape": (*target.shape[:-1], value), "dtype": value % 256}
    setattr(target, name, values.get(name, value))
    outcome(tmp_path_factory.getbasetemp() / "forged.apr", image.build())
