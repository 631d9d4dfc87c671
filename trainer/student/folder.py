"""What a student's folder holds, judged before transformers reads it: it takes what it does not find for fresh weights.

A folder has one set of weights, ``model.safetensors`` or the shards that ``model.safetensors.index.json`` names, or it
has none, and a run from its seed must then be asked for. Whatever else looks like weights is refused by its name.
"""

import contextlib
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from q4kd.trainer.errors import InputError, first_line, missing_path_remedy
from q4kd.trainer.files import read_json

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
WEIGHT_FILES = (_WHOLE, _INDEX)
# Weights of other formats and frameworks; what transformers' Trainer leaves beside a model is none.
_OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".pkl")
_NO_WEIGHTS = ("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt")
_NO_WEIGHTS_BEGIN = ("rng_state", "tokenizer")
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
# What transformers holds itself, of attention and of experts. Other names are repositories that it fetches code from.
_IMPLEMENTATIONS = (
    "eager",
    "sdpa",
    "flash_attention_2",
    "flash_attention_3",
    "flex_attention",
    "batched_mm",
    "grouped_mm",
)
_MERGE = "merge it into its base first: peft's merge_and_unload, then save_pretrained"


def refuse_student(folder: Path, expected: str, got: str, remedy: str) -> InputError:
    """Return the refusal of a student's folder."""
    return InputError(f"student {folder}", expected=expected, got=got, remedy=remedy)


def no_student(folder: Path, error: Exception) -> InputError:
    """Return the refusal of a folder that transformers cannot read as a causal LM."""
    expected = "a Hugging Face causal LM folder (config.json, tokenizer.json, safetensors weights or none)"
    remedy = "pass --student a folder that save_pretrained wrote"
    return refuse_student(folder, expected, first_line(error), remedy)


@contextlib.contextmanager
def reading_student(folder: Path) -> Iterator[None]:
    """Turn whatever other people's code raises over a folder of other people's into one line.

    transformers, tokenizers, huggingface_hub and a model's own classes raise nearly every type of error for a folder
    that is not what they expect. What says that memory is short is not about the folder, and passes.

    Raises:
        InputError: naming the folder and the error.
    """
    try:
        yield
    except (InputError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and "memory" in str(error).lower():
            raise
        raise no_student(folder, error) from error


def has_weights(folder: Path) -> bool:
    """Return whether the folder holds safetensors weights; without them a student starts from its seed."""
    return any((folder / name).is_file() for name in WEIGHT_FILES)


def check_folder(folder: Path, *, from_scratch: bool | None = None) -> bool:
    """Check that a folder can be a student's, and return whether it holds weights.

    Args:
        folder: the folder.
        from_scratch: whether the student is to have fresh weights; None accepts both.

    Raises:
        InputError: for a folder without config.json; a config that asks for code or for quantised weights; weights that
            transformers would not find, or would take from elsewhere; weights or none, where the other is asked for.
    """
    if not (folder / "config.json").is_file():  # Otherwise transformers would look for it on the hub.
        got = "none" if folder.is_dir() else "a file" if folder.exists() else "no such folder"
        remedy = missing_path_remedy(folder, "pass a Hugging Face model folder")
        raise refuse_student(folder, "a folder with config.json", got, remedy)
    _check_kinds(folder)
    _check_config(folder)
    found = _check_weights(folder)
    if from_scratch is False and not found:
        expected, got = f"weights ({_WHOLE}, or shards with {_INDEX})", "none"
        remedy = "name a folder with weights, or pass --from-scratch to draw them from the seed"
        raise refuse_student(folder, expected, got, remedy)
    if from_scratch and found:
        remedy = "leave --from-scratch out to train on from them, or name a folder without weights"
        raise refuse_student(folder, "no weights with --from-scratch", f"{found[0]}", remedy)
    return bool(found)


def _check_kinds(folder: Path) -> None:
    """Refuse what is neither a file nor a folder: reading a pipe would wait without end."""
    for path in sorted(folder.iterdir()):
        try:
            mode = path.stat().st_mode
        except OSError as error:
            if path.suffix in (".json", *_OTHER_WEIGHTS):
                got = f"{path.name}, a link to nothing" if path.is_symlink() else first_line(error)
                raise refuse_student(folder, "files that can be read", got, "fetch or copy it again") from error
            continue
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise refuse_student(folder, "files", f"{path.name}, which is a pipe or a device", "remove it")


def _check_config(folder: Path) -> None:
    """Refuse settings by which transformers would fetch code, or hold the weights in another form than floats."""
    settings = read_json(folder / "config.json")
    if not isinstance(settings, dict):
        got, remedy = type(settings).__name__, "pass --student a folder that save_pretrained wrote"
        raise refuse_student(folder, "config.json to be a mapping", got, remedy)
    for key, value in _walk(settings):
        if key == "quantization_config" and value:
            method = value.get("quant_method") if isinstance(value, Mapping) else None
            got = f"quantization_config {str(method or value)[:60]!r}"
            remedy = "dequantise it first (model.dequantize(), then save_pretrained), or name the original"
            raise refuse_student(folder, "weights in plain floats", got, remedy)
        if key.endswith(("_implementation", "_implementation_internal")):
            for name in value.values() if isinstance(value, Mapping) else [value]:
                if name is not None and name not in _IMPLEMENTATIONS:
                    expected = f"{key.strip('_')} of {', '.join(_IMPLEMENTATIONS)}"
                    raise refuse_student(folder, expected, repr(name)[:80], "set it to sdpa, or leave it out")


def _walk(settings: Mapping[str, Any], depth: int = 8) -> Iterator[tuple[str, Any]]:
    """Yield every key and value of a config and of the configs in it."""
    for key, value in settings.items():
        yield key, value
        if isinstance(value, Mapping) and depth and key != "quantization_config":
            yield from _walk(value, depth - 1)


def _check_weights(folder: Path) -> list[str]:
    """Return the names of the files that transformers reads the weights from; none where there are none.

    Raises:
        InputError: where there are weights that it would not read, or would read from somewhere else.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    adapters = [name for name in names if name in _ADAPTER]
    whole, index = _WHOLE in names, _INDEX in names
    if adapters:
        got = f"a LoRA adapter {'beside its weights' if whole or index else 'without its base'} ({adapters[0]})"
        raise refuse_student(folder, "a whole model", got, _MERGE)
    if whole and index:
        remedy = "remove the one that is not the model"
        raise refuse_student(folder, "one set of weights", f"{_WHOLE} and {_INDEX}", remedy)
    if whole:
        return [_WHOLE]
    if index:
        return _read_index(folder, names)
    others = [name for name in names if _looks_like_weights(name)]
    if not others:
        return []
    expected = f"weights in {_WHOLE}, or shards with {_INDEX}"
    if others[0].endswith(".safetensors"):
        is_shard = "-of-" in others[0]
        got = f"{others[0]}{', a shard without an index' if is_shard else ''}"
        remedy = "fetch the whole model again" if is_shard else f"rename it to {_WHOLE} if it is the whole model"
    else:
        got = f"{others[0]}, which is not safetensors and may run code"
        remedy = "convert it with transformers' save_pretrained(safe_serialization=True)"
    raise refuse_student(folder, expected, got, remedy)


def _looks_like_weights(name: str) -> bool:
    if name in _NO_WEIGHTS or name.startswith(_NO_WEIGHTS_BEGIN):
        return False
    return name.endswith((*_OTHER_WEIGHTS, ".index.json"))


def _read_index(folder: Path, names: list[str]) -> list[str]:
    """Return the shards that an index names, all of which are there.

    Raises:
        InputError: for an index that is malformed, leads out of the folder, or names a file that is not there.
    """
    remedy = "fetch or save the model again"
    listed = read_json(folder / _INDEX)
    mapped = listed.get("weight_map") if isinstance(listed, dict) else None
    shards = sorted({str(name) for name in mapped.values()}) if isinstance(mapped, dict) else []
    wrong = [name for name in shards if Path(name).name != name or not name.endswith(".safetensors")]
    if not shards or wrong:
        got = repr(wrong[0])[:80] if wrong else "none"
        raise refuse_student(folder, f"safetensors files beside {_INDEX} in its weight_map", got, remedy)
    missing = [name for name in shards if name not in names]
    if missing:
        got = f"{len(missing)} of {len(shards)} missing, {missing[0]} first"
        raise refuse_student(folder, f"the files that {_INDEX} names", got, remedy)
    return shards
