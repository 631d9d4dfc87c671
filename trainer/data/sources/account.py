"""What was read of a source, and what was not: by file, with the reason."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

_NAMED = 100
# Python's own caches are in the event alone: every folder of programs has them.
QUIET = "caches of Python"
_SPLIT = "chats are learnt turn by turn, as their template writes earlier turns anew"


class Example(Protocol):
    """What is counted of an example: ``encoding.Encoded``."""

    @property
    def ids(self) -> npt.NDArray[np.int32]:
        """Its tokens."""

    @property
    def learnt(self) -> npt.NDArray[np.bool_] | None:
        """Which are learnt; None for all."""

    @property
    def part(self) -> tuple[int, int]:
        """Which example of its document this is, and how many there are."""


class SourceAccount:
    """Counts the files and fields of a source while it is read.

    Args:
        subject: what the source is, as its lines begin.

    Attributes:
        announce: is called with a line for whatever is new from now on; None keeps it for ``lines``.
        read: number of files that were read.
        left_out: reason by which a file or folder was left out, by its name below the source.
        as_text: names of tables, and of JSON without records, that were read as plain text.
        passed_over: fields of records that were not read.
        split_chats: chats that became several examples, as their template writes earlier turns anew.
        split_examples: their examples.
        split_tokens: tokens of these examples together.
        split_learnt: tokens of these examples that are learnt, each once.
    """

    def __init__(self, subject: str = "data") -> None:
        self._subject = subject
        self.announce: Callable[[str], None] | None = None
        self.read = 0
        self.left_out: dict[str, str] = {}
        self.as_text: list[str] = []
        self.passed_over: Counter[str] = Counter()
        self.split_chats = self.split_examples = self.split_tokens = self.split_learnt = 0

    def count_example(self, example: "Example") -> None:
        """Note an example that was made of a document; those of a document that is one example are not counted."""
        number, parts = example.part
        if parts == 1:
            return
        if not self.split_chats and self.announce is not None:
            self.announce(f"{self._subject}: {_SPLIT}")
        self.split_chats += number == 0
        self.split_examples += 1
        self.split_tokens += len(example.ids)
        self.split_learnt += len(example.ids) if example.learnt is None else int(example.learnt.sum())

    def leave_out(self, name: str, reason: str) -> None:
        """Note a file or folder that is not read."""
        if name not in self.left_out and self.announce is not None and reason != QUIET:
            self.announce(f"{self._subject}: left out, {reason}: {_some([name])}")
        self.left_out[name] = reason

    def pass_over(self, fields: Iterable[str]) -> None:
        """Note fields of one record that are not read."""
        names = list(fields)
        new = [name for name in names if name not in self.passed_over]
        if new and self.announce is not None:
            self.announce(f"{self._subject}: fields of records that are not read: {_some(sorted(new))}")
        self.passed_over.update(names)

    def to_json(self) -> Mapping[str, Any]:
        """Return what the event says: at most ``_NAMED`` names of each kind, and how many there are."""
        return {
            "files_read": self.read,
            "left_out": dict(list(self.left_out.items())[:_NAMED]),
            "num_left_out": len(self.left_out),
            "read_as_text": self.as_text[:_NAMED],
            "fields_passed_over": dict(self.passed_over.most_common(_NAMED)),
            "learnt_turn_by_turn": {
                "chats": self.split_chats,
                "examples": self.split_examples,
                "tokens": self.split_tokens,
                "learnt": self.split_learnt,
            },
        }

    def lines(self) -> list[str]:
        """Return what a person should know: one line for each kind of thing that is not trained on."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.left_out.items():
            by_reason.setdefault(reason, []).append(name)
        found = [
            f"{self._subject}: left out, {reason}: {_some(names)}"
            for reason, names in by_reason.items()
            if reason != QUIET
        ]
        if self.as_text:
            found.append(f"{self._subject}: read as text, as they are: {_some(self.as_text)}")
        if self.passed_over:
            found.append(f"{self._subject}: fields of records that are not read: {_some(sorted(self.passed_over))}")
        if self.split_chats:
            counted = f"{self.split_chats:,} chats, {self.split_examples:,} examples"
            learnt = f"{self.split_learnt:,} of {self.split_tokens:,} tokens learnt"
            found.append(f"{self._subject}: {_SPLIT}: {counted}, {learnt}")
        return found


def _some(names: list[str]) -> str:
    shown = [name if name.isprintable() else ascii(name) for name in names[:5]]
    return ", ".join(shown) + (f" and {len(names) - 5:,} more" if len(names) > 5 else "")
