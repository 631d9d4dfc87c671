"""The experiment on batches: whole epochs, labels of every form of documents, and the order after a resumption.

What is expected is worked out here from the texts with the ``tokenizers`` package alone, document by document.
"""

import functools
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from q4kd.harness.inputs.arrays import Array, read_arrays
from q4kd.harness.inputs.collect import arm_of
from q4kd.harness.inputs.command_lines import probe_words
from q4kd.harness.inputs.demo import demo_student, demo_tokenizer, encode_texts
from q4kd.harness.inputs.training_documents import (
    CHATS,
    DOCUMENTS,
    MANY,
    MASKED,
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
from q4kd.harness.subjects.data.rewriting import REWRITING, rewritten_chats, rewritten_texts
from q4kd.trainer.files import read_json, write_json

SEQ_LEN, WHOLE, BEGIN, BUFFER = 24, 512, 0, 9
DAY = "2026-11-30"
_BEGIN_TEXT = "<|endoftext|>"  # the demo student's begin token
_SAID = "{{ m['content'] }}</>\n"
_TURN = "<{{ m['role'] }}>" + _SAID
_PROMPT = "{% if add_generation_prompt %}<assistant>{% endif %}"
TEMPLATES = {
    "chat": f"{{% for m in messages %}}{_TURN}{{% endfor %}}{_PROMPT}",
    "tools": f"{{% if tools %}}<tools>{{% for t in tools %}}{{{{ t | tojson }}}}{{% endfor %}}</>\n{{% endif %}}"
    f"{{% for m in messages %}}{_TURN}{{% endfor %}}{_PROMPT}",
    "dated": f"<day>{{{{ strftime_now('%d %B %Y') }}}}</>\n{{% for m in messages %}}{_TURN}{{% endfor %}}{_PROMPT}",
    "marked": "{% for m in messages %}{% if m['role'] == 'assistant' %}<assistant>{% generation %}"
    f"{_SAID}{{% endgeneration %}}{{% else %}}{_TURN}{{% endif %}}{{% endfor %}}{_PROMPT}",
}
TEMPLATES |= REWRITING
# Labels of a window, by its ids.
_Windows = dict[tuple[int, ...], list[int]]


def chat_student(inputs: Inputs, name: str) -> Path:
    """Return the demo student with the chat template of that name."""

    def make(folder: Path) -> None:
        shutil.copytree(demo_student(inputs), folder)
        (folder / "chat_template.jinja").write_text(TEMPLATES[name])

    return inputs.file(f"{name}-student", make)


def begin_student(inputs: Inputs) -> Path:
    """Return the demo student with a tokenizer that puts token 0 before every text."""
    name = "<|endoftext|>"

    def make(folder: Path) -> None:
        shutil.copytree(demo_student(inputs), folder)
        content = read_json(folder / "tokenizer.json")
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {name: {"id": name, "ids": [BEGIN], "tokens": [name]}},
        }
        settings = read_json(folder / "tokenizer_config.json")
        write_json(folder / "tokenizer.json", content)
        write_json(folder / "tokenizer_config.json", settings | {"tokenizer_class": "PreTrainedTokenizerFast"})

    return inputs.file("begin-student", make)


def tool(number: int) -> dict[str, object]:
    """Return a tool of its own for each chat, so that no two windows are alike."""
    return {"name": f"{number} means", "parameters": {"values": {"type": "array"}}}


def _weighed(number: int, chat: list[dict[str, str]]) -> list[dict[str, object]]:
    """Return a chat, every other one with a first answer that is not to be learnt."""
    return [{**message, "weight": 0} if n == 1 and number % 2 == 0 else {**message} for n, message in enumerate(chat)]


def _cases(inputs: Inputs) -> Path:
    texts, (parquet, lines) = text_documents(inputs), many_documents(inputs)
    chats = write_jsonl(inputs, "chats.jsonl", [{"messages": messages} for messages in chat_messages()])
    with_tools = [
        {"messages": _weighed(number, chat), "tools": [tool(number)]} for number, chat in enumerate(chat_messages())
    ]
    tools = write_jsonl(inputs, "tools.jsonl", with_tools)
    pairs = write_jsonl(
        inputs, "pairs.jsonl", [{"prompt": first, "completion": then} for first, then in prompts_and_completions()]
    )
    records = [{"prompt": first, "completion": then} for first, then in prompts_and_completions()]
    records += [{"text": text} for text in document_texts(DOCUMENTS)[2 * CHATS :]]
    pairs_and_texts = write_jsonl(inputs, "pairs-and-texts.jsonl", records)
    masked = write_jsonl(
        inputs, "tokens.jsonl", [_padded(n, ids, to) for n, (ids, to) in enumerate(_token_documents(inputs))]
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
        steps = len(_labelled(inputs, name))
        changed = run_settings(inputs, source, packing="none", seq_len=_length(name), **more)
        cases[name] = {"settings": changed, "sequences": 1, "steps": steps, "resume": steps}
    return inputs.file("batch-cases.json", lambda path: write_json(path, cases))


# --- what has a label, in each form of documents that says so ---


def _token_documents(inputs: Inputs) -> list[tuple[list[int], list[int]]]:
    """Return ids and labels of documents that come as tokens: every other run of five has labels, the first has not."""
    documents = encode_texts(inputs, [prompt for prompt, _ in prompts_and_completions()])
    return [(ids, [token if n // 5 % 2 else MASKED for n, token in enumerate(ids)]) for ids in documents]


def _padded(number: int, ids: list[int], labels: list[int]) -> dict[str, list[int]]:
    """Return a record of tokens: every third with a mask in place of labels, every third with padding and its mask."""
    if number % 3 == 1:
        return {"input_ids": ids, "completion_mask": [int(label != MASKED) for label in labels]}
    if number % 3 == 2:
        seen = [1] * len(ids) + [0] * 5
        return {"input_ids": ids + [0] * 5, "labels": labels + [MASKED] * 5, "attention_mask": seen}
    return {"input_ids": ids, "labels": labels}


def _documents_of(inputs: Inputs, form: str) -> Iterable[tuple[Sequence[int], Sequence[bool]]]:
    """Yield the tokens of each document of a form, and whether each is learnt."""
    tokenizer = demo_tokenizer(inputs)
    if form == "tokens":
        yield from ((ids, [label != MASKED for label in labels]) for ids, labels in _token_documents(inputs))
    elif form == "begin":
        for prompt, completion in prompts_and_completions():
            ids = [
                BEGIN,
                *tokenizer.encode(prompt, add_special_tokens=False).ids,
                *encode_texts(inputs, [completion])[0],
            ]
            yield ids, [True] * len(ids)
        for ids in encode_texts(inputs, document_texts(DOCUMENTS)[2 * CHATS :]):
            yield [BEGIN, *ids], [True] * (len(ids) + 1)
    elif form == "completion":
        for prompt, completion in prompts_and_completions():
            before, (after,) = (
                tokenizer.encode(prompt, add_special_tokens=False).ids,
                encode_texts(inputs, [completion]),
            )
            yield [*before, *after], [False] * len(before) + [True] * len(after)
    elif form in REWRITING:
        for text, learnt in rewritten_texts(form, DAY, _BEGIN_TEXT):
            found = tokenizer.encode(text, add_special_tokens=False)
            yield found.ids, [any(a < end and z > begin for begin, end in learnt) for a, z in found.offsets]
    else:
        for number, messages in enumerate(chat_messages()):
            text, said = f"<tools>{json.dumps(tool(number))}</>\n" if form == "tools" else "", []
            for message in messages:
                text += f"<{message['role']}>"
                is_weighed = form == "tools" and number % 2 == 0 and message is messages[1]
                if message["role"] == "assistant" and not is_weighed:
                    said.append((len(text), len(text) + len(message["content"]) + len("</>\n")))
                text += f"{message['content']}</>\n"
            encoding = tokenizer.encode(text, add_special_tokens=False)
            # A token that reaches into what is said from before holds a part of it; transformers takes it, too.
            yield (
                encoding.ids,
                [any(first < end and last > begin for begin, end in said) for first, last in encoding.offsets],
            )


def _length(form: str) -> int:
    # Examples of one chat begin alike, so each is a window by itself.
    return WHOLE if form in REWRITING else SEQ_LEN


def _labelled(inputs: Inputs, form: str) -> _Windows:
    """Return the windows of a form's documents, each document cut by itself."""
    windows: _Windows = {}
    for ids, learnt in _documents_of(inputs, form):
        labels = [token if learns else MASKED for token, learns in zip(ids, learnt, strict=True)]
        for start in range(0, len(labels) - 1, _length(form)):
            stop = min(start + _length(form), len(labels) - 1)
            windows[tuple(ids[start:stop])] = labels[start + 1 : stop + 1]
    return windows


def _label_table(wanted: _Windows, ids: Array, labels: Array) -> dict[str, int | bool]:
    counts: Counter[str] = Counter()
    seen = set()
    for row, label in zip(ids.tolist(), labels.tolist(), strict=True):
        key = next((tuple(row[:n]) for n in range(len(row), 0, -1) if tuple(row[:n]) in wanted), None)
        if key is None:
            counts["unknown windows"] += 1
            continue
        seen.add(key)
        expected = wanted[key] + [MASKED] * (len(row) - len(key))
        before = MASKED
        for found, right in zip(label, expected, strict=True):
            counts["labelled and not to be learnt"] += right == MASKED != found
            counts["to be learnt and not labelled"] += right not in (MASKED, found)
            counts["first ones"] += before == MASKED != right
            before = right
        counts["labels"] += sum(found != MASKED for found in label)
    return {
        "unknown windows": counts["unknown windows"],
        "windows lost": len(wanted) - len(seen),
        "labelled and not to be learnt": counts["labelled and not to be learnt"],
        "to be learnt and not labelled": counts["to be learnt and not labelled"],
        "at least 12 first ones": counts["first ones"] >= 12,
        "at least 200 labels": counts["labels"] >= 200,
    }


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
            tables[form] = _label_table(_labelled(inputs, form), found[f"{form}-ids"], found[f"{form}-labels"])
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
