"""The model to export, as transformers reads it: config, weights, tokenizer. Nothing is fetched, no code is run."""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from q4kd.trainer.errors import InputError, first_line
from q4kd.trainer.export.run_record import ExportSource
from q4kd.trainer.formats.gguf.vocabulary import SPECIAL_ROLES, Vocabulary, config_special_ids
from q4kd.trainer.formats.huggingface.reader import read_weights
from q4kd.trainer.student.model import load_tokenizer, quiet_transformers

_WEIGHTS = "model.safetensors"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


def read_config(source: ExportSource) -> Any:
    """Return the transformers config of a model, defaults filled in.

    Raises:
        InputError: when there is none, or it is not one of a known kind of model.
    """
    from transformers import AutoConfig

    quiet_transformers()
    try:
        return AutoConfig.from_pretrained(source.folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # Other people's code over other people's files raises nearly every type.
        raise _refuse(source, error) from error


def read_state(source: ExportSource) -> dict[str, Tensor]:
    """Map the weights of a model, on the CPU, in the dtype they are stored in, under Hugging Face's names.

    Raises:
        InputError: when they are missing or damaged, or an adapter's.
    """
    if source.checkpoint is None:
        return read_weights(source.folder)
    path = source.checkpoint / _WEIGHTS
    try:
        state: dict[str, Tensor] = load_file(path)
    except (OSError, SafetensorError) as error:
        expected, remedy = "the weights of a checkpoint", "choose another --checkpoint"
        raise InputError(str(path), expected=expected, got=first_line(error), remedy=remedy) from error
    adapters = [name for name in state if "lora_" in name]
    if adapters:
        remedy = "finish the run and export it without --checkpoint: its final model is merged"
        raise InputError(str(path), expected="a whole model", got=f"a LoRA adapter ({adapters[0]})", remedy=remedy)
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            expected, got = "finite weights", f"NaN or infinity in {name[:100]}"
            raise InputError(str(path), expected=expected, got=got, remedy="choose another --checkpoint")
    # A checkpoint keeps one name of a tied pair, whichever comes first.
    if _EMBEDDING not in state and _HEAD in state:
        state[_EMBEDDING] = state.pop(_HEAD)
    return state


def read_model(source: ExportSource) -> tuple[Any, dict[str, Tensor]]:
    """Return config and weights of a model, as ``read_config`` and ``read_state`` do, that agree about the head.

    The tensors decide: a head that differs from the embedding is a head of its own, whatever the config says of it. (A
    merge of adapters into one of the two leaves that.) A tied head is not in the weights.

    Raises:
        InputError: as both.
    """
    config, state = read_config(source), read_state(source)
    head, embedding = state.get(_HEAD), state.get(_EMBEDDING)
    if config.tie_word_embeddings and head is not None and embedding is not None:
        if _are_equal(head, embedding):
            del state[_HEAD]
        else:
            config.tie_word_embeddings = False
    return config, state


def _check_ties(model: Any, state: Mapping[str, Tensor]) -> bool:
    """Return whether every two names of one parameter of a model have one value in a state."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    groups = ([state[name] for name in group if name in state] for group in names.values())
    return all(_are_equal(group[0], other) for group in groups for other in group[1:])


def _are_equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def build_model(source: ExportSource, state: Mapping[str, Tensor]) -> Any:
    """Return a transformers causal LM that holds ``state``, in evaluation mode and in the dtype most of it has.

    Raises:
        InputError: when names or shapes are not those of its config.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    quiet_transformers()
    config = read_config(source)
    dtype = Counter(tensor.dtype for tensor in state.values()).most_common(1)[0][0]
    make: Any = AutoModelForCausalLM.from_config
    try:
        model = make(config, dtype=dtype, trust_remote_code=False).eval()
        if config.tie_word_embeddings and not _check_ties(model, state):
            config.tie_word_embeddings = False
            model = make(config, dtype=dtype, trust_remote_code=False).eval()
        missing, unexpected = model.load_state_dict(dict(state), strict=False)
    except Exception as error:
        if isinstance(error, MemoryError):
            raise
        raise _refuse(source, error) from error
    # A tied head has no weights of its own.
    tied = {_HEAD} if config.tie_word_embeddings else set()
    if unexpected and all(".experts." in name for name in (*missing, *unexpected)):
        expected, got = (
            "tensors as transformers holds them",
            f"{type(model).__name__}, whose experts it joins as it loads",
        )
        remedy = "take the folder as it is: transformers loads it"
        raise InputError(str(source.checkpoint or source.folder), expected=expected, got=got, remedy=remedy)
    if unexpected or set(missing) - tied:
        raise _refuse(source, ValueError(f"missing {missing[:3]}, unexpected {unexpected[:3]}"))
    if (source.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.folder, local_files_only=True)
    return model


def read_vocabulary(source: ExportSource, config: Any) -> Vocabulary:
    """Return the tokenizer of a model: tokens, special ids (the tokenizer's own first) and chat templates.

    Raises:
        InputError: when it is not one of the ``tokenizers`` library, whose content alone can be written truthfully.
    """
    tokenizer = load_tokenizer(source.folder)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        subject, got = str(source.folder), type(tokenizer).__name__
        remedy = "export this model with llama.cpp's convert_hf_to_gguf.py"
        raise InputError(subject, expected="a tokenizer with tokenizer.json", got=got, remedy=remedy)
    special = config_special_ids(config.to_dict())
    for role in SPECIAL_ROLES:
        index = getattr(tokenizer, f"{role}_token_id", None)
        # A byte-level tokenizer knows every text; transformers gives some an unknown token all the same.
        if index is not None and not (role == "unk" and backend.model.unk_token is None):
            special[role] = int(index)
    templates = getattr(tokenizer, "chat_template", None) or {}
    return Vocabulary(
        content=json.loads(backend.to_str()),
        special_ids=special,
        chat_templates=templates if isinstance(templates, Mapping) else {"default": templates},
    )


def equal_states(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Return whether two states hold the same bits under the same names."""
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def _refuse(source: ExportSource, error: Exception) -> InputError:
    subject = str(source.checkpoint or source.folder)
    remedy = "name a folder that save_pretrained or q4kd distill wrote"
    expected = "a Hugging Face causal LM (config.json and its safetensors weights)"
    return InputError(subject, expected=expected, got=first_line(error), remedy=remedy)
