"""Read an .apr teacher: the same superblocks as a GGUF's, used as they lie in a private memory map."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import numpy.typing as npt

from q4kd.trainer.errors import InputError, unreadable
from q4kd.trainer.formats.apr.header import AprEntry, check_footer, check_magic, read_header
from q4kd.trainer.formats.apr.metadata import read_architecture, read_rope_layout, read_tokens, read_values
from q4kd.trainer.formats.architecture import read_dimensions
from q4kd.trainer.formats.blocks.layout import FORMATS
from q4kd.trainer.formats.model_file import ModelFile, PackedTensor
from q4kd.trainer.formats.tensor_names import gguf_name
from q4kd.trainer.formats.tensor_shapes import check_tensors
from q4kd.trainer.mapped import MappedFile

_DTYPES = {0: "F32", 1: "F16", 3: "F64", 4: "I32", 5: "I64", 6: "I8", 7: "U8", 12: "Q4_K", 14: "Q6_K", 30: "BF16"}
# Before aprender's own formats had codes of their own, it wrote them as 8 and 9; .apr cannot hold GGML's 8, Q8_0.
_DTYPES |= {8: "apr-q4", 9: "apr-q8", 128: "apr-q4", 129: "apr-q8"}
_TOKENIZER_TYPES = ("U8", "I32", "I64")


def open_apr(path: Path) -> ModelFile:
    """Open and check an .apr teacher of version 2.

    Structure is checked first, then the footer's CRC-32 over the whole file, which reads every byte once: 0.25 s of
    one core per GB that the page cache holds (measured on 0.8 GB), else the time of the disk. The tensors themselves
    are views of the map, not copies.

    A tensor ``tokenizer`` or ``tokenizer.*`` of bytes or integers is not a weight and is left out.

    Raises:
        InputError: as ``open_model``; also for a layout, dtype or version that is not implemented, and for a header
            checksum or footer that does not match.
    """
    try:
        with path.open("rb") as file:
            check_magic(path, file.read(4))
            model = _read_model(path, MappedFile(path))
            check_footer(path, file)
            return model
    except OSError as error:
        raise unreadable(path, error, "a readable model file") from error


def _read_model(path: Path, mapped: MappedFile) -> ModelFile:
    data = mapped.data
    header = read_header(path, data.data)
    architecture = read_architecture(path, header.metadata)
    values = read_values(path, header.metadata)
    layout = read_rope_layout(path, header.metadata, architecture, (entry.name for entry in header.entries))
    tensors: dict[str, PackedTensor] = {}
    for entry in header.entries:
        if _is_tokenizer(entry):
            continue
        tensor = _packed(path, entry, data)
        if tensor.name in tensors:
            subject, expected = f"{path}: tensor {entry.name}", "each tensor once, under one of its names"
            raise InputError(subject, expected=expected, got=f"{tensor.name} twice", remedy="export the model again")
        tensors[tensor.name] = tensor
    config = read_dimensions(path, architecture, values, tensors)
    # aprender and GGUF keep real settings in float32; JSON shows them as ``1e-6``.
    eps, base = float(np.float32(config.rms_eps)), float(np.float32(config.rope_base))
    config = dataclasses.replace(config, rms_eps=eps, rope_base=base, rope_layout=layout)
    check_tensors(path, config, tensors)
    return ModelFile(
        path=path,
        config=config,
        tensors=tensors,
        tokens=read_tokens(path, header.metadata),
        metadata=header.metadata,
        files=(mapped,),
    )


def _is_tokenizer(entry: AprEntry) -> bool:
    named = entry.name == "tokenizer" or entry.name.startswith("tokenizer.")
    return named and _DTYPES.get(entry.dtype) in _TOKENIZER_TYPES


def _packed(path: Path, entry: AprEntry, data: npt.NDArray[np.uint8]) -> PackedTensor:
    subject = f"{path}: tensor {entry.name}"
    type_name = _DTYPES.get(entry.dtype, f"unknown dtype {entry.dtype}")
    if type_name not in FORMATS:
        known = ", ".join(name for name in _DTYPES.values() if name in FORMATS)
        got = f"{type_name} (dtype {entry.dtype}), aprender's own blocks" if "apr-" in type_name else type_name
        remedy = "export the model again with Q4_K or Q6_K weights (apr convert --quantize q4k), or as F16"
        raise InputError(subject, expected=f"type {known}", got=got, remedy=remedy)
    form = FORMATS[type_name]
    cols = entry.shape[-1]
    if cols % form.block_size:
        expected = f"rows of a multiple of {form.block_size} weights in {type_name}"
        raise InputError(subject, expected=expected, got=f"shape {entry.shape}", remedy="store this tensor as F16")
    rows, row_bytes = math.prod(entry.shape[:-1]), form.row_bytes(cols)
    if rows * row_bytes != entry.size:
        expected = f"{rows * row_bytes} bytes for {type_name} of shape {entry.shape}"
        raise InputError(subject, expected=expected, got=str(entry.size), remedy="export the model again")
    packed = data[entry.start : entry.start + entry.size].reshape(rows, row_bytes)
    return PackedTensor(gguf_name(entry.name), type_name, entry.shape, packed)
