"""What the metadata of an .apr file say about the model, under any of the names that its writers use.

A null counts as absent, so ``"num_layers": null, "num_hidden_layers": 28`` means 28. Two names of one quantity that
disagree are refused, as is every setting that would change what the model computes and is not implemented.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from q4kd.trainer.errors import InputError
from q4kd.trainer.formats.architecture import check_architecture
from q4kd.trainer.formats.families import ROPE_LAYOUTS, RopeLayout

# Each key of GGUF has these names (paiml/aprender, header_impl.rs: canonicalize_hf_aliases), aprender's own first.
_INTEGERS = {
    "embedding_length": ("hidden_size", "hidden_dim", "d_model", "n_embd"),
    "block_count": ("num_layers", "num_hidden_layers", "n_layers", "n_layer"),
    "attention.head_count": ("num_heads", "num_attention_heads", "n_heads", "n_head"),
    "attention.head_count_kv": ("num_kv_heads", "num_key_value_heads", "n_kv_heads"),
    "attention.key_length": ("head_dim",),
    "feed_forward_length": ("intermediate_size", "ffn_dim", "intermediate_dim", "n_inner"),
    "context_length": ("max_position_embeddings", "max_seq_len", "context_length", "n_ctx"),
}
_REALS = {
    "rope.freq_base": ("rope_theta",),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "layer_norm_eps", "norm_eps"),
}
_ARCHITECTURE_NAMES = ("architecture", "hf_model_type", "hf_architecture", "model_type")
_SAME_ARCHITECTURE = {"qwen2.5": "qwen2", "mistral": "llama"}
_ROPE_TYPES: dict[int, RopeLayout] = {0: "interleaved", 2: "split_halves"}
# These settings change the computation and are not implemented; at the values given they change nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
    "partial_rotary_factor": (1,),
    "hidden_act": ("silu",),
    "attn_logit_softcapping": (),
    "final_logit_softcapping": (),
}
_VOCABULARY_NAMES = ("tokenizer.vocabulary", "tokenizer.ggml.tokens", "vocabulary", "vocab", "tokens")
_EXPORT = "export the model again with correct metadata"


def read_architecture(path: Path, metadata: Mapping[str, Any]) -> str:
    """Return the supported architecture that the metadata name, in whatever spelling: ``Qwen2ForCausalLM`` is qwen2.

    Raises:
        InputError: when none is named, it is not implemented, or two names contradict each other.
    """
    stated: dict[str, str] = {}
    for key in _ARCHITECTURE_NAMES:
        value = metadata.get(key)
        if isinstance(value, str) and value:
            plain = value.lower().removesuffix("forcausallm")
            stated[key] = _SAME_ARCHITECTURE.get(plain, plain)
        elif value not in (None, ""):
            raise _wrong(path, key, "a name", value)
    architecture = check_architecture(path, next(iter(stated.values()), None), ROPE_LAYOUTS)
    # model_type is left out: aprender fills it with a default where it does not know.
    for key in _ARCHITECTURE_NAMES[:-1]:
        other = stated.get(key, architecture)
        if other in ROPE_LAYOUTS and other != architecture:
            raise _refusal(path, key, f"{architecture}, as elsewhere in the metadata", other)
    return architecture


def read_values(path: Path, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the dimensions under GGUF's keys (see ``read_dimensions``); a quantity without a value is left out.

    Raises:
        InputError: for a value of another kind, two names that disagree, or a setting that is not implemented.
    """
    _refuse_unsupported(path, metadata)
    values: dict[str, Any] = {}
    for table, kinds, expected in ((_INTEGERS, (int,), "an integer"), (_REALS, (int, float), "a number")):
        for key, names in table.items():
            stated = {name: metadata[name] for name in names if metadata.get(name) is not None}
            for name, value in stated.items():
                if isinstance(value, bool) or not isinstance(value, kinds):
                    raise _wrong(path, name, expected, value)
                if values.setdefault(key, value) != value:
                    raise _wrong(path, name, f"{_describe(values[key])}, the value of {next(iter(stated))}", value)
    return values


def read_rope_layout(
    path: Path, metadata: Mapping[str, Any], architecture: str, stored_names: Iterable[str]
) -> RopeLayout:
    """Return how the rows of Q and K are ordered: as ``rope_type`` states, else as the file's origin implies.

    A llama that came from a GGUF (GGUF tensor names, or ``original_format`` gguf) keeps llama.cpp's permuted rows,
    which turn in adjacent pairs; any other has Hugging Face's rows, which turn in split halves.

    Raises:
        InputError: for a ``rope_type`` other than 0 and 2.
    """
    stated = metadata.get("rope_type")
    if stated is not None:
        if isinstance(stated, bool) or not isinstance(stated, int) or stated not in _ROPE_TYPES:
            raise _wrong(path, "rope_type", "0 (adjacent pairs) or 2 (split halves)", stated)
        return _ROPE_TYPES[stated]
    from_gguf = metadata.get("original_format") == "gguf" or any(name.startswith("blk.") for name in stored_names)
    return ROPE_LAYOUTS[architecture] if from_gguf else "split_halves"


def read_tokens(path: Path, metadata: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the token strings by id, or nothing where the metadata hold no list of them.

    Raises:
        InputError: for tokens that are not valid Unicode.
    """
    nested = metadata.get("tokenizer")
    for place in (metadata, nested if isinstance(nested, dict) else {}):
        for name in _VOCABULARY_NAMES:
            found = place.get(name)
            if isinstance(found, list) and found and all(isinstance(token, str) for token in found):
                try:
                    "".join(found).encode()
                except UnicodeEncodeError as error:
                    raise _refusal(path, name, "Unicode tokens", "a lone surrogate") from error
                return tuple(found)
    return ()


def _refuse_unsupported(path: Path, metadata: Mapping[str, Any]) -> None:
    sharding = metadata.get("sharding")
    if isinstance(sharding, dict) and sharding.get("shard_count") not in (None, 0, 1):
        remedy = "merge the shards into one .apr first"
        raise _refusal(path, "sharding", "one file", "one shard of several", remedy)
    scaling = metadata.get("rope_scaling")
    kind = scaling.get("rope_type", scaling.get("type")) if isinstance(scaling, dict) else scaling
    window, context = metadata.get("sliding_window"), metadata.get("max_position_embeddings")
    # A window as long as the context leaves nothing out; Qwen2 states one and does not use it.
    wide = isinstance(window, int) and isinstance(context, int) and window >= context
    unsupported = {
        key: metadata.get(key) for key, neutral in _NEUTRAL.items() if metadata.get(key) not in (None, *neutral)
    }
    if kind not in (None, "default", "none"):
        unsupported["rope_scaling"] = kind
    if window and not wide and metadata.get("use_sliding_window") is not False:
        unsupported["sliding_window"] = window
    for key, value in unsupported.items():
        remedy = "use another teacher: leaving this out would make it silently wrong"
        raise _refusal(path, key, "a model without it", _describe(value), remedy)


def _wrong(path: Path, key: str, expected: str, value: object) -> InputError:
    return _refusal(path, key, expected, _describe(value))


def _refusal(path: Path, key: str, expected: str, got: str, remedy: str = _EXPORT) -> InputError:
    return InputError(f"{path}: {key}", expected=expected, got=got, remedy=remedy)


def _describe(value: object) -> str:
    """Return a short text that nested or long values cannot make slow, deep or many-lined."""
    if isinstance(value, str):
        return repr(value[:60])
    if isinstance(value, float) or (isinstance(value, int) and abs(value) < 1 << 64):
        return str(value)
    return f"{type(value).__name__} value"
