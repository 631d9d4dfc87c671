"""What has a label in each form of documents that says so: chats, completions, tokens, texts with a begin token.

It is worked out here from the texts with the ``tokenizers`` package alone, document by document.
"""

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from q4kd.harness.inputs.arrays import Array
from q4kd.harness.inputs.demo import demo_student, demo_tokenizer, encode_texts
from q4kd.harness.inputs.training_documents import (
    CHATS,
    DOCUMENTS,
    MASKED,
    chat_messages,
    document_texts,
    prompts_and_completions,
)
from q4kd.harness.runs.experiment import Inputs
from q4kd.harness.subjects.data.rewriting import REWRITING, rewritten_texts
from q4kd.trainer.files import read_json, write_json

SEQ_LEN, WHOLE, BEGIN = 24, 512, 0
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
LabelledWindows = dict[tuple[int, ...], list[int]]


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


def weighed(number: int, chat: list[dict[str, str]]) -> list[dict[str, object]]:
    """Return a chat, every other one with a first answer that is not to be learnt."""
    return [{**message, "weight": 0} if n == 1 and number % 2 == 0 else {**message} for n, message in enumerate(chat)]


def token_documents(inputs: Inputs) -> list[tuple[list[int], list[int]]]:
    """Return ids and labels of documents that come as tokens: every other run of five has labels, the first has not."""
    documents = encode_texts(inputs, [prompt for prompt, _ in prompts_and_completions()])
    return [(ids, [token if n // 5 % 2 else MASKED for n, token in enumerate(ids)]) for ids in documents]


def padded_record(number: int, ids: list[int], labels: list[int]) -> dict[str, list[int]]:
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
        yield from ((ids, [label != MASKED for label in labels]) for ids, labels in token_documents(inputs))
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


def window_length(form: str) -> int:
    """Return the positions of a window of a form; examples of one chat begin alike, so each is a window by itself."""
    return WHOLE if form in REWRITING else SEQ_LEN


def labelled_windows(inputs: Inputs, form: str) -> LabelledWindows:
    """Return the windows of a form's documents, each document cut by itself."""
    windows: LabelledWindows = {}
    for ids, learnt in _documents_of(inputs, form):
        labels = [token if learns else MASKED for token, learns in zip(ids, learnt, strict=True)]
        for start in range(0, len(labels) - 1, window_length(form)):
            stop = min(start + window_length(form), len(labels) - 1)
            windows[tuple(ids[start:stop])] = labels[start + 1 : stop + 1]
    return windows


def label_table(wanted: LabelledWindows, ids: Array, labels: Array) -> dict[str, int | bool]:
    """Count where the labels ``[N, T]`` of the windows ``ids`` ``[N, T]`` are others than those that are wanted."""
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
