"""llama.cpp through its Python binding: quantise a file, and logits of every position. Needs ``llama_cpp``."""

import ctypes
from pathlib import Path

import llama_cpp
import numpy as np

FILE_TYPES = {
    "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "Q4_K_S": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_S,
    "Q5_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_K_M,
    "Q6_K": llama_cpp.LLAMA_FTYPE_MOSTLY_Q6_K,
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q4_1": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_1,
    "Q5_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_0,
    "Q5_1": llama_cpp.LLAMA_FTYPE_MOSTLY_Q5_1,
    "Q2_K": llama_cpp.LLAMA_FTYPE_MOSTLY_Q2_K,
    "Q3_K_S": llama_cpp.LLAMA_FTYPE_MOSTLY_Q3_K_S,
    "Q3_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q3_K_M,
    "IQ4_NL": llama_cpp.LLAMA_FTYPE_MOSTLY_IQ4_NL,
    "IQ4_XS": llama_cpp.LLAMA_FTYPE_MOSTLY_IQ4_XS,
    "MXFP4_MOE": llama_cpp.LLAMA_FTYPE_MOSTLY_MXFP4_MOE,
}


@llama_cpp.llama_log_callback
def _discard(_level: int, _text: bytes, _data: ctypes.c_void_p) -> None:
    """Drop a log line."""


llama_cpp.llama_log_set(_discard, ctypes.c_void_p(0))


def quantise(source: Path, target: Path, file_type: str) -> Path:
    """Let llama.cpp quantise an F16 or F32 GGUF, with its defaults and no importance matrix."""
    return _convert(source, target, FILE_TYPES[file_type])


def decode(source: Path, target: Path) -> Path:
    """Let llama.cpp decode every tensor of a quantised GGUF to F32: the same weights, no blocks."""
    return _convert(source, target, llama_cpp.LLAMA_FTYPE_ALL_F32)


def _convert(source: Path, target: Path, file_type: int) -> Path:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.nthread, params.allow_requantize = file_type, 2, True
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    assert code == 0, f"llama.cpp could not write {source.name} as {target.name}"
    return target


def their_logits(path: Path, ids: np.ndarray, *, exact_cache: bool = False) -> np.ndarray:
    """Return llama.cpp's logits, float32 ``[T, V]``, of integer ids ``[T]``.

    Its cache of keys and values is float16, unless ``exact_cache``: then it is float32.
    """
    kinds = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32} if exact_cache else {}
    engine = llama_cpp.Llama(str(path), n_ctx=256, n_batch=256, n_threads=2, logits_all=True, verbose=False, **kinds)
    engine.eval([int(token) for token in ids])
    logits = np.array(engine.scores[: len(ids)], np.float32)
    engine.close()
    return logits


def tokenise(path: Path, text: str) -> np.ndarray:
    """Return the ids of a text, int64 ``[T]``, with what the file says of a token that begins a text."""
    engine = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    ids = engine.tokenize(text.encode(), add_bos=True, special=False)
    engine.close()
    return np.array(ids, np.int64)
