"""Chats under templates that write earlier turns anew, and the texts that the models of these templates see.

The texts are put together here from the messages, turn by turn; no template is rendered.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from q4kd.harness.inputs.published.chat_templates import published_template
from q4kd.harness.inputs.training_documents import chat_messages, write_jsonl
from q4kd.harness.runs.experiment import Inputs

_NAMES = ("qwen3", "qwen3.5", "qwen3.5-small", "gpt-oss", "gemma4", "deepseek-r1", "glm-4.7")
REWRITING = {name: published_template(name) for name in _NAMES}
# What gpt-oss says of itself and of its channels on the day on which the template is read.
_SYSTEM = (
    "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n"
    "Current date: {day}\n\nReasoning: medium\n\n# Valid channels: analysis, commentary, final. Channel must be "
    "included for every message.<|end|>"
)
# DeepSeek's marks of turns have fullwidth lines and SentencePiece's space.
_USER, _ASSISTANT, _ENDS = "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"


def rewritten_texts(name: str, day: str, begin: str) -> Iterable[tuple[str, list[tuple[int, int]]]]:
    """Yield the text of each example of the chats, and the characters ``[begin, end)`` that are learnt in it.

    Args:
        name: one of ``REWRITING``.
        day: the day on which the templates are read, as ``2026-11-30``.
        begin: the text of the student's begin token, which two of the templates write.
    """
    for pieces in _pieces(name, day, begin):
        ends = itertools.accumulate(len(text) for text, _ in pieces)
        learnt = [(end - len(text), end) for end, (text, learns) in zip(ends, pieces, strict=True) if learns]
        yield "".join(text for text, _ in pieces), learnt


def _thought(number: int, turn: int) -> str:
    return f"chat {number} turn {turn}, x > {number}"


def rewritten_chats(inputs: Inputs, name: str) -> Path:
    """Return chats of two questions whose answers have reasoning, in the field that the template reads.

    For gpt-oss the first answer calls a tool before. DeepSeek-R1's reasoning is in the content. The first one has none
    for Qwen3.
    """
    field = "thinking" if name == "gpt-oss" else "reasoning_content"
    records = []
    for number, (first, said, second, last) in enumerate(chat_messages()):
        answers = [{**answer, field: _thought(number, turn)} for turn, answer in enumerate((said, last))]
        if name == "deepseek-r1":
            answers = [
                {**answer, "content": f"<think>\n{_thought(number, turn)}\n</think>\n\n{answer['content']}"}
                for turn, answer in enumerate((said, last))
            ]
        if name == "qwen3":
            answers[0] = said
        called: list[Mapping[str, object]] = []
        if name == "gpt-oss":
            call = {"name": "look", "arguments": {"x": number}}
            called = [{"role": "assistant", "thinking": "why", "tool_calls": [call]}, {"role": "tool", "content": "so"}]
        records.append({"messages": [first, *called, answers[0], second, answers[1]]})
    return write_jsonl(inputs, f"{name}.jsonl", records)


def _pieces(name: str, day: str, begin: str) -> Iterable[list[tuple[str, bool]]]:
    """Yield the pieces of each example, and whether each is learnt, as the models of these templates see them."""
    for number, chat in enumerate(chat_messages()):
        asked, said, then, last = (message["content"] for message in chat)
        thoughts = [_thought(number, turn) for turn in range(2)]
        if name.startswith("qwen3"):
            yield from _qwen(name, (asked, said, then, last), thoughts)
        elif name == "gpt-oss":
            before, opened = f"{_SYSTEM.format(day=day)}<|start|>user<|message|>{asked}<|end|>", "<|start|>assistant"
            analysis, final = "<|channel|>analysis<|message|>", "<|channel|>final<|message|>"
            call = f' to=functions.look<|channel|>commentary json<|message|>{{"x": {number}}}<|call|>'
            result = '<|start|>functions.look to=assistant<|channel|>commentary<|message|>"so"<|end|>'
            texts = [
                f"{analysis}{thought}<|end|>{opened}{final}{answer}<|return|>"
                for thought, answer in zip(thoughts, (said, last), strict=True)
            ]
            yield [
                (before + opened, False), (f"{analysis}why<|end|>{opened}{call}", True), (result + opened, False),
                (texts[0], True),
            ]  # fmt: skip
            history = f"{opened}{call}{result}{opened}{final}{said}<|end|><|start|>user<|message|>{then}<|end|>{opened}"
            yield [(before + history, False), (texts[1], True)]
        elif name == "gemma4":
            asked, said, then, last = (text.strip() for text in (asked, said, then, last))
            before = f"{begin}<|turn>user\n{asked}<turn|>\n<|turn>model\n"
            texts = [
                f"<|channel>thought\n{thought}\n<channel|>{answer}<turn|>\n"
                for thought, answer in zip(thoughts, (said, last), strict=True)
            ]
            yield [(before, False), (texts[0], True)]
            history = f"{said}<turn|>\n<|turn>user\n{then}<turn|>\n<|turn>model\n"
            yield [(before + history, False), (texts[1], True)]
        elif name == "deepseek-r1":
            before, opened = f"{begin}{_USER}{asked}{_ASSISTANT}", "<think>\n"
            texts = [f"{thought}\n</think>\n\n{a}{_ENDS}" for thought, a in zip(thoughts, (said, last), strict=True)]
            yield [(before + opened, False), (texts[0], True)]
            yield [(f"{before}\n\n{said}{_ENDS}{_USER}{then}{_ASSISTANT}{opened}", False), (texts[1], True)]
        else:
            before = f"[gMASK]<sop><|user|>{asked}<|assistant|>"
            texts = [f"{t}</think>{answer.strip()}" for t, answer in zip(thoughts, (said, last), strict=True)]
            yield [(f"{before}<think>", False), (texts[0], True)]
            yield [(f"{before}</think>{said.strip()}<|user|>{then}<|assistant|><think>", False), (texts[1], True)]


def _qwen(name: str, texts: Sequence[str], thoughts: Sequence[str]) -> Iterable[list[tuple[str, bool]]]:
    """Yield the pieces of one chat of a Qwen: Qwen3.5 trims its texts and opens an answer's reasoning itself."""
    asked, said, then, last = texts if name == "qwen3" else (text.strip() for text in texts)
    before = f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
    history = f"{said}<|im_end|>\n<|im_start|>user\n{then}<|im_end|>\n<|im_start|>assistant\n"
    opened, first = ("", "\n\n</think>") if name == "qwen3" else ("<think>\n", f"{thoughts[0]}\n</think>")
    begins = "<think>\n" if name == "qwen3" else ""
    first = f"<think>{first}" if name == "qwen3" else first
    yield [(before + opened, False), (f"{first}\n\n{said.lstrip(chr(10))}<|im_end|>\n", True)]
    answer = f"{begins}{thoughts[1]}\n</think>\n\n{last.lstrip(chr(10))}<|im_end|>\n"
    yield [(before + history + opened, False), (answer, True)]
