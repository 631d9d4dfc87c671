"""The settings of data: runs that read, cut and begin documents in another way than by default, case by case.

Records hold beside each document what a run that passed the setting over would train on. What a run must make of them
is worked out from the texts with the ``tokenizers`` package alone.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from q4kd.harness.inputs.arrays import Array
from q4kd.harness.inputs.demo import demo_student, demo_tokenizer, encode_texts
from q4kd.harness.inputs.training_documents import (
    CHATS,
    DOCUMENTS,
    chat_messages,
    document_texts,
    run_settings,
    write_jsonl,
)
from q4kd.harness.oracles.windows import Document, cut_windows
from q4kd.harness.runs.experiment import Inputs
from q4kd.harness.subjects.data.labels import BEGIN, begin_student, chat_student, tool

SEQ_LEN = 24
# A day on which nothing of this runs; and bytes that end within a document.
_DAY, _DAY_WRITTEN, _MAX_BYTES = "2001-02-03", "03 February 2001", 700
_Tokens = list[list[int]]


@dataclass(frozen=True)
class _Case:
    """A run on data of its own.

    Attributes:
        data: makes its file.
        documents: the tokens of each document that it must train on.
        changes: its settings.
        student: folder of its student.
    """

    data: Callable[[Inputs], Path]
    documents: Callable[[Inputs], _Tokens]
    changes: Mapping[str, object]
    student: Callable[[Inputs], Path] = demo_student


def _chats(inputs: Inputs, before: str = "") -> _Tokens:
    """Return the tokens of each chat, which ends as its template ends it."""
    texts = (
        before + "".join(f"<{message['role']}>{message['content']}</>\n" for message in chat)
        for chat in chat_messages()
    )
    return [list(demo_tokenizer(inputs).encode(text, add_special_tokens=False).ids) for text in texts]


def _texts() -> list[str]:
    return document_texts(DOCUMENTS)[: 2 * CHATS]


def _records(name: str, make: Callable[[], list[dict[str, object]]]) -> Callable[[Inputs], Path]:
    return lambda inputs: write_jsonl(inputs, f"settings-{name}.jsonl", make())


_DECOY = [{"role": "user", "content": "not this chat"}]


def _turns() -> list[dict[str, object]]:
    return [{"turns": messages, "messages": _DECOY} for messages in chat_messages()]


def _bodies() -> list[dict[str, object]]:
    return [{"body": text, "messages": _DECOY} for text in _texts()]


def _with_tools() -> list[dict[str, object]]:
    return [{"messages": messages, "tools": [tool(number)]} for number, messages in enumerate(chat_messages())]


def _plain() -> list[dict[str, object]]:
    return [{"text": text} for text in _texts()]


def _begun(inputs: Inputs) -> _Tokens:
    return [[BEGIN, *ids] for ids in encode_texts(inputs, _texts())]


def _as_one_text(inputs: Inputs) -> _Tokens:
    return encode_texts(inputs, ["".join(json.dumps(record) + "\n" for record in _plain())])


def _first_bytes(inputs: Inputs) -> _Tokens:
    """Return the documents up to the one within which the limit lies."""
    texts, read = _texts(), 0
    for count, text in enumerate(texts, start=1):
        read += len(text.encode())
        if read >= _MAX_BYTES:
            return encode_texts(inputs, texts[:count])
    raise ValueError("the limit lies behind the documents")


CASES: Mapping[str, _Case] = {
    "text_field": _Case(
        _records("bodies", _bodies),
        lambda inputs: encode_texts(inputs, _texts()),
        {"text_field": "body"},
        lambda inputs: chat_student(inputs, "chat"),
    ),
    "messages_field": _Case(
        _records("turns", _turns), _chats, {"messages_field": "turns"}, lambda inputs: chat_student(inputs, "chat")
    ),
    "ignore_fields": _Case(
        _records("tools", _with_tools), _chats, {"ignore_fields": "tools"}, lambda inputs: chat_student(inputs, "tools")
    ),
    "chat_date": _Case(
        _records("chats", lambda: [{"messages": messages} for messages in chat_messages()]),
        lambda inputs: _chats(inputs, f"<day>{_DAY_WRITTEN}</>\n"),
        {"chat_date": _DAY},
        lambda inputs: chat_student(inputs, "dated"),
    ),
    "begin_of_text true": _Case(_records("plain", _plain), _begun, {"begin_of_text": "true"}),
    "begin_of_text false": _Case(
        _records("plain", _plain),
        lambda inputs: encode_texts(inputs, _texts()),
        {"begin_of_text": "false"},
        begin_student,
    ),
    "data_format": _Case(_records("plain", _plain), _as_one_text, {"data_format": "text"}),
    "data_max_bytes": _Case(_records("plain", _plain), _first_bytes, {"data_max_bytes": _MAX_BYTES}),
}


def _windows(inputs: Inputs, case: _Case) -> list[tuple[list[int], list[int]]]:
    documents = [Document(tuple(ids), (True,) * len(ids)) for ids in case.documents(inputs)]
    windows = cut_windows(documents, SEQ_LEN, "documents")
    return list(zip(windows.ids.tolist(), windows.labels.tolist(), strict=True))


def settings_cases(inputs: Inputs) -> dict[str, dict[str, object]]:
    """Return the cases for the probe ``training-batches``, an epoch of each."""
    found: dict[str, dict[str, object]] = {}
    for name, case in CASES.items():
        changes = {"student": str(case.student(inputs)), "seq_len": SEQ_LEN, **case.changes}
        settings = run_settings(inputs, case.data(inputs), **changes)
        found[name] = {"settings": settings, "sequences": 1, "steps": len(_windows(inputs, case)), "resume": 0}
    return found


def settings_table(inputs: Inputs, found: Mapping[str, Array]) -> dict[str, int]:
    """Return, for each case, how many windows of its epoch are not the expected ones."""
    table = {}
    for name, case in CASES.items():
        expected = sorted(_windows(inputs, case))
        pairs = sorted(zip(found[f"{name}-ids"].tolist(), found[f"{name}-labels"].tolist(), strict=True))
        table[name] = sum(seen != window for seen, window in zip(pairs, expected, strict=True))
    return table
