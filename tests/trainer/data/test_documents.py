"""Sources: every kind of file gives its documents, and what is wrong with one is said in a line that names it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from q4kd.trainer.data import documents, shards
from q4kd.trainer.data.documents import Document, SourceSettings
from q4kd.trainer.data.encoding import DocumentEncoder, Encoded
from q4kd.trainer.data.readers import read_documents
from q4kd.trainer.errors import InputError
from q4kd.trainer.export.fidelity_text import read_ids

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def read(path: Path, **settings: str) -> list[Document]:
    return list(read_documents(path, settings=SourceSettings(**settings)))


def encode(texts: list[str]) -> list[list[int]]:
    return [[ord(letter) for letter in text] for text in texts]


def test_records_of_every_kind(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [
        {"text": "x"},
        {"messages": CHAT},
        {"prompt": "p", "completion": "c"},
        {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    text, chat, pair, ids = read(path)
    assert (text.name, text.text) == ("a.jsonl:1", "x")
    assert chat.messages is not None
    assert [dict(message) for message in chat.messages] == CHAT
    assert (pair.text, pair.completion) == ("p", "c")
    assert ids.ids is not None
    assert ids.ids.tolist() == [1, 2, 3]
    encoded = list(DocumentEncoder(encode, 0, completion_only=True, vocab_size=200).encode([pair, ids]))
    assert [part.ids.tolist() for part in encoded] == [[112, 99, 0], [1, 2, 3]]
    assert [part.learnt.tolist() for part in encoded if part.learnt is not None] == [[0, 1, 1], [0, 1, 1]]


def test_parquet_holds_the_same_records(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [f"t{n}" for n in range(600)], "other": [1] * 600}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"messages": [CHAT, CHAT], "id": [1, 2]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"input_ids": [[1, 2], [3]]}), tmp_path / "c.parquet")
    found = read(tmp_path)
    assert [document.text for document in found[:600]] == [f"t{n}" for n in range(600)]
    assert found[599].name == "a.parquet:600"
    assert found[600].messages is not None
    assert [dict(message) for message in found[600].messages] == CHAT
    assert [document.ids.tolist() for document in found[602:] if document.ids is not None] == [[1, 2], [3]]
    renamed = SourceSettings(data_format="parquet", text_field="other_text")
    pq.write_table(pa.table({"other_text": ["x"], "text": ["y"]}), tmp_path / "d.bin")
    assert [document.text for document in read_documents(tmp_path / "d.bin", settings=renamed)] == ["x"]


def test_token_shards(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([[1, 2], [3, 4]], np.uint16))
    np.save(tmp_path / "b.npy", np.arange(5))
    save_file({"input_ids": np.array([[7, 8]]), "labels": np.array([[-100, 8]])}, tmp_path / "c.safetensors")
    found = read(tmp_path)
    assert [part.ids.tolist() for part in found if part.ids is not None] == [[1, 2], [3, 4], [0, 1, 2, 3, 4], [7, 8]]
    assert [part.learnt for part in DocumentEncoder(encode, 0).encode(found[:3])] == [None] * 3
    (last,) = DocumentEncoder(encode, 0).encode(found[3:])
    assert last.learnt is not None
    assert last.learnt.tolist() == [False, True]
    with pytest.raises(InputError, match=r"c\.safetensors:1: expected token ids from 0 to 7"):
        list(DocumentEncoder(encode, 0, vocab_size=8).encode(found))


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"messages": []}, "1 to 10000 messages"),
        ({"messages": "x"}, "1 to 10000 messages"),
        ({"messages": [{"role": "user"}]}, "message 1"),
        ({"messages": [{"content": "x"}]}, "role"),
        ({"text": "\ud800"}, "surrogate"),
        ({"prompt": "x"}, "a record with"),
        ({"prompt": "x", "completion": 3}, "completion"),
        ({"input_ids": [1.5]}, "integers"),
        ({"input_ids": []}, "integers"),
        ({"input_ids": [[1], [2, 3]]}, "integers"),
        ({"input_ids": [1, 2], "labels": [1]}, "labels as long"),
        ({"input_ids": [1, 2], "labels": [1, 3]}, "labels as long"),
        ([1], "an object"),
    ],
)
def test_bad_records_are_named_by_line(tmp_path: Path, record: object, words: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "ok"}\n' + json.dumps(record) + "\n")
    with pytest.raises(InputError, match=r"a\.jsonl:2") as caught:
        read(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_format_is_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "x"}\n')
    assert read(path, data_format="text")[0].text == '{"text": "x"}\n'
    for wanted, field in (("chat", "messages"), ("tokens", "input_ids")):
        with pytest.raises(InputError, match=f'a.jsonl:1.*"{field}"'):
            read(path, data_format=wanted)


def test_damaged_files_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.parquet", "b.npy", "c.safetensors"):
        (tmp_path / name).write_bytes(b"\x93NUMPY\x01\x00" + b"x" * 40)
        with pytest.raises(InputError, match=name):
            read(tmp_path / name)
    for content in (
        "{'descr': '<i4', 'shape': (",
        "{'descr': ",
        "import os",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (1,",
    ):
        header = content.encode().ljust(117) + b"\n"
        (tmp_path / "s.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
        for reads in (read, read_ids):
            with pytest.raises(InputError, match=r"s\.npy"):
                reads(tmp_path / "s.npy")
    np.save(tmp_path / "d.npy", np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(InputError, match=r"d\.npy"):
        read(tmp_path / "d.npy")
    np.save(tmp_path / "e.npy", np.zeros((2, 2)))
    with pytest.raises(InputError, match="integers"):
        read(tmp_path / "e.npy")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "f.parquet")
    with pytest.raises(InputError, match="a column named"):
        read(tmp_path / "f.parquet")
    pq.write_table(pa.table({"text": ["y" * 5000]}), tmp_path / "g.parquet")
    monkeypatch.setattr(shards, "MAX_ROW_GROUP_BYTES", 100)
    with pytest.raises(InputError, match="row groups of at most"):
        read(tmp_path / "g.parquet")
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 10)
    (tmp_path / "h.jsonl").write_text(json.dumps({"text": "long" * 10}))
    with pytest.raises(InputError, match=r"h\.jsonl:1"):
        read(tmp_path / "h.jsonl")


def test_plain_text_has_no_completion() -> None:
    with pytest.raises(InputError, match=r"a\.txt.*plain text"):
        list(DocumentEncoder(encode, 0, completion_only=True).encode([Document("a.txt", "x")]))


def test_groups_keep_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("q4kd.trainer.data.encoding._GROUP", 3)
    given = [Document(str(n), chr(65 + n)) for n in range(8)]
    given[4] = Document("4", messages=({"role": "user", "content": "x"},))

    class Chats:
        closed = 0

        def encode(self, messages: Any, where: str, context: Any = None, learns: Any = None) -> list[Encoded]:
            return [Encoded.make([len(messages)])]

        def prepare(self, documents: Any) -> None:
            assert all(document.messages for document in documents)

        def close(self) -> None:
            self.closed += 1

    chats = Chats()
    encoder = DocumentEncoder(encode, 0, chat=chats)
    found = [part.ids.tolist() for part in encoder.encode(given)]
    encoder.close()
    assert chats.closed == 1
    assert found == [[65 + n, 0] if n != 4 else [1] for n in range(8)]


def test_json_files_are_records_where_they_hold_records(tmp_path: Path) -> None:
    records = [{"text": "one\ntwo"}, {"text": "three"}]
    (tmp_path / "list.json").write_text(json.dumps(records, indent=1))
    (tmp_path / "lines.json").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "other.json").write_text(json.dumps({"name": "package"}, indent=1))
    for name in ("list.json", "lines.json"):
        assert [document.text for document in read(tmp_path / name)] == ["one\ntwo", "three"]
    assert [document.name for document in read(tmp_path)] == [
        *("lines.json:1", "lines.json:2", "list.json:1", "list.json:2", "other.json")
    ]
    text = read(tmp_path / "list.json", data_format="text")
    assert [document.text for document in text] == [(tmp_path / "list.json").read_text()]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('[{"instruction": "a"}]', "got fields instruction"),
        ('{"name": "package"}', "got fields name"),
        ("[1, 2]", "got other JSON"),
        ("[" * 2000, "got other JSON"),
        ('[{"text": "a"}, {"text": ', "a list of JSON objects"),
        ('[{"text": "a"}, 3]', "bad.json:2: expected an object"),
    ],
)
def test_other_json_is_refused_where_it_was_named(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(InputError, match=words):
        read(path)


def test_a_folder_of_save_to_disk_is_refused_and_not_its_metadata_read(tmp_path: Path) -> None:
    (tmp_path / "data-00000-of-00001.arrow").write_bytes(b"\xff\xff")
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(InputError, match="to_parquet"):
        read(tmp_path)


def test_a_long_shard_of_one_document_is_refused_with_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_ROW_BYTES", 8)
    np.save(tmp_path / "a.npy", np.arange(5, dtype=np.uint16))
    with pytest.raises(InputError, match=r"\[rows, n\]"):
        read(tmp_path / "a.npy")
    np.save(tmp_path / "b.npy", np.arange(10, dtype=np.uint16).reshape(5, 2))
    assert len(read(tmp_path / "b.npy")) == 5


def test_parquet_text_that_is_no_unicode_is_refused(tmp_path: Path) -> None:
    wrong = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\x00\x00\x00\x00\x02\x00\x00\x00"), pa.py_buffer(b"\xff\xfe")]
    )
    pq.write_table(pa.table({"text": wrong}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet"):
        read(tmp_path / "a.parquet")
