"""The experiment on batches: whole epochs, labels of every form of documents, and the order after a resumption.

What is expected is worked out here and in ``labels.py`` from the texts with the ``tokenizers`` package alone.
"""

import functools
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from q4kd.harness.inputs.arrays import Array, read_arrays
from q4kd.harness.inputs.collect import arm_of
from q4kd.harness.inputs.command_lines import probe_words
from q4kd.harness.inputs.demo import encode_texts
from q4kd.harness.inputs.training_documents import (
    CHATS,
    DOCUMENTS,
    MANY,
    chat_messages,
    document_texts,
    many_documents,
    packed_windows,
    prompts_and_completions,
    run_settings,
    short_texts,
    text_documents,
    write_jsonl,
)
from q4kd.harness.runs.experiment import ONE_THREAD, Arm, Facts, Inputs, experiment
from q4kd.harness.subjects.data.labels import (
    DAY,
    SEQ_LEN,
    TEMPLATES,
    begin_student,
    chat_student,
    label_table,
    labelled_windows,
    padded_record,
    token_documents,
    tool,
    weighed,
    window_length,
)
from q4kd.harness.subjects.data.rewriting import REWRITING, rewritten_chats
from q4kd.trainer.files import write_json

BUFFER = 9


def _cases(inputs: Inputs) -> Path:
    texts, (parquet, lines) = text_documents(inputs), many_documents(inputs)
    chats = write_jsonl(inputs, "chats.jsonl", [{"messages": messages} for messages in chat_messages()])
    with_tools = [
        {"messages": weighed(number, chat), "tools": [tool(number)]} for number, chat in enumerate(chat_messages())
    ]
    tools = write_jsonl(inputs, "tools.jsonl", with_tools)
    pairs = write_jsonl(
        inputs, "pairs.jsonl", [{"prompt": first, "completion": then} for first, then in prompts_and_completions()]
    )
    records = [{"prompt": first, "completion": then} for first, then in prompts_and_completions()]
    records += [{"text": text} for text in document_texts(DOCUMENTS)[2 * CHATS :]]
    pairs_and_texts = write_jsonl(inputs, "pairs-and-texts.jsonl", records)
    masked = write_jsonl(
        inputs, "tokens.jsonl", [padded_record(n, ids, to) for n, (ids, to) in enumerate(token_documents(inputs))]
    )
    windows, many = len(packed_windows(inputs, SEQ_LEN)), len(packed_windows(inputs, SEQ_LEN, short_texts()))
    epoch = {"sequences": 1, "steps": 2 * windows, "resume": windows + windows // 2}
    settings = functools.partial(run_settings, inputs, seq_len=SEQ_LEN)
    stream = {"streaming": True, "shuffle_buffer": BUFFER}
    cases = {
        "memory": {"settings": settings(texts), **epoch},
        "stream": {"settings": settings(texts, **stream), **epoch},
        "many": {"settings": settings(parquet), "sequences": 1, "steps": many, "resume": many},
        "many-stream": {"settings": settings(lines, **stream), "sequences": 1, "steps": many, "resume": many},
    }
    data = {
        "chat": chats,
        "marked": chats,
        "tools": tools,
        "completion": pairs,
        "tokens": masked,
        "begin": pairs_and_texts,
        **{name: rewritten_chats(inputs, name) for name in REWRITING},
    }
    for name, source in data.items():
        more: dict[str, object] = {"completion_only": True} if name in ("completion", *TEMPLATES) else {}
        if name in TEMPLATES:
            more["student"] = str(chat_student(inputs, name))
        elif name == "begin":
            more["student"] = str(begin_student(inputs))
        if name in REWRITING:
            more["chat_date"] = DAY
        steps = len(labelled_windows(inputs, name))
        changed = run_settings(inputs, source, packing="none", seq_len=window_length(name), **more)
        cases[name] = {"settings": changed, "sequences": 1, "steps": steps, "resume": steps}
    return inputs.file("batch-cases.json", lambda path: write_json(path, cases))


# --- training-batches: the batches of two epochs, and those that a run resumed within one takes ---


def _epoch_table(
    windows: list[tuple[list[int], list[int], list[int]]], ids: Array, labels: Array
) -> dict[str, int | bool]:
    wanted = Counter((tuple(ids), tuple(labels)) for ids, labels, _ in windows)
    rows = [(tuple(row), tuple(label)) for row, label in zip(ids.tolist(), labels.tolist(), strict=True)]
    first, second = rows[: len(windows)], rows[len(windows) :]
    return {
        "windows lost": sum((wanted - Counter(first)).values()),
        "windows invented": sum((Counter(first) - wanted).values()),
        "windows lost in the second epoch": sum((wanted - Counter(second)).values()),
        "the second epoch has another order": first != second,
        "shuffled": first != [(tuple(ids), tuple(labels)) for ids, labels, _ in windows],
    }


def _many_table(inputs: Inputs, found: dict[str, Array]) -> dict[str, int | bool]:
    windows, documents = packed_windows(inputs, SEQ_LEN, short_texts()), encode_texts(inputs, short_texts())
    epoch = _epoch_table(windows, found["many-ids"], found["many-labels"])
    wanted, flat = Counter(map(tuple, documents)), found["many-stream-ids"].ravel().tolist()
    # A stream joins documents in an order of its own: they are told by the end-of-text token.
    ends = [place + 1 for place, token in enumerate(flat) if token == documents[0][-1]]
    pieces = [tuple(flat[start:stop]) for start, stop in zip([0, *ends], ends, strict=False)]
    whole = Counter(pieces)
    lost = sum(len(document) * count for document, count in (wanted - whole).items())
    # What is behind the last window is not seen, nor the rest of a document that it cuts.
    tail = sum(map(len, documents)) - len(flat) + max(map(len, documents))
    return {
        "documents": MANY,
        "parquet: windows lost": epoch["windows lost"],
        "parquet: windows invented": epoch["windows invented"],
        "stream: tokens lost before the tail": max(0, lost - tail),
        "stream: documents invented": sum((whole - wanted).values()),
        "stream: documents from beyond the buffer": _from_beyond(pieces, documents),
    }


def _from_beyond(drawn: Iterable[tuple[int, ...]], documents: list[list[int]]) -> int:
    """Return how many documents of a stream come sooner than a buffer of that size can have held them."""
    places: dict[tuple[int, ...], list[int]] = {}
    for place, document in reversed(list(enumerate(documents))):
        places.setdefault(tuple(document), []).append(place)
    # Of documents that are alike the first is taken first.
    found = (places[piece].pop() if places.get(piece) else 0 for piece in drawn)
    return sum(place > number + BUFFER for number, place in enumerate(found))


def _argv(arm: str, inputs: Inputs) -> list[str]:
    resumed = ["--resumed"] if arm == "resumed" else []
    return [*probe_words("training-batches", cases=_cases(inputs), out="batches.npz"), *resumed]


@experiment(
    "training-batches",
    "the batches of two epochs of texts, of streams and of every form of labels, and those after a resumption",
    *(Arm(name, functools.partial(_argv, name), timeout_s=60, env=ONE_THREAD) for name in ("whole", "resumed")),
)
def _collect_batches(run_dir: Path, inputs: Inputs) -> Facts:
    """Count an epoch's windows and the documents' labels; in the resumed arm, compare with the arm before it."""
    if not (found := read_arrays(run_dir / "batches.npz")):
        return {}
    if arm_of(run_dir) == "whole":
        windows = packed_windows(inputs, SEQ_LEN)
        tables = {
            "epoch": _epoch_table(windows, found["memory-ids"], found["memory-labels"]),
            "many": _many_table(inputs, found),
        }
        for form in ("chat", "marked", "tools", "completion", "tokens", "begin", *REWRITING):
            tables[form] = label_table(labelled_windows(inputs, form), found[f"{form}-ids"], found[f"{form}-labels"])
        return {"tables": tables}
    if not (before := read_arrays(run_dir.parent / "training-batches.whole" / "batches.npz")):
        return {}
    table: dict[str, bool] = {}
    for name in ("memory", "stream"):
        late = {part: found[f"{name}-{part}"] for part in ("ids", "labels", "starts")}
        early = {part: before[f"{name}-{part}"][-len(late["ids"]) :] for part in late}
        table[f"{name}: batches are the same"] = all(np.array_equal(late[part], early[part]) for part in late)
        table[f"{name}: at least 20 of them"] = len(late["ids"]) >= 20
    return {"tables": {"resumed": table}}
