"""Which fields of a record count. Those that say what is learnt are honoured, or refused by name; none is dropped.

The names are those of transformers, TRL, OpenAI's fine-tuning files, Axolotl and ms-swift.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from q4kd.trainer.errors import InputError

Kind = Literal["chat", "text", "pair", "tokens"]
# 1 where a token is learnt.
MASKS = ("completion_mask", "assistant_masks", "assistant_mask", "loss_mask")
# Weights of a whole record, and of a message: 1 is learnt, 0 is not.
_WEIGHTS = ("weight", "sample_weight", "loss_weight", "loss_weights")
_MESSAGE_WEIGHTS = ("weight", "train", "training", "trainable", "loss", "loss_weight", "loss_mask")
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_ANSWERS = ("chosen", "rejected")
_CONTEXT = ("tools", "documents", "chat_template_kwargs")
_OF_TOKENS = ("labels", "attention_mask", *MASKS)
_PACKED = ("position_ids", "seq_lengths", "cu_seqlens")
_READ: Mapping[Kind, tuple[str, ...]] = {
    "chat": (*_CONTEXT, "label"),
    "text": (),
    "pair": ("label",),
    "tokens": ("input_ids", *_OF_TOKENS, "position_ids"),
}
_REFUSED: Mapping[Kind, tuple[str, ...]] = {
    "chat": (*_MEDIA, *_ANSWERS, "system", "functions", *_OF_TOKENS),
    "text": (*_MEDIA, *_OF_TOKENS),
    "pair": (*_MEDIA, *_ANSWERS, "system", "tools", "functions", "documents", *_OF_TOKENS),
    "tokens": (*_MEDIA, "seq_lengths", "cu_seqlens"),
}
# Every field, beside those that hold the text, that is looked at.
MEANINGFUL = tuple(
    dict.fromkeys((*_CONTEXT, "label", *_OF_TOKENS, *_PACKED, *_WEIGHTS, *_MEDIA, *_ANSWERS, "system", "functions"))
)

# A field of such a name says what is learnt, too, in a way that is not known here.
_SAYS_WHAT_IS_LEARNT = re.compile(r"(^|_)(masks?|masked|labels?|(loss_)?weights?)$")
_MESSAGE_SAYS = re.compile(r"(^|_)(masks?|masked|train(able|ing|_detail|ing_detail|_on_turn)?|learn|loss(_weights?)?)$")
_HARMLESS = ("special_tokens_mask", "label")


def refuse_field(where: str, field: str, expected: str, got: object) -> InputError:
    """Return the refusal of a field at ``where``: a file and its line or row."""
    remedy = f"mend or remove the record, or pass --ignore-fields {field} to train as if it were not there"
    return InputError(where, expected=expected, got=str(got)[:80], remedy=remedy)


def _is_given(value: object) -> bool:
    return value is not None and not (isinstance(value, str | Sequence | Mapping) and len(value) == 0)


def check_record(record: Mapping[str, Any], kind: Kind, where: str, own: Sequence[str]) -> set[str]:
    """Refuse what a record of this kind says and nobody would follow; return the fields that are passed over.

    Args:
        record: the record.
        kind: kind of its document.
        where: its file and line.
        own: the fields that hold the document itself.

    Raises:
        InputError: naming the field.
    """
    for field in _REFUSED[kind]:
        if field not in own and _is_given(record.get(field)):
            names = {"pair": "prompt and completion", "tokens": "input_ids"}
            expected = f'a record of {names.get(kind, kind)} without "{field}", which is not followed there'
            raise refuse_field(where, field, expected, f"{field} {_shown(record[field])}")
    for field in _WEIGHTS:
        value = record.get(field)
        if _is_given(value) and field not in own and (isinstance(value, bool | str) or value != 1):
            raise refuse_field(where, field, f'"{field}" 1: records are not weighed', _shown(value))
    if kind in ("chat", "tokens"):
        known = (*own, *_READ[kind], *_WEIGHTS, *_HARMLESS)
        for field in filter(_SAYS_WHAT_IS_LEARNT.search, map(str, set(record).difference(known))):
            if _is_given(record[field]):
                expected = "fields that are followed: " + ", ".join(_OF_TOKENS)
                raise refuse_field(where, field, expected, f"{field} {_shown(record[field])}")
    label = record.get("label")
    if "label" in _READ[kind] and "label" not in own and isinstance(label, bool | int) and label in (0, False):
        raise refuse_field(where, "label", 'answers that are to be learnt ("label" true)', "label false")
    return set(record).difference(own, _READ[kind], _WEIGHTS)


def _shown(value: object) -> str:
    return f"of {len(value)}" if isinstance(value, Sequence) and not isinstance(value, str) else repr(value)[:40]


def read_context(record: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return what a chat's template is given beside the messages: ``tools``, ``documents``, ``variables``.

    Raises:
        InputError: where one is not a list of objects, or the variables are no object.
    """
    context: dict[str, Any] = {}
    for field in ("tools", "documents"):
        value = record.get(field)
        if isinstance(value, str):  # as TRL's and ms-swift's files keep tools
            try:
                value = json.loads(value)
            except (ValueError, RecursionError) as error:
                raise refuse_field(where, field, f'JSON in "{field}"', value) from error
        if not _is_given(value):
            continue
        if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
            raise refuse_field(where, field, f'a list of objects in "{field}"', _shown(value))
        context[field] = value
    variables = record.get("chat_template_kwargs")
    if _is_given(variables):
        if not isinstance(variables, dict) or not all(isinstance(name, str) for name in variables):
            expected = 'an object in "chat_template_kwargs"'
            raise refuse_field(where, "chat_template_kwargs", expected, _shown(variables))
        taken = {"messages", "tools", "documents", "add_generation_prompt"}.intersection(variables)
        if taken:
            expected = "chat_template_kwargs beside messages, tools and documents"
            raise refuse_field(where, "chat_template_kwargs", expected, ", ".join(sorted(taken)))
        context["variables"] = variables
    return context


def read_weight(message: Mapping[str, Any], where: str) -> bool | None:
    """Return whether a message is learnt, or None where it does not say.

    Raises:
        InputError: for a weight other than 0 and 1, or two that differ.
    """
    found = None
    for field in _MESSAGE_WEIGHTS:
        value = message.get(field)
        if value is None:
            continue
        if not isinstance(value, bool | int | float) or value not in (0, 1) or found not in (None, bool(value)):
            raise refuse_field(where, field, f'"{field}" 0 or 1', value)
        found = bool(value)
    for field in filter(_MESSAGE_SAYS.search, map(str, set(message).difference(_MESSAGE_WEIGHTS))):
        if message[field] is not None:
            raise refuse_field(where, field, f"one of {', '.join(_MESSAGE_WEIGHTS)}", f"{field} {message[field]!r}")
    return found


def check_message(message: Mapping[str, Any], where: str) -> None:
    """Refuse what a message brings and no template gets: media, and what belongs beside the messages.

    Raises:
        InputError: naming the field.
    """
    for field in (*_MEDIA, "tools", "functions", "documents"):
        if _is_given(message.get(field)):
            expected = f'"{field}" beside the messages' if field in _CONTEXT else f'messages without "{field}"'
            raise refuse_field(where, field, expected, f"{field} {_shown(message[field])}")


def without_weights(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message without its weights and without what is null, as templates get it."""
    return {str(key): part for key, part in message.items() if part is not None and key not in _MESSAGE_WEIGHTS}


def _flags(value: object, field: str, where: str, count: int) -> npt.NDArray[np.bool_]:
    try:
        mask = np.asarray(value)
    except (ValueError, OverflowError) as error:
        raise refuse_field(where, field, f'0 and 1 in "{field}"', error) from error
    if mask.shape != (count,) or mask.dtype.kind not in "biuf" or not bool(((mask == 0) | (mask == 1)).all()):
        got = f"{mask.dtype} {mask.shape}"
        raise refuse_field(where, field, f'"{field}" as long as input_ids ({count}), each 0 or 1', got)
    return mask.astype(np.bool_)


def read_masks(record: Mapping[str, Any], count: int, where: str) -> tuple[slice, npt.NDArray[np.bool_] | None]:
    """Return which of ``count`` tokens are no padding, and which are learnt: bool ``[count]``, None for all.

    Raises:
        InputError: for a mask of another length, with holes, or positions that start again.
    """
    learnt: npt.NDArray[np.bool_] | None = None
    for field in MASKS:
        if record.get(field) is not None:
            mask = _flags(record[field], field, where, count)
            learnt = mask if learnt is None else learnt & mask
    seen = slice(0, count)
    if record.get("attention_mask") is not None:
        mask = _flags(record["attention_mask"], "attention_mask", where, count)
        ones = np.flatnonzero(mask)
        if not len(ones) or len(ones) != ones[-1] - ones[0] + 1:
            expected = "an attention_mask whose zeros are padding, before or after the text"
            raise refuse_field(where, "attention_mask", expected, f"{len(ones)} ones with zeros between")
        seen = slice(int(ones[0]), int(ones[-1]) + 1)
    if record.get("position_ids") is not None:
        positions = np.asarray(record["position_ids"])
        if positions.shape != (count,) or not np.array_equal(positions[seen], np.arange(seen.stop - seen.start)):
            raise refuse_field(where, "position_ids", "position_ids of one document: 0, 1, 2, …", "others")
    return seen, learnt
