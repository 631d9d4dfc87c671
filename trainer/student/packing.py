"""How a student is told of several documents in one window: by masks, which its own sliding window is put into.

transformers makes the mask of a model's sliding window itself, but takes a mask that it is given as it is.

Letters in shapes: B sequences, T positions.
"""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from q4kd.trainer.kernels.attention import document_mask

FULL, SLIDING = "full_attention", "sliding_attention"


def sliding_window(config: Any) -> int | None:
    """Return how many positions back a student's layers with a window see, itself counted; None where none has one.

    Mistral, Mixtral, Phi-3 and Starcoder2 have one window for all layers. In others ``layer_types`` says which layers
    have it; see ``has_layer_types``.
    """
    text = config.get_text_config()
    kind, window = type(text), getattr(text, "sliding_window", None)
    # An architecture without windows keeps what its config says of one, and does nothing with it.
    is_known = hasattr(kind, "sliding_window") or "sliding_window" in inspect.signature(kind.__init__).parameters
    is_used = is_known and getattr(text, "use_sliding_window", True)
    is_said = not getattr(text, "layer_types", None) or has_layer_types(config)
    return int(window) if is_used and window is not None and is_said else None


def has_layer_types(config: Any) -> bool:
    """Return whether ``layer_types`` gives some layers a window, and the others attention over everything.

    transformers' models that have it (Gemma 2 and 3, OLMo 3, gpt-oss, Cohere 2, Qwen) take a mask for each kind. What
    layers of a third kind take is not known here; ``check_isolation`` judges them by numbers.
    """
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ())
    return SLIDING in kinds and kinds <= {FULL, SLIDING}


def packed_inputs(
    starts_BT: Tensor, dtype: torch.dtype, window: int | None, *, by_kind: bool = False
) -> dict[str, Any]:
    """Return the mask ``[B, 1, T, T]`` of ``dtype`` and the positions int64 ``[B, T]`` of packed documents.

    Args:
        starts_BT: int64 first position of each position's document.
        dtype: type of the attention scores. The mask is a float that is added to them: eager attention would add a
            boolean mask as 0 and 1.
        window: what ``sliding_window`` returns.
        by_kind: what ``has_layer_types`` returns. With a window that is shorter than the sequence, there is then a mask
            for each kind of layer, by its name.
    """
    visible = document_mask(starts_BT)
    positions_T = torch.arange(starts_BT.shape[1], device=starts_BT.device)

    def added(seen: Tensor) -> Tensor:
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)

    mask: Tensor | dict[str, Tensor]
    if window is None or window >= len(positions_T):
        mask = added(visible)
    else:
        near = added(visible & (positions_T > positions_T[:, None] - window))
        mask = {FULL: added(visible), SLIDING: near} if by_kind else near
    return {"attention_mask": mask, "position_ids": positions_T - starts_BT}


def _no_packing(*_positions: Any, **_options: Any) -> None:
    """Say of any positions that they are those of one document a row."""


@contextlib.contextmanager
def without_packing_search() -> Iterator[None]:
    """Keep transformers from looking for packed documents: the host would wait to read every pass's positions.

    It looks where positions come without a mask; packed documents come with one here, so it would find none.
    """
    from transformers import masking_utils

    name = "find_packed_sequence_indices"
    found = getattr(masking_utils, name, _no_packing)
    setattr(masking_utils, name, _no_packing)
    try:
        yield
    finally:
        setattr(masking_utils, name, found)
