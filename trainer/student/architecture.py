"""What an architecture cannot be trained with, told by its code and config alone, before anything is loaded."""

from typing import Any

from q4kd.trainer.errors import InputError

# Kinds of layers whose positions see others by attention alone. What other kinds hand on, no mask holds back.
_BY_ATTENTION = ("attention", "full_attention", "sliding_attention", "chunked_attention")


def check_head_kind(model: Any) -> None:
    """Refuse a model without an output head, or with one that adds a bias: the loss multiplies by its weight alone.

    Raises:
        InputError: naming the architecture.
    """
    head, name = model.get_output_embeddings(), type(model).__name__
    if head is None or getattr(head, "weight", None) is None:
        remedy = "choose a student of another architecture"
        raise InputError("student", expected="an output head", got=f"{name}, which has none", remedy=remedy)
    if getattr(head, "bias", None) is not None:
        expected, remedy = "an output head without bias", "choose a student of another architecture"
        raise InputError("student", expected=expected, got=f"{name}, whose head has one", remedy=remedy)


def check_layers(model: Any) -> None:
    """Refuse an architecture that packed documents would change, as far as its config says it.

    Raises:
        InputError: where layers keep a state.
    """
    text, name = model.config.get_text_config(), type(model).__name__
    kinds = sorted(set(getattr(text, "layer_types", None) or ()))
    others = [kind for kind in kinds if kind not in _BY_ATTENTION]
    # transformers says of a whole architecture whether it may keep a state, and a config of its layers which do.
    if others or (not kinds and getattr(model, "_is_stateful", False)):
        expected = "layers that keep nothing from one document to the next, for packing: documents"
        got = f"{name}, whose {f'{others[0]} ' if others else ''}layers keep a state"
        raise InputError("student", expected=expected, got=got, remedy="set packing to none")
