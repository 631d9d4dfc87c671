"""Fields that say what is learnt: each is honoured, or refused by its name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import save_file

from q4kd.trainer.data.documents import Document, SourceSettings
from q4kd.trainer.data.encoding import DocumentEncoder
from q4kd.trainer.data.readers import read_documents
from q4kd.trainer.data.sources.account import SourceAccount
from q4kd.trainer.errors import InputError

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
TOOLS = [{"type": "function", "function": {"name": "look"}}]
IDS = [5, 6, 7, 8]


def read(tmp_path: Path, record: object, account: SourceAccount | None = None, **settings: Any) -> Document:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record) + "\n")
    (document,) = read_documents(path, settings=SourceSettings(**settings), account=account)
    return document


def learnt(document: Document) -> list[int]:
    (found,) = DocumentEncoder(lambda texts: [[ord(letter) for letter in text] for text in texts], 0).encode([document])
    return found.ids.tolist() if found.learnt is None else found.ids[found.learnt].tolist()


@pytest.mark.parametrize(
    ("fields", "ids"),
    [
        ({"completion_mask": [0, 0, 1, 1]}, [7, 8]),
        ({"assistant_masks": [0, 0, 1, 1]}, [7, 8]),
        ({"assistant_mask": [0, 1, 1, 0]}, [6, 7]),
        ({"loss_mask": [False, False, False, True]}, [8]),
        ({"completion_mask": [0, 1, 1, 1], "labels": [-100, -100, 7, 8]}, [7, 8]),
        ({"attention_mask": [1, 1, 0, 0]}, [5, 6]),
        ({"attention_mask": [0, 1, 1, 1], "labels": [-100, -100, 7, 8]}, [7, 8]),
        ({"attention_mask": [0, 0, 1, 1], "position_ids": [1, 1, 0, 1]}, [7, 8]),
        ({"position_ids": [0, 1, 2, 3], "token_type_ids": [0, 0, 0, 0]}, IDS),
    ],
)
def test_masks_of_tokens_are_followed(tmp_path: Path, fields: dict[str, Any], ids: list[int]) -> None:
    assert learnt(read(tmp_path, {"input_ids": IDS, **fields})) == ids


def test_padding_is_no_token(tmp_path: Path) -> None:
    document = read(tmp_path, {"input_ids": [*IDS, 0, 0], "attention_mask": [1, 1, 1, 1, 0, 0]})
    assert document.ids is not None
    assert document.ids.tolist() == IDS


def test_masks_in_shards_and_parquet_are_followed(tmp_path: Path) -> None:
    tensors = {"input_ids": np.array([IDS]), "attention_mask": np.array([[1, 1, 1, 0]]), "other": np.array([[1] * 4])}
    save_file(tensors, tmp_path / "a.safetensors")
    account = SourceAccount()
    (shard,) = read_documents(tmp_path / "a.safetensors", account=account)
    assert learnt(shard) == IDS[:3]
    assert account.passed_over == {"other": 1}
    pq.write_table(pa.table({"input_ids": [IDS], "completion_mask": [[0, 0, 0, 1]]}), tmp_path / "b.parquet")
    (row,) = read_documents(tmp_path / "b.parquet")
    assert learnt(row) == [8]


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({"input_ids": IDS, "attention_mask": [1, 0, 1, 1]}, "attention_mask"),
        ({"input_ids": IDS, "attention_mask": [0, 0, 0, 0]}, "attention_mask"),
        ({"input_ids": IDS, "completion_mask": [1, 1]}, "completion_mask"),
        ({"input_ids": IDS, "loss_mask": [0.5, 1, 1, 1]}, "loss_mask"),
        ({"input_ids": IDS, "position_ids": [0, 1, 0, 1]}, "position_ids"),
        ({"input_ids": IDS, "seq_lengths": [2, 2]}, "seq_lengths"),
        ({"text": "x", "labels": [1]}, "labels"),
        ({"text": "x", "attention_mask": [1]}, "attention_mask"),
        ({"text": "x", "input_ids": IDS}, "input_ids"),
        ({"messages": CHAT, "input_ids": IDS}, "input_ids"),
        ({"text": "x", "weight": 0}, "weight"),
        ({"text": "x", "sample_weight": 0.5}, "sample_weight"),
        ({"messages": CHAT, "label": False}, "label"),
        ({"prompt": "x", "completion": "y", "label": False}, "label"),
        ({"messages": CHAT, "rejected": CHAT}, "rejected"),
        ({"messages": CHAT, "images": ["a.png"]}, "images"),
        ({"messages": CHAT, "system": "be kind"}, "system"),
        ({"messages": CHAT, "functions": "[]x"}, "functions"),
        ({"messages": CHAT, "tools": "not JSON"}, "tools"),
        ({"messages": CHAT, "tools": [1]}, "tools"),
        ({"messages": CHAT, "chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"messages": CHAT, "completion_mask": [0, 1]}, "completion_mask"),
        ({"prompt": "x", "completion": "y", "tools": TOOLS}, "tools"),
        ({"input_ids": IDS, "prompt_mask": [1, 1, 0, 0]}, "prompt_mask"),
        ({"input_ids": IDS, "target_labels": [1, 1, 0, 0]}, "target_labels"),
        ({"messages": CHAT, "response_mask": [1, 1, 0, 0]}, "response_mask"),
        ({"messages": [CHAT[0], {**CHAT[1], "masked": True}]}, "masked"),
        ({"messages": [{**CHAT[0], "images": ["a.png"]}, CHAT[1]]}, "images"),
        ({"messages": [{**CHAT[0], "tools": TOOLS}, CHAT[1]]}, "tools"),
        ({"messages": [CHAT[0], {**CHAT[1], "train_detail": []}]}, "train_detail"),
        ({"messages": [CHAT[0], {**CHAT[1], "weight": 0.3}]}, "weight"),
        ({"messages": [CHAT[0], {**CHAT[1], "train": False, "weight": 1}]}, "train"),
    ],
)
def test_what_is_not_followed_is_refused_by_name(tmp_path: Path, record: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError, match=rf"a\.jsonl:1.*{field}"):
        read(tmp_path, record)


@pytest.mark.parametrize("field", ["label", "images", "weight", "labels"])
def test_a_field_that_is_to_be_ignored_is(tmp_path: Path, field: str) -> None:
    read(tmp_path, {"messages": CHAT, field: [0]}, ignored=(field,))


def test_a_good_label_an_empty_list_and_a_weight_of_one_are_taken(tmp_path: Path) -> None:
    read(tmp_path, {"messages": CHAT, "label": True, "images": [], "tools": None, "weight": 1})
    read(tmp_path, {"input_ids": IDS, "special_tokens_mask": [0, 0, 0, 1], "label": 3})


def test_tools_and_variables_come_with_the_chat(tmp_path: Path) -> None:
    record = {"messages": CHAT, "tools": json.dumps(TOOLS), "chat_template_kwargs": {"enable_thinking": False}}
    assert read(tmp_path, record).context == {"tools": TOOLS, "variables": {"enable_thinking": False}}


def test_weights_of_messages(tmp_path: Path) -> None:
    messages = [CHAT[0], {**CHAT[1], "weight": 0}, CHAT[0], {**CHAT[1], "train": True}]
    document = read(tmp_path, {"messages": messages})
    assert document.learns == (None, False, None, True)
    assert document.messages is not None
    assert [dict(message) for message in document.messages] == [*CHAT, *CHAT]
    assert read(tmp_path, {"messages": CHAT}).learns == ()


def test_a_call_has_no_content(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look"}}]}
    document = read(tmp_path, {"messages": [CHAT[0], call]})
    assert document.messages is not None
    assert "content" not in document.messages[1]
    with pytest.raises(InputError, match="message 1"):
        read(tmp_path, {"messages": [{"role": "user", "content": None}]})


def test_a_text_field_that_was_asked_for_comes_first(tmp_path: Path) -> None:
    record = {"messages": CHAT, "formatted": "this"}
    account = SourceAccount()
    assert read(tmp_path, record, account, text_field="formatted").text == "this"
    assert account.passed_over == {"messages": 1}
    assert read(tmp_path, record).messages is not None


def test_the_format_says_which_of_two_kinds_is_meant(tmp_path: Path) -> None:
    record = {"text": "x", "input_ids": IDS, "labels": [-100, -100, 7, 8]}
    assert learnt(read(tmp_path, record, data_format="tokens")) == [7, 8]
    with pytest.raises(InputError, match="labels"):
        read(tmp_path, record, ignored=("input_ids",))
    assert read(tmp_path, record, ignored=("input_ids", "labels")).text == "x"


def test_parquet_gives_no_object_the_fields_of_others(tmp_path: Path) -> None:
    tools = [{"name": "a", "parameters": {"x": "int"}}, {"name": "b", "parameters": {"y": "int"}}]
    pq.write_table(pa.table({"messages": [CHAT], "tools": [tools]}), tmp_path / "a.parquet")
    (document,) = read_documents(tmp_path / "a.parquet")
    assert document.context["tools"] == tools


def test_a_null_field_is_named_as_what_was_found(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="got text: null"):
        read(tmp_path, {"text": None})
