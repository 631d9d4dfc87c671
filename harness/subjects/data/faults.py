"""Faults in training data: masks dropped, labels kept, documents lost, orders that follow calls and not steps."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from q4kd.harness.runs.faults import Call, fault, patch, replace

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from q4kd.trainer.data.corpus import BatchOrder
    from q4kd.trainer.data.encoding import Encoded
    from q4kd.trainer.data.packing import Window, Windows
    from q4kd.trainer.data.stream import StreamOrder

_Reply = dict[str, Any]

_TEACHER = "q4kd.trainer.teacher.teacher:Teacher._checked_hidden"
_STUDENT = "q4kd.trainer.student.model:DistillationModel.hidden"
_CUT = "q4kd.trainer.data.packing:Windows._cut"
_REACHING = "q4kd.trainer.data.chats.template:_reaching"
_CHAT = "q4kd.trainer.data.chats.template:ChatTemplate.encode"
_CHECKED = "q4kd.trainer.data.chats.renderer:checked"
_ENCODE_ONE = "q4kd.trainer.data.encoding:DocumentEncoder._encode_one"
_BEGIN = "q4kd.trainer.data.tokenizing:begin_tokens"
_CONTEXT = "q4kd.trainer.data.sources.fields:read_context"
_WEIGHT = "q4kd.trainer.data.sources.fields:read_weight"
_MASKS = "q4kd.trainer.data.sources.fields:read_masks"
_ENCODE_ALL = "q4kd.trainer.data.encoding:DocumentEncoder.encode"
_PARQUET = "q4kd.trainer.data.shards:read_parquet"
_READ = "q4kd.trainer.data.readers:read_documents"
_BATCH = "q4kd.trainer.data.corpus:BatchOrder.batch"
_STREAM_BATCH = "q4kd.trainer.data.stream:StreamOrder.batch"
_LABELS = "q4kd.trainer.train.guards:check_labels"


@patch("loop", "teacher-sees-all", "the teacher attends across the borders of packed documents", _TEACHER)
@patch("loop", "student-sees-all", "the student attends across the borders of packed documents", _STUDENT)
def _sees_all(original: Call, self: object, ids: object, _starts: object = None) -> object:
    return original(self, ids, None)


@patch("loss", "border-labels-kept", "the last token of a document is taught the first of the next one", _CUT)
def _border_labels_kept(original: Callable[..., "Window"], self: "Windows", start: int, stop: int) -> "Window":
    window = original(self, start, stop)
    labels = self.tokens.ids[start + 1 : stop].astype("int64")
    return dataclasses.replace(window, labels=labels) if len(labels) == self.seq_len else window


@patch("loss", "prompt-labelled", "prompts are learnt too in spite of completion_only", _CHAT)
def _prompt_labelled(original: Callable[..., "list[Encoded]"], *arguments: object) -> "list[Encoded]":
    return [dataclasses.replace(encoded, learnt=None) for encoded in original(*arguments)]


@patch("loop", "begin-token-left-out", "texts begin without what the tokenizer puts before them", _BEGIN)
def _begin_left_out(_original: Call, *_arguments: object) -> tuple[int, ...]:
    return ()


@patch("loop", "tools-dropped", "the template is not given a record's tools", _CONTEXT)
def _tools_dropped(_original: Call, *_arguments: object) -> dict[str, object]:
    return {}


@patch("loss", "message-weights-ignored", "an answer of weight 0 is learnt", _WEIGHT)
def _weights_ignored(_original: Call, *_arguments: object) -> None:
    return None


@patch("loss", "token-masks-ignored", "padding is text, and masks of what is learnt are passed over", _MASKS)
def _masks_ignored(_original: Call, _record: object, count: int, *_arguments: object) -> tuple[slice, None]:
    return slice(0, count), None


def _without_first(encoded: "Encoded") -> "Encoded":
    """Return tokens of which the first learnt one of every run is not learnt."""
    if encoded.learnt is None:
        return encoded
    learnt = encoded.learnt.copy()
    learnt[1:] &= encoded.learnt[:-1]
    learnt[0] = False
    return dataclasses.replace(encoded, learnt=learnt)


@patch("loss", "turn-first-unlabelled", "the first token of what the assistant says has no label", _CHAT)
def _first_of_turn_unlabelled(original: Callable[..., "list[Encoded]"], *arguments: object) -> "list[Encoded]":
    return [_without_first(encoded) for encoded in original(*arguments)]


@patch("loss", "completion-first-unlabelled", "the first token of a completion has no label", _ENCODE_ONE)
def _first_unlabelled(original: Callable[..., "Encoded"], *arguments: object) -> "Encoded":
    return _without_first(original(*arguments))


@patch("loss", "turn-border-unlabelled", "a token that also holds what stands before a turn has no label", _REACHING)
def _border_unlabelled(
    original: Callable[..., "npt.NDArray[np.bool_]"], offsets: "npt.NDArray[np.int64]", begin: int, end: int
) -> "npt.NDArray[np.bool_]":
    return original(offsets, begin, end) & (offsets[:, 0] >= begin)


@patch("loop", "last-turn-alone-learnt", "of a chat that is several examples only the last is kept", _CHAT)
def _last_turn_alone(original: Callable[..., "list[Encoded]"], *arguments: object) -> "list[Encoded]":
    return [dataclasses.replace(encoded, part=(0, 1)) for encoded in original(*arguments)[-1:]]


@patch("loop", "history-as-first-written", "earlier turns are kept as they were learnt, and not written anew", _CHECKED)
def _history_as_written(original: Callable[..., _Reply], reply: _Reply) -> _Reply:
    """Join the examples of a chat: before each answer stands what was learnt before it."""
    joined: _Reply = {}
    for example in original(reply).get("examples", ()):
        if not joined:
            joined = {**example}
            continue
        begin = example["spans"][0][0]
        # The question after an answer is what follows the last end of a turn of another.
        asked = example["text"].lower().rindex("user", 0, begin)
        text, move = example["text"][asked:], len(joined["text"]) - asked
        joined["text"] += text
        joined["spans"] = [*joined["spans"], *((first + move, last + move) for first, last in example["spans"])]
        joined["turns"] = [*joined["turns"], *example["turns"]]
    return {"examples": [joined]} if joined else reply


@patch("loss", "history-learnt-again", "answers are learnt again where they are the history of others", _CHECKED)
def _history_learnt_again(original: Callable[..., _Reply], reply: _Reply) -> _Reply:
    first, *more = original(reply).get("examples") or [{}]
    again = [{**one, "spans": [(0, one["spans"][-1][1])], "turns": [0]} for one in more]
    return {"examples": [first, *again]} if first else reply


@patch("loop", "second-group-lost", "the second 512 documents are not tokenised", _ENCODE_ALL)
def _second_group_lost(original: Callable[..., Iterable[object]], self: object, documents: object) -> Iterator[object]:
    return (encoded for number, encoded in enumerate(original(self, documents)) if not 512 <= number < 1024)


@patch("loop", "parquet-first-rows-only", "of a parquet file only the first 256 rows are read", _PARQUET)
def _first_rows_only(original: Callable[..., Iterable[object]], *arguments: object) -> Iterator[object]:
    return itertools.islice(original(*arguments), 256)


@patch("loop", "document-lost", "the sixth document of a file is skipped", _READ)
def _document_lost(
    original: Callable[..., Iterable[object]], *arguments: object, **options: object
) -> Iterator[object]:
    return (document for number, document in enumerate(original(*arguments, **options)) if number != 5)


@patch("loop", "every-epoch-alike", "the order is not drawn anew for each epoch", _BATCH)
def _every_epoch_alike(original: Call, self: "BatchOrder", step: int) -> object:
    return original(self, step % self.steps_per_epoch)


@fault("loop", "reader-state", "batches follow the calls, not the step", _BATCH)
def _reader_state() -> None:
    """Give the next batch whatever step is asked for, as a loader does that is not wound forward."""

    def make(original: Call) -> Call:
        calls = itertools.count()
        return lambda self, _step: original(self, next(calls))

    replace(_BATCH, make)


@patch("loop", "stream-not-wound", "a resumed stream starts at its beginning", _STREAM_BATCH)
def _stream_not_wound_forward(original: Call, self: "StreamOrder", step: int) -> object:
    first: int = self.__dict__.setdefault("first_step", step)
    return original(self, step - first)


@patch("loop", "label-guard-skipped", "that there is a label is not looked for", _LABELS)
def _no_label_guard(_original: Call, *_arguments: object) -> None:
    return
