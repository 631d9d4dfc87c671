"""LoRA adapters on the student, by ``peft``: frozen weights W are used as W + (lora_alpha / lora_rank) * B A.

(Hu et al., https://arxiv.org/abs/2106.09685.) The student keeps its class; only the targeted modules are replaced.
"""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from q4kd.trainer.config.settings import DistillConfig
from q4kd.trainer.errors import InputError, first_line
from q4kd.trainer.files import read_json, write_json


def add_adapters(student: Any, config: DistillConfig) -> Any:
    """Freeze the student and put adapters into its targeted modules, in its own dtype; return peft's model around it.

    B starts at zero, so the student's function does not change; A comes from ``config.seed``.

    Raises:
        InputError: when a target does not exist, is no matrix, or is a tied embedding, whose two uses an adapter would
            tear apart.
    """
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    subject = f"setting lora_targets {config.lora_targets[:60]!r}"
    names = [name.strip() for name in config.lora_targets.split(",") if name.strip()]
    targets: str | list[str] = "all-linear" if names == ["all-linear"] else names
    found = {name.rpartition(".")[2] for name, _ in student.named_modules() if name}
    unknown = [name for name in names if targets != "all-linear" and name not in found]
    if unknown or not names:
        kinds = (nn.Linear, Conv1D)
        linear = {name.rpartition(".")[2] for name, module in student.named_modules() if isinstance(module, kinds)}
        expected = f"all-linear, or some of {', '.join(sorted(linear))}"
        got = f"{unknown[0]!r}, which this student has not" if unknown else "nothing"
        raise InputError(subject, expected=expected, got=got, remedy="name some of these, separated by commas")
    tied = getattr(student.config, "tie_word_embeddings", False)
    ends = {_leaf(student, module) for module in (student.get_input_embeddings(), student.get_output_embeddings())}
    if tied and ends & set(names):
        expected = "no adapter on an embedding that is also the head"
        got = f"{sorted(ends & set(names))[0]!r} of a student with tied embeddings"
        raise InputError(subject, expected=expected, got=got, remedy="leave it out")
    torch.manual_seed(config.seed)
    with warnings.catch_warnings():  # peft calls transformers by a name that is deprecated.
        warnings.simplefilter("ignore", FutureWarning)
        # The optimiser has float32 masters; float32 adapters beside bfloat16 weights would cast every activation.
        settings = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,  # type: ignore[arg-type]
            lora_dropout=config.lora_dropout,
            target_modules=targets,
            task_type="CAUSAL_LM",
        )
        # It says that it has found Conv1D, and takes fan_in_fan_out to be true for it.
        warnings.filterwarnings("ignore", message=".*fan_in_fan_out.*", category=UserWarning)
        # Of a mixture it also names parameters that it then does not find.
        warnings.filterwarnings("ignore", message=".*_pattern keys did not match.*", category=RuntimeWarning)
        with _known_targets(subject):
            adapted = get_peft_model(student, settings, autocast_adapter_dtype=False)
    _check_kinds(student, subject)
    return adapted


@contextlib.contextmanager
def _known_targets(subject: str) -> Iterator[None]:
    """Turn peft's refusal of a module into one line."""
    try:
        yield
    except (ValueError, TypeError, NotImplementedError) as error:
        expected, remedy = "modules that peft has adapters for", "name linear layers or embeddings"
        raise InputError(subject, expected=expected, got=first_line(error), remedy=remedy) from error


def _check_kinds(student: nn.Module, subject: str) -> None:
    """Refuse adapters whose update is no product of two matrices: ``merged_state`` could not write the model.

    Of a mixture, transformers holds all experts as one tensor, and the router as one that is no linear layer. peft
    wraps these parameters, also where all linear layers are asked for.
    """
    for name, layer in student.named_modules():
        if type(layer).__name__ == "ParamWrapper":
            got, remedy = f"{name}, a tensor of experts or router", "set lora_targets to q_proj,k_proj,v_proj,o_proj"
            raise InputError(subject, expected="adapters on linear layers", got=got, remedy=remedy)
        adapters = getattr(layer, "lora_A", None)
        parts = [*adapters.values(), *layer.lora_B.values()] if isinstance(adapters, nn.ModuleDict) else []
        if any(not isinstance(part, nn.Linear) for part in parts):
            got, remedy = f"{name}, a {type(layer).__name__}", "name linear layers or embeddings"
            raise InputError(subject, expected="adapters that are two matrices", got=got, remedy=remedy)


def _leaf(student: nn.Module, wanted: nn.Module) -> str:
    leaf: str = next(name.rpartition(".")[2] for name, module in student.named_modules() if module is wanted)
    return leaf


def effective_weight(layer: Any) -> Tensor:
    """Return the weight ``[V, H]`` that a head stands for: with an adapter W + scale * B A, a function of A and B."""
    if not hasattr(layer, "lora_A"):
        weight: Tensor = layer.weight
        return weight
    (adapter,) = layer.active_adapters
    update = layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight
    summed: Tensor = layer.base_layer.weight + layer.scaling[adapter] * update
    return summed


def save_adapter(adapted: Any, folder: Path, state: dict[str, Tensor]) -> None:
    """Write the adapter as ``peft`` loads it: ``adapter_config.json`` and ``adapter_model.safetensors``.

    ``adapted`` is what ``add_adapters`` returned; ``state`` holds the whole student's tensors, by the student's names.
    """
    prefixed = {f"base_model.model.{name}": tensor for name, tensor in state.items()}
    adapted.save_pretrained(str(folder), state_dict=prefixed, safe_serialization=True)
    (folder / "README.md").unlink(missing_ok=True)  # It is a template with nothing filled in.
    path = folder / "adapter_config.json"
    settings = read_json(path)
    # Only the base model's name is kept: its path on this machine is private.
    settings["base_model_name_or_path"] = Path(str(settings.get("base_model_name_or_path") or "")).name or None
    write_json(path, settings)


def merged_state(adapted: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the student's tensors, adapters added into their weights, under the names of a student without adapters.

    The sum is taken in float32 and rounded once to the weight's dtype. The student itself stays as it is. The arguments
    are those of ``save_adapter``.
    """
    merged = {name.replace(".base_layer.", "."): tensor for name, tensor in state.items() if ".lora_" not in name}
    for name, layer in adapted.get_base_model().named_modules():
        # An embedding's A and B are plain parameters.
        kind = next((kind for kind in ("lora_A", "lora_embedding_A") if len(getattr(layer, kind, ()))), None)
        if kind is None:
            continue
        (adapter,) = layer.active_adapters
        ending = "" if kind == "lora_embedding_A" else ".weight"
        a = state[f"{name}.{kind}.{adapter}{ending}"].float()
        b = state[f"{name}.{kind[:-1]}B.{adapter}{ending}"].float()
        # As peft's get_delta_weight: layers that keep their weight transposed (transformers' Conv1D) say so.
        is_transposed = kind == "lora_embedding_A" or layer.fan_in_fan_out
        update = layer.scaling[adapter] * ((b @ a).T if is_transposed else b @ a)
        weight = merged[f"{name}.weight"]
        merged[f"{name}.weight"] = (weight.float() + update).to(weight.dtype)
    return merged
