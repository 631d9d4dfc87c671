"""A student's sizes, found without allocating it: its own code runs on torch's meta device, which has shapes and no
storage. Its parameters are counted, and what autograd keeps of a forward pass for the backward pass.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from q4kd.trainer.config.settings import DistillConfig
from q4kd.trainer.errors import InputError, first_line
from q4kd.trainer.student.architecture import check_head_kind, check_layers
from q4kd.trainer.student.experts import check_router_loss
from q4kd.trainer.student.folder import check_folder, reading_student
from q4kd.trainer.student.loaded import cap_attention, without_report
from q4kd.trainer.student.lora import add_adapters
from q4kd.trainer.student.packing import has_layer_types, packed_inputs, sliding_window
from q4kd.trainer.student.stored_head import unties_head


@dataclass(frozen=True)
class StudentShape:
    """A student's sizes."""

    parameters: int  # number of weights, tied ones once
    linear_weights: int  # number of weights in matrices that multiply, the head included; for FLOPs
    lora_parameters: int  # weights of adapters of rank 1 on every linear layer but the head
    largest: int  # number of weights of the largest parameter
    vocab: int  # rows of the head
    hidden: int  # hidden size
    layers: int  # decoder layers
    is_tied: bool  # whether head and embedding are one parameter
    saved_bytes: int  # that autograd keeps of one forward pass up to the hidden states, every tensor once
    largest_saved_bytes: int  # of the largest of these tensors
    layer_input_bytes: int  # of the tensor that goes from layer to layer
    weight_bytes: int  # of a weight
    liger_saves: int  # bytes within ``saved_bytes`` that Liger's RMSNorm and SwiGLU do not keep


class _Attention(torch.autograd.Function):
    """Keeps what the fused attention kernels keep: query, key, value, mask, output and one float32 per query."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, length, _ = query.shape
        # The output lies in memory as the kernels lay it out, so that what follows takes no copy.
        out = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        sums = query.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums, *([mask] if mask is not None else []))
        return out

    @staticmethod
    def backward(ctx: Any, *_gradients: Any) -> Any:
        raise NotImplementedError("shapes only")


class _Grouped(torch.autograd.Function):
    """Keeps what the grouped products of experts keep: all tokens, sorted by expert, and the experts' weights."""

    @staticmethod
    def forward(ctx: Any, tokens_MK: Tensor, weight_EKN: Tensor) -> Tensor:
        ctx.save_for_backward(tokens_MK, weight_EKN)
        return tokens_MK.new_empty(len(tokens_MK), weight_EKN.shape[-1])

    @staticmethod
    def backward(ctx: Any, *_gradients: Any) -> Any:
        raise NotImplementedError("shapes only")


class _ShapesOnly(TorchFunctionMode):
    """Gives fused attention, which has no meta form, one of its own, and answers questions about values with yes.

    transformers asks one: whether the positions are those of one unbroken sequence. (Whether ids hold padding is asked
    by ``in``, and denied.) The meta form of the products of experts takes bfloat16 alone, where the CPU takes float32.
    """

    def __torch_function__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if function is torch.Tensor.__bool__:
            return True
        if function is torch.Tensor.__contains__:
            return False
        if function is F.scaled_dot_product_attention:
            mask = args[3] if len(args) > 3 else options.get("attn_mask")
            return _Attention.apply(*args[:3], mask)  # type: ignore[no-untyped-call]
        if getattr(function, "__name__", "") in ("grouped_mm", "_grouped_mm"):
            return _Grouped.apply(*args[:2])  # type: ignore[no-untyped-call]
        return function(*args, **options)


def shape_student(
    folder: Path,
    batch: int,
    length: int,
    dtype: torch.dtype,
    *,
    is_masked: bool = False,
    adapted: DistillConfig | None = None,
) -> StudentShape:
    """Find a student's sizes for micro-batches of ``batch`` sequences of ``length`` positions.

    Weights and products are of ``dtype``. ``is_masked`` says whether attention gets a mask, as with packed documents:
    keys and values are then kept once for each query head. ``adapted`` are the settings of a run that trains adapters:
    what is saved for the gradients of weights is not kept for frozen ones. Parameters are counted without adapters.

    Raises:
        InputError: when the folder is not a causal LM, has fewer positions, a head that the loss cannot multiply by,
            a router loss, or layers that no mask keeps apart where one is needed, or its code cannot be followed
            without values.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    check_folder(folder)
    with reading_student(folder), without_report():
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        _check_positions(config.get_text_config(), length)
        make: Any = AutoModelForCausalLM.from_config
        with torch.device("meta"):
            model = make(config, dtype=dtype, trust_remote_code=False)
            check_head_kind(model)
            check_router_loss(model)
            if is_masked:
                check_layers(model)
            if _is_tied(model) and unties_head(folder, model, dtype):
                config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
                model = make(config, dtype=dtype, trust_remote_code=False)
            cap_attention(model)
            counts = _count_weights(model)
            if adapted is not None:
                add_adapters(model, adapted)
                for parameter in model.parameters():  # peft leaves adapters of weights without storage in float32
                    parameter.data = parameter.data.to(dtype)
            model.train()
            try:
                saved, largest, inputs = _count_saved(model, batch, length, dtype if is_masked else None)
            except Exception as error:
                if is_masked:
                    _count_saved(model, batch, length, None)  # What fails without a mask too is not the mask's.
                    raise _no_mask(model, error) from error
                raise
        text = config.get_text_config()
        return StudentShape(
            **counts,
            layers=int(text.num_hidden_layers),
            saved_bytes=saved,
            largest_saved_bytes=largest,
            layer_input_bytes=inputs,
            weight_bytes=dtype.itemsize,
            liger_saves=_liger_saves(text, batch * length, dtype.itemsize),
        )


def _check_positions(config: Any, length: int) -> None:
    """Refuse sequences that are longer than a student has positions, whether it would fail there or extrapolate."""
    most = getattr(config, "max_position_embeddings", None)
    if type(most) is int and length > most:
        expected, got = f"at most {most}, the student's max_position_embeddings", str(length)
        raise InputError(f"seq_len {length}", expected=expected, got=got, remedy="give a smaller --seq-len")


def _no_mask(model: Any, error: Exception) -> InputError:
    expected = "a student whose attention takes a mask [B, 1, T, T], for packing: documents"
    got = f"{type(model).__name__} ({first_line(error)})"
    return InputError("setting packing", expected=expected, got=got, remedy="set packing to none")


class _Counts(TypedDict):
    """The fields of ``StudentShape`` that are found without a forward pass."""

    parameters: int
    linear_weights: int
    lora_parameters: int
    largest: int
    vocab: int
    hidden: int
    is_tied: bool


def _count_weights(model: Any) -> _Counts:
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    linears = [module for module in model.modules() if isinstance(module, (nn.Linear, Conv1D))]
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "linear_weights": sum(linear.weight.numel() for linear in linears),
        "lora_parameters": sum(sum(linear.weight.shape) for linear in linears if linear is not head),
        "largest": max(parameter.numel() for parameter in model.parameters()),
        "vocab": head.weight.shape[0],
        "hidden": head.weight.shape[1],
        "is_tied": _is_tied(model),
    }


def _is_tied(model: Any) -> bool:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    return getattr(head, "weight", None) is embedding.weight


def _liger_saves(config: Any, tokens: int, size: int) -> int:
    """Return the bytes that Liger does not keep: each norm's float32 input (2 a layer), and one of 4 tensors of SwiGLU.

    (Liger-Kernel's rms_norm.py keeps its input and one float32 a row, swiglu.py gate and up.) Architectures without an
    ``intermediate_size``, such as GPT-2, have no SwiGLU, and Liger has no kernels for them.
    """
    ffn = getattr(config, "intermediate_size", None)
    if type(ffn) is not int:
        return 0
    norms = 2 * config.num_hidden_layers + 1
    saved: int = tokens * (norms * 4 * config.hidden_size + config.num_hidden_layers * size * ffn)
    return saved


def _count_saved(model: Any, batch: int, length: int, mask: torch.dtype | None) -> tuple[int, int, int]:
    """Return the bytes that autograd saves beside the weights, of the largest tensor, and of the hidden states."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    # They are kept alive, so that no storage's address comes twice.
    kept: dict[int, Any] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    ids = torch.zeros(batch, length, dtype=torch.int64, device="meta")
    packed: dict[str, Any] = {}
    if mask is not None:  # ``DistillationModel.hidden`` makes them so.
        window, by_kind = sliding_window(model.config), has_layer_types(model.config)
        packed = packed_inputs(ids, mask, window, by_kind=by_kind)
    with _ShapesOnly(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.base_model(input_ids=ids, use_cache=False, **packed).last_hidden_state
    sizes = [storage.nbytes() for storage in kept.values()]
    return sum(sizes), max(sizes), math.prod(hidden.shape) * hidden.element_size()
