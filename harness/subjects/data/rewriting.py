"""Chats under templates that write earlier turns anew, and the texts that the models of these templates see.

The texts are put together here from the messages, turn by turn; no template is rendered.
"""

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path

from q4kd.harness.inputs.published.chat_templates import GEMMA4, GPT_OSS, QWEN3
from q4kd.harness.inputs.training_documents import chat_messages, write_jsonl
from q4kd.harness.runs.experiment import Inputs

REWRITING = {"qwen3": QWEN3, "gpt-oss": GPT_OSS, "gemma4": GEMMA4}


def rewritten_texts(name: str) -> Iterable[tuple[str, list[tuple[int, int]]]]:
    """Yield the text of each example of the chats, and the characters ``[begin, end)`` that are learnt in it."""
    for pieces in _pieces(name):
        ends = itertools.accumulate(len(text) for text, _ in pieces)
        learnt = [(end - len(text), end) for end, (text, learns) in zip(ends, pieces, strict=True) if learns]
        yield "".join(text for text, _ in pieces), learnt


def _thought(number: int, turn: int) -> str:
    return f"chat {number} turn {turn}, x > {number}"


def rewritten_chats(inputs: Inputs, name: str) -> Path:
    """Return chats of two questions; for gpt-oss the first answer calls a tool before, for Gemma none has reasoning."""
    records = []
    for number, (first, said, second, last) in enumerate(chat_messages()):
        answers = (
            [said, last]
            if name == "gemma4"
            else [{**answer, "reasoning_content": _thought(number, turn)} for turn, answer in enumerate((said, last))]
        )
        called: list[Mapping[str, object]] = []
        if name == "gpt-oss":
            call = {"name": "look", "arguments": str(number)}
            called = [{"role": "assistant", "thinking": "why", "tool_calls": [call]}, {"role": "tool", "content": "so"}]
        records.append({"messages": [first, *called, answers[0], second, answers[1]]})
    return write_jsonl(inputs, f"{name}.jsonl", records)


def _pieces(name: str) -> Iterable[list[tuple[str, bool]]]:
    """Yield the pieces of each example, and whether each is learnt, as the models of these templates see them."""
    for number, chat in enumerate(chat_messages()):
        asked, said, then, last = (message["content"] for message in chat)
        thoughts = [_thought(number, turn) for turn in range(2)]
        if name == "qwen3":
            before = f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
            history = f"{said}<|im_end|>\n<|im_start|>user\n{then}<|im_end|>\n<|im_start|>assistant\n"
            texts = [f"<think>\n{t}\n</think>\n\n{a}<|im_end|>\n" for t, a in zip(thoughts, (said, last), strict=True)]
            yield [(before, False), (texts[0], True)]
            yield [(before + history, False), (texts[1], True)]
        elif name == "gpt-oss":
            before, opened = f"<|start|>user<|message|>{asked}<|end|>", "<|start|>assistant"
            analysis, final = "<|channel|>analysis<|message|>", "<|channel|>final<|message|>"
            call, result = f" to=look<|message|>{number}<|call|>", "<|start|>tool<|message|>so<|end|>"
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
        else:
            asked, said, then, last = (text.strip() for text in (asked, said, then, last))
            before, opened = f"<|turn>user\n{asked}<turn|>\n<|turn>model\n", "<|channel>thought\n<channel|>"
            history = f"{said}<turn|>\n<|turn>user\n{then}<turn|>\n<|turn>model\n"
            yield [(before + opened, False), (f"{said}<turn|>\n", True)]
            yield [(before + history + opened, False), (f"{last}<turn|>\n", True)]
