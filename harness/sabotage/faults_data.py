"""Faults in training data: masks dropped, labels kept, documents lost, orders that follow calls and not steps."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

from q4kd.harness.sabotage.registry import declare, replace

_TEACHER = "q4kd.trainer.teacher:Teacher._checked_hidden"
_STUDENT = "q4kd.trainer.student:DistillationModel.hidden"
_CUT = "q4kd.trainer.packing:Windows._cut"
_CHAT = "q4kd.trainer.chat:ChatTemplate.encode"
_READ = "q4kd.trainer.documents:read_documents"
_BATCH = "q4kd.trainer.data:BatchOrder.batch"
_STREAM_BATCH = "q4kd.trainer.stream:StreamOrder.batch"
_LABELS = "q4kd.trainer.guards:check_labels"
_Call = Callable[..., Any]


def _teacher_sees_all() -> None:
    replace(_TEACHER, lambda original: lambda self, ids, _starts: original(self, ids, None))


def _student_sees_all() -> None:
    replace(_STUDENT, lambda original: lambda self, ids, _starts=None: original(self, ids))


def _border_labels_kept() -> None:
    def make(original: _Call) -> _Call:
        def cut(self: Any, start: int, stop: int) -> Any:
            window = original(self, start, stop)
            labels = self.tokens.ids[start + 1 : stop].astype("int64")
            return dataclasses.replace(window, labels=labels) if len(labels) == self.seq_len else window

        return cut

    replace(_CUT, make)


def _prompt_labelled() -> None:
    def make(original: _Call) -> _Call:
        def encode(*arguments: Any) -> Any:
            return dataclasses.replace(original(*arguments), learnt=None)

        return encode

    replace(_CHAT, make)


def _document_lost() -> None:
    def make(original: _Call) -> _Call:
        def read(*arguments: Any, **options: Any) -> Any:
            return (document for number, document in enumerate(original(*arguments, **options)) if number != 5)

        return read

    replace(_READ, make)


def _every_epoch_alike() -> None:
    replace(_BATCH, lambda original: lambda self, step: original(self, step % self.steps_per_epoch))


def _reader_state() -> None:
    """Give the next batch whatever step is asked for, as a loader does that is not wound forward."""

    def make(original: _Call) -> _Call:
        calls = itertools.count()
        return lambda self, _step: original(self, next(calls))

    replace(_BATCH, make)


def _stream_not_wound_forward() -> None:
    def make(original: _Call) -> _Call:
        def batch(self: Any, step: int) -> Any:
            first = self.__dict__.setdefault("first_step", step)
            return original(self, step - first)

        return batch

    replace(_STREAM_BATCH, make)


def _no_label_guard() -> None:
    replace(_LABELS, lambda _original: lambda *_arguments: None)


declare(
    "loop",
    "teacher-sees-all",
    "the teacher attends across the borders of packed documents",
    _teacher_sees_all,
    _TEACHER,
)
declare(
    "loop",
    "student-sees-all",
    "the student attends across the borders of packed documents",
    _student_sees_all,
    _STUDENT,
)
declare(
    "loss",
    "border-labels-kept",
    "the last token of a document is taught the first of the next one",
    _border_labels_kept,
    _CUT,
)
declare("loss", "prompt-labelled", "prompts are learnt too in spite of completion_only", _prompt_labelled, _CHAT)
declare("loop", "document-lost", "the sixth document of a file is skipped", _document_lost, _READ)
declare("loop", "every-epoch-alike", "the order is not drawn anew for each epoch", _every_epoch_alike, _BATCH)
declare("loop", "reader-state", "batches follow the calls, not the step", _reader_state, _BATCH)
declare(
    "loop", "stream-not-wound", "a resumed stream starts at its beginning", _stream_not_wound_forward, _STREAM_BATCH
)
declare("loop", "label-guard-skipped", "that there is a label is not looked for", _no_label_guard, _LABELS)
