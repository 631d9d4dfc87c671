"""What transformers made of a student's folder, judged: every weight found, finite, and the head what it seems."""

import contextlib
import logging
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from q4kd.trainer.student.folder import refuse_student


@contextlib.contextmanager
def without_report() -> Iterator[None]:
    """Keep transformers' table of tensors that were not found, and its warnings, to itself: what matters is refused.

    Threads that run already, such as one that reads a tokenizer, go on saying what they have to say.
    """
    from transformers.utils import logging as its_logging

    its_logging.get_verbosity()  # makes the library's handler, where nothing has been logged yet
    handlers = list(logging.getLogger("transformers").handlers)
    others = set(threading.enumerate()) - {threading.current_thread()}

    def passes(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or threading.current_thread() in others

    for handler in handlers:
        handler.addFilter(passes)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(passes)


def check_finite(folder: Path, model: nn.Module) -> None:
    """Refuse weights that are not numbers: every loss would be NaN, and guards would blame something else."""
    for name, parameter in model.named_parameters():
        if parameter.numel() == 0:
            continue
        # The least and the largest carry NaN, and are found at the memory's speed.
        ends = torch.stack(torch.aminmax(parameter.detach()))
        if not bool(ends.isfinite().all()):
            found = "NaN" if bool(ends.isnan().any()) else "an infinity"
            remedy = "fetch the model again, or take a checkpoint from before it diverged"
            raise refuse_student(folder, "weights that are finite numbers", f"{found} in {name}", remedy)


def check_head(folder: Path, model: Any) -> None:
    """Refuse a model without a head, and say in its config what its tensors are, where that says they are tied.

    A head of its own beside a config that ties it is what a merge of adapters into one of the two leaves.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or embedding is None or getattr(head, "weight", None) is None:
        got, remedy = f"{type(model).__name__}, which has none", "choose a student of another architecture"
        raise refuse_student(folder, "a model with an embedding and an output head", got, remedy)
    if getattr(model.config, "tie_word_embeddings", False) and head.weight is not embedding.weight:
        model.config.tie_word_embeddings = False


def cap_attention(model: Any) -> None:
    """Have attention whose logits are capped computed by code that caps them.

    torch's fused attention cannot. Some releases of transformers refuse it for such a model, others leave the cap out.
    """
    config = model.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None) is not None and config._attn_implementation == "sdpa":
        model.set_attn_implementation("eager")


def check_loaded(folder: Path, info: Mapping[str, Any]) -> None:
    """Refuse a student that did not get all of its weights, or not all weights of which it got.

    ``info`` is what ``from_pretrained`` returns with ``output_loading_info``.

    Raises:
        InputError: naming the first tensor, and the prefix where one explains it.
    """
    missing, unexpected = (sorted(map(str, info.get(key) or ())) for key in ("missing_keys", "unexpected_keys"))
    if info.get("mismatched_keys") or info.get("error_msgs"):
        first = [*(info.get("mismatched_keys") or ()), *(info.get("error_msgs") or ())][0]
        raise refuse_student(
            folder, "tensors of its config's shapes", str(first)[:160], "name the config of this model"
        )
    if not missing and not unexpected:
        return
    expected, remedy = "a tensor for every weight of its config, and no other", "save or fetch the model again"
    prefix = _common_prefix(missing, unexpected)
    if prefix:
        got = f"tensors whose names begin with {prefix}"
        remedy = "save the model that is wrapped (torch.compile's is model._orig_mod), or rename its tensors"
        raise refuse_student(folder, expected, got, remedy)
    said = [f"{len(missing)} missing, {missing[0]} first"] if missing else []
    said += [f"{len(unexpected)} unknown, {unexpected[0]} first"] if unexpected else []
    raise refuse_student(folder, expected, "; ".join(said)[:200], remedy)


def _common_prefix(missing: list[str], unexpected: list[str]) -> str:
    """Return what the unknown names begin with before a missing one, if that is one thing."""
    for name in missing:
        for other in unexpected:
            if other != name and other.endswith(f".{name}"):
                prefix = other.removesuffix(name)
                return prefix if all(one.startswith(prefix) for one in unexpected) else ""
    return ""
