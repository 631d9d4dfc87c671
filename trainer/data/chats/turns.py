"""What of a chat is one example: each answer is learnt after the history that the model will see before it.

Templates of reasoning models write earlier turns anew when more follows: they take reasoning out of an answer, end it
in another way, or open a turn with more than they write of it afterwards. A chat is then several examples: as few as
there can be, so that before each answer stands what the template writes to ask for it, and every answer is learnt once.
The program that renders imports this module, which imports nothing of this package.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from os.path import commonprefix
from typing import Any

MAX_TEXT = 64 << 20
REASONING = ("reasoning_content", "thinking", "reasoning")
# Two contents that share no letter: what is written of both before they differ is what opens a turn.
_FIRST, _SECOND = "Qx7", "Zk3"
# What begins and ends the reasoning of an answer: Qwen, DeepSeek, GLM; Gemma 4; Mistral; Seed.
_BEGINS = ("<think>", "<|channel>thought", "[THINK]", "<seed:think>")
_ENDS = ("</think>", "<channel|>", "[/THINK]", "</seed:think>")
# The names by which templates are asked for an answer with or without reasoning: Qwen, GLM, Gemma; DeepSeek.
_WITH_REASONING = ({"enable_thinking": True}, {"thinking": True})
_WITHOUT_REASONING = ({"enable_thinking": False}, {"thinking": False})

Message = dict[str, Any]
Render = Callable[..., str]
Example = dict[str, Any]


class Refused(Exception):  # noqa: N818 - not an error of the template's
    """Says why a chat has no text, in a few words."""


class Rewritten(Exception):  # noqa: N818 - not an error of the template's
    """A message, counted from 1, whose text depends on those after it."""


def find_examples(
    render: Render, messages: Sequence[Message], turns: Sequence[int], *, whole: bool, as_written: bool = False
) -> list[Example]:
    """Return the examples of a chat, in order.

    Each has a ``text`` of the messages up to ``last``, of which those from ``first`` are in no earlier example;
    ``spans``, characters ``[begin, end)`` of the messages of ``turns`` that are learnt in it; ``turns``, the indices of
    these; and ``fresh``, the character from which it is new.

    Args:
        render: function from messages to a text; ``add_generation_prompt`` asks for the opened turn of an answer, and
            what else is given are variables of the template, which those of the record come before.
        messages: the messages.
        turns: indices of the messages whose characters are to be found.
        whole: whether all that is written is learnt, and not the messages of ``turns`` alone.
        as_written: whether answers that are not in ``turns`` are as the template writes them, whatever opens them.

    Raises:
        Refused: where the template opens answers so that one does not go on from there, leaves out what it says, or
            the examples have more than ``MAX_TEXT`` characters together.
        Rewritten: where a message that is no answer is not found in the text.
    """
    last = len(messages) - 1
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"] if whole else []
    found: list[Example] = []
    for index in sorted({*turns, *answers}):
        if index in turns:
            text, begin = _said(render, messages, index)
        else:
            text, begin = (render if as_written else functools.partial(_whole, render))(messages[: index + 1]), 0
        if not found or not text.startswith(found[-1]["text"]):
            found.append({"spans": [], "turns": [], "first": 0 if not found else found[-1]["last"] + 1})
        found[-1] |= {"text": text, "last": index}
        if index in turns:
            found[-1]["spans"].append((begin, len(text)))
            found[-1]["turns"].append(index)
        if sum(len(example["text"]) for example in found) > MAX_TEXT:
            raise Refused(f"examples of more than {MAX_TEXT} characters")
    if not found or found[-1]["last"] < last:
        _end(render(messages), found, last, whole=whole)
    for example in found:
        first = example["first"]
        example["fresh"] = _opened(render, messages, first, example["text"]) if whole and first else 0
    return found


def _whole(render: Render, messages: Sequence[Message]) -> str:
    """Return a chat up to an answer: as the model says it, or as the template writes it where it cannot be said."""
    try:
        return _said(render, messages, len(messages) - 1)[0]
    except Refused:
        return render(messages)


def _end(text: str, found: list[Example], last: int, *, whole: bool) -> None:
    """Add what follows the last turn: to its example, or as one more where the turn is written in another way."""
    if not found or (whole and not text.startswith(found[-1]["text"])):
        first = found[-1]["last"] + 1 if found else 0
        found.append({"text": text, "spans": [], "turns": [], "first": first, "last": last})
    elif text.startswith(found[-1]["text"]):
        found[-1] |= {"text": text, "last": last}


def _opened(render: Render, messages: Sequence[Message], index: int, text: str) -> int:
    """Return where in a text the content of a message begins."""
    tries = [render([*messages[:index], {**messages[index], "content": content}]) for content in (_FIRST, _SECOND)]
    before = commonprefix(tries)  # noqa: RUF071 - of texts, not of paths
    if not text.startswith(before):
        raise Rewritten(index + 1)
    return len(before)


def _said(render: Render, messages: Sequence[Message], index: int) -> tuple[str, int]:
    """Return a chat up to a message, and where the message begins: all from its opened turn to its end."""
    upto = render(messages[: index + 1])
    if index == 0:
        role = messages[0]["role"]
        tries = [render([{"role": role, "content": content}]) for content in (_FIRST, _SECOND)]
        return upto, len(commonprefix([*tries, upto]))  # noqa: RUF071
    if messages[index]["role"] != "assistant":
        before = render(messages[:index])
        if not upto.startswith(before):
            raise Rewritten(index + 1)
        return upto, len(before)
    refused: list[Refused] = []
    # An answer is what is said where the template asks for reasoning, or for none, as the answer has it.
    for variables in ({}, *(_WITH_REASONING if _parts(messages[index])[0] else _WITHOUT_REASONING)):
        said = functools.partial(render, **variables)
        before, upto = said(messages[:index], add_generation_prompt=True), said(messages[: index + 1])
        closes = bool(_parts(messages[index])[0]) and before.rstrip().endswith(_ENDS)
        if upto.startswith(before) and not closes and not _is_lost(messages[index], upto[len(before) :]):
            return upto, len(before)
        try:
            if closes:
                raise Refused(f"one that closes the reasoning of message {index + 1} where it opens its turn")
            return before + _answer_to(before, said, messages, index, upto), len(before)
        except Refused as error:
            refused.append(error)
    raise refused[0]


def _answer_to(before: str, render: Render, messages: Sequence[Message], index: int, upto: str) -> str:
    """Return what the model writes after ``before``, which opens its turn, where the template does not say it so."""
    message = messages[index]
    bare = [{"role": "assistant", "content": content} for content in (_FIRST, _SECOND)]
    tries = [render([*messages[:index], one]) for one in bare]
    head = commonprefix(tries)  # noqa: RUF071
    end = tries[0][len(head) + len(_FIRST) :]
    if tries != [f"{head}{content}{end}" for content in (_FIRST, _SECOND)]:
        raise Refused(f"one that writes message {index + 1} in two ways")
    # gpt-oss takes the reasoning out of earlier calls of tools when the last answer stands behind them.
    plain = render(messages[:index])
    opening = before[len(plain) :] if before.startswith(plain) else ""
    start = head.rfind(opening) if opening else -1
    if start >= 0 and upto.startswith(head[:start] + opening):
        own = upto[start + len(opening) :]
        if not _is_lost(message, own):
            return own
    # Gemma 4 and DeepSeek-R1 open a turn for the model with more than they write of a turn.
    if not before.startswith(head):
        raise Refused(_not_after(index, before, plain))
    opened = before[len(head) :]
    is_closed, (thought, _, content) = any(part in opened for part in _ENDS), _parts(message)
    if not thought and not any(part in content for part in _ENDS):
        if not upto.startswith(head) or not is_closed:
            raise Refused(_not_after(index, before, plain))
        return upto[len(head) :]
    if any(message.get(name) for name in REASONING):
        raise Refused(f"one that does not write the reasoning of message {index + 1}")
    if is_closed:
        raise Refused(_not_after(index, before, plain))
    content, begin = str(message["content"]), opened.strip()
    if begin and content.lstrip().startswith(begin):
        # What the template has opened, the answer does not open again.
        content = content.lstrip().removeprefix(begin).removeprefix(opened[len(opened.rstrip()) :])
    return content + end


def _not_after(index: int, before: str, plain: str) -> str:
    opening = before[len(plain) :] if before.startswith(plain) else before[-20:]
    without = "give its reasoning (reasoning_content), or <think></think> in its content for none"
    return f"message {index + 1}, which does not go on from {opening[-40:]!r} that opens it: {without}"


def _parts(message: Mapping[str, Any]) -> tuple[str, str, str]:
    """Return the reasoning of an answer, in a field of its own or in its content; what it says; and all its content."""
    content = message.get("content")
    content = content if isinstance(content, str) else ""
    thought = next((message[key] for key in REASONING if isinstance(message.get(key), str)), None)
    if thought is not None:
        return str(thought).strip(), content.strip(), content
    end = next((end for end in _ENDS if end in content), None)
    if end is None:
        return "", content.strip(), content
    thought, _, said = content.rpartition(end)
    for begin in _BEGINS:
        thought = thought.rpartition(begin)[2]
    return thought.strip(), said.strip(), content


def _is_lost(message: Mapping[str, Any], written: str) -> bool:
    """Return whether the reasoning of an answer is not written before what it says, or behind an empty one."""
    thought, said, content = _parts(message)
    place = written.find(thought)
    if not thought or place < 0 or said not in written[place + len(thought) :]:
        return bool(thought)
    before = content[: max(0, content.find(thought))]
    return any(written[:place].count(end) > before.count(end) for end in _ENDS)
