"""A process that renders chats, started when it is needed and ended when it is not."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SECONDS, MEMORY_BYTES = 5.0, 1 << 30
_MAX_REPLY = 1 << 30


class RenderError(Exception):
    """A chat that has no text; the message says why in a few words."""


class RewritingError(RenderError):
    """A message whose text depends on the messages after it."""


class ChatRenderer:
    """Renders chats in a process of its own: ``SECONDS`` of processor time a chat, ``MEMORY_BYTES`` of address space.

    Args:
        template: the chat template.
        special: texts of special tokens, by the names under which a template knows them.
        date: the day on which the template is read, as ``2026-11-30``.
    """

    def __init__(self, template: str, special: Mapping[str, Any], date: str) -> None:
        self._setup = {
            "template": template, "special": dict(special), "date": date, "seconds": SECONDS, "memory": MEMORY_BYTES,
        }  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the reply to a request; ``program.Renderer.reply`` says what both hold.

        Raises:
            RenderError: when the template refuses the chat, or takes too much for it.
        """
        return checked(self._exchange(request))

    def render_all(self, requests: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return the replies to several requests at once, to be ``checked`` each; none where one ended the process."""
        try:
            replies: list[dict[str, Any]] = self._exchange({"batch": requests}).get("batch", [])
        except RenderError:
            return []
        return replies

    def _exchange(self, request: Mapping[str, Any]) -> dict[str, Any]:
        try:
            line = json.dumps(request)
        except (TypeError, ValueError, RecursionError) as error:
            raise RenderError(f"a value that JSON has not: {error}"[:160]) from error
        if self._process is None:
            self._start()
        return self._ask(line)

    def _start(self) -> None:
        command = [sys.executable, "-P", "-X", "utf8", str(Path(__file__).with_name("program.py"))]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        # It is in a group of its own: Ctrl-C is for the run, which ends it by closing its input.
        self._process = subprocess.Popen(command, **pipes, process_group=0, env={**os.environ, "PYTHONHASHSEED": "0"})
        self._end = weakref.finalize(self, _end, self._process)
        try:
            checked(self._ask(json.dumps(self._setup)))
        except RenderError:
            self.close()  # it would take the next request for its setup
            raise

    def _ask(self, line: str) -> dict[str, Any]:
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(line.encode() + b"\n")
            process.stdin.flush()
        answer = process.stdout.readline(_MAX_REPLY)
        if not answer.endswith(b"\n"):
            process.wait()
            self.close()
            raise RenderError(_explain(process.returncode))
        reply: dict[str, Any] = json.loads(answer)
        return reply

    def close(self) -> None:
        """End the process; the next chat starts another."""
        if self._process is None:
            return
        self._process = None
        self._end()


def checked(reply: dict[str, Any]) -> dict[str, Any]:
    """Return a reply that has a text.

    Raises:
        RenderError: saying why it has none.
    """
    if "rewrites" in reply:
        raise RewritingError(f"one that writes message {reply['rewrites']} in two ways")
    if "error" in reply:
        raise RenderError(str(reply["error"]))
    return reply


def _end(process: "subprocess.Popen[bytes]") -> None:
    assert process.stdin is not None and process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.close()
    process.stdout.close()
    process.kill()  # it may be in the middle of a text that nobody waits for
    process.wait()


def _explain(code: int) -> str:
    if code == -signal.SIGPROF:
        return f"one that takes more than {SECONDS:g} s of processor time"
    name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"one that ends its process ({name})"
