"""The program that renders chats. A template comes with a model, so it gets bounded processor time and memory.

It is started by its path and imports nothing of this package but ``turns``. Requests and replies are lines of JSON; the
first request sets it up. The environment is that of transformers (utils/chat_template_utils.py) but for three things:
the date is one that was chosen, random filters start from the same seed, and ``{% generation %}`` leaves marks in the
text.
"""

import datetime
import json
import random
import resource
import secrets
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from q4kd.trainer.data.chats.turns import (
    MAX_TEXT,
    REASONING,
    Example,
    Message,
    Refused,
    Rewritten,
    find_examples,
)


def _environment(date: datetime.datetime, marks: tuple[str, str]) -> Any:
    import jinja2
    import jinja2.ext
    import jinja2.sandbox
    import jinja2.utils

    class Generation(jinja2.ext.Extension):
        """``{% generation %}``: the body, between marks that no text holds."""

        tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller: Callable[[], str]) -> str:
            return f"{marks[0]}{caller()}{marks[1]}"

    class Namespace(jinja2.utils.Namespace):
        def __setitem__(self, name: str, value: object) -> None:
            if str(name).startswith("_"):
                raise jinja2.exceptions.SecurityError(f"{name!r} on a namespace")
            jinja2.utils.Namespace.__setitem__(self, name, value)

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(
        value: object, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    made: Any = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    made.filters["tojson"] = tojson
    made.globals["raise_exception"] = raise_exception
    made.globals["strftime_now"] = date.strftime
    made.globals["namespace"] = Namespace
    return made


def _with_reasoning(message: Message) -> Message:
    found = next((message[key] for key in REASONING if message.get(key) is not None), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}


class Renderer:
    """Renders chats with one template.

    Args:
        setup: ``template``, ``special`` (names of tokens) and ``date`` (ISO).
    """

    def __init__(self, setup: Mapping[str, Any]) -> None:
        import jinja2.exceptions

        word = secrets.token_hex(8)
        self._marks = (f"\ue000{word}\ue001", f"\ue001{word}\ue000")
        date = datetime.datetime.fromisoformat(setup["date"])
        self._template = _environment(date, self._marks).from_string(setup["template"])
        self._special = dict(setup["special"])
        self._undefined: type[Exception] = jinja2.exceptions.UndefinedError

    def reply(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the examples of a chat; see ``_reply``.

        A message without content (a call of a tool) is given as it is, then with null, then with an empty text, until
        the template takes it: templates differ in which they can read.
        """
        messages, written = request["messages"], json.dumps(request)
        lacks = [message for message in messages if "content" not in message]
        for fill in ("absent", None, "") if lacks else ("",):
            given = messages
            if lacks and fill != "absent":
                given = [message if "content" in message else {**message, "content": fill} for message in messages]
            try:
                found = self._reply({**request, "messages": given})
            except (TypeError, self._undefined):
                if fill == "":
                    raise
                continue
            says_none = any("None" in example["text"] for example in found["examples"])
            if not (lacks and says_none and "None" not in written):
                return found
        raise Refused("a template that writes None for a message without content")

    def _reply(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the ``examples`` of a chat, as ``turns.find_examples`` does for ``turns`` and ``whole``.

        With ``marked`` their spans are what the template marks itself.
        """
        options = {**request.get("variables", {}), "tools": request.get("tools"), "documents": request.get("documents")}

        def marked(messages: Sequence[Message], **more: Any) -> str:
            random.seed(0)
            known = {**self._special, "add_generation_prompt": False, **more, **options, "messages": messages}
            text = self._template.render(known)
            if len(text) > MAX_TEXT:
                raise Refused(f"a text of {len(text)} characters")
            return str(text)

        def render(messages: Sequence[Message], **more: Any) -> str:
            text = marked(messages, **more)
            for mark in self._marks:
                text = text.replace(mark, "")
            return text

        messages = [_with_reasoning(message) for message in request["messages"]]
        if not request.get("marked"):
            turns, whole = request.get("turns", ()), request.get("whole", False)
            return {"examples": find_examples(render, messages, turns, whole=whole)}
        examples = find_examples(render, messages, (), whole=True, as_written=True)
        for example in examples:
            self._find_marks(example, marked(messages[: example["last"] + 1]), messages)
        return {"examples": examples}

    def _find_marks(self, example: Example, text: str, messages: Sequence[Message]) -> None:
        """Set the spans of an example to those that are marked in its text and new in it, and ``turns`` if they fit."""
        head, *pieces = text.split(self._marks[0])
        parts, length, spans = [head], len(head), []
        for piece in pieces:
            said, _, after = piece.partition(self._marks[1])
            if length + len(said) > example["fresh"]:
                spans.append((length, length + len(said)))
            parts += [said, after]
            length += len(said) + len(after)
        indices = range(example["first"], example["last"] + 1)
        answers = [index for index in indices if messages[index]["role"] == "assistant"]
        example |= {"text": "".join(parts), "spans": spans, "turns": answers if len(answers) == len(spans) else None}


def _reason(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "a text that needs more memory"
    said = " ".join(str(error).split())
    # Messages of the template's own come as they are.
    return (
        said[:160]
        if type(error).__name__ in ("TemplateError", "Refused") and said
        else (f"{type(error).__name__}: {said}"[:160])
    )


def _answer(renderer: Renderer, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    # Each message may take its part: a long chat is rendered once for every turn.
    signal.setitimer(signal.ITIMER_PROF, seconds + 0.01 * len(request["messages"]))
    try:
        return renderer.reply(request)
    except Rewritten as error:
        return {"rewrites": error.args[0]}
    except Exception as error:
        return {"error": _reason(error)}


def _set_up(setup: Mapping[str, Any]) -> Renderer:
    import jinja2.ext
    import jinja2.sandbox  # noqa: F401 - before memory is bounded

    resource.setrlimit(resource.RLIMIT_AS, (setup["memory"], setup["memory"]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.setitimer(signal.ITIMER_PROF, setup["seconds"])
    return Renderer(setup)


def main() -> None:
    """Answer requests, or lists of them, to the last; one that takes too long ends the process by SIGPROF."""
    renderer: Renderer | None = None
    seconds = 0.0
    for line in iter(sys.stdin.buffer.readline, b""):
        try:
            request, reply = json.loads(line), dict[str, Any]()
            if renderer is None:
                seconds, renderer = request["seconds"], _set_up(request)
            elif "batch" in request:
                reply = {"batch": [_answer(renderer, one, seconds) for one in request["batch"]]}
            else:
                reply = _answer(renderer, request, seconds)
            answer = json.dumps(reply)
        except Exception as error:
            answer = json.dumps({"error": _reason(error)})
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
