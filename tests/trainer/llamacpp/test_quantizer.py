"""Our quantiser beside llama.cpp's, on the same float32 matrices: run by ``nox -s parity``; skipped without it.

llama.cpp's is called where ``llama_model_quantize`` calls it: ``ggml_quantize_chunk`` of its own library, without and
with an importance matrix. Both results are decoded by the gguf package.
"""

import ctypes
from pathlib import Path

import gguf
import numpy as np
import pytest

from q4kd.trainer.demo import teacher_path
from q4kd.trainer.formats.blocks.quantize import BLOCK, quantize

llama_cpp = pytest.importorskip("llama_cpp", reason="the independent engine; nox -s parity builds it")

# Root mean square error over llama.cpp's.
BOUND = 1.03
# The types whose scales are searched; the others take no importance.
FITTED = [name for name in BLOCK if name not in ("Q8_0", "Q5_1", "Q4_1")]


def quantize_by_llama_cpp(weights: np.ndarray, name: str, importance: np.ndarray | None = None) -> np.ndarray:
    library = ctypes.CDLL(str(next(Path(llama_cpp.__file__).parent.glob("lib/*ggml-base.*"))))
    chunk = library.ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    rows, cols = weights.shape
    width, size = BLOCK[name]
    out = np.zeros((rows, cols // width * size), np.uint8)
    kind = int(gguf.GGMLQuantizationType[name])
    known = None if importance is None else importance.ctypes.data
    assert chunk(kind, weights.ctypes.data, out.ctypes.data, 0, rows, cols, known) == out.nbytes
    return out


def error(weights: np.ndarray, stored: np.ndarray, name: str, importance: np.ndarray | float = 1.0) -> float:
    decoded = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[name])
    return float(np.sqrt(np.mean(importance * (weights.astype(np.float64) - decoded) ** 2)))


def matrices() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shape = (128, 1024)
    normal = rng.standard_normal(shape)
    made = {
        "normal": normal,
        "laplace": rng.laplace(size=shape),
        "uniform": rng.uniform(-1, 1, shape),
        "student t, 3 degrees": rng.standard_t(3, size=shape),
        "student t, 2 degrees": rng.standard_t(2, size=shape),
        "rare outliers": normal * np.where(rng.random(shape) < 1 / 500, 50, 1),
        "frequent outliers": normal * np.where(rng.random(shape) < 1 / 50, 20, 1),
        "uneven sub-blocks": normal * np.repeat(np.exp(rng.normal(size=(128, 32))), 32, axis=1),
        "far from zero": 1 + 0.1 * normal,
    }
    return {name: values.astype(np.float32) for name, values in made.items()}


def demo_matrices(name: str) -> dict[str, np.ndarray]:
    """Trained weights of the demo teacher, as its file decodes, that are not on this type's grid already."""
    tensors = [tensor for tensor in gguf.GGUFReader(teacher_path()).tensors if len(tensor.shape) == 2]
    others = [tensor for tensor in tensors if tensor.tensor_type.name not in (name, "F32", "F16")]
    assert others
    return {
        tensor.name: np.ascontiguousarray(gguf.quants.dequantize(tensor.data, tensor.tensor_type)[:256])
        for tensor in others[:4]
    }


@pytest.mark.parametrize("name", BLOCK)
def test_our_error_is_within_three_percent_of_llama_cpps(name: str) -> None:
    ratios = {}
    for label, weights in (matrices() | demo_matrices(name)).items():
        theirs = error(weights, quantize_by_llama_cpp(weights, name), name)
        ratios[label] = error(weights, quantize(weights, name), name) / theirs
    print(name, {label: round(ratio, 4) for label, ratio in ratios.items()})
    assert max(ratios.values()) <= BOUND, ratios
    assert len(ratios) >= 11


@pytest.mark.parametrize("name", FITTED)
def test_our_weighted_error_is_within_three_percent_of_llama_cpps(name: str) -> None:
    ratios = {}
    for label, weights in (matrices() | demo_matrices(name)).items():
        importance = np.random.default_rng(5).chisquare(1, weights.shape[1]).astype(np.float32) + np.float32(0.01)
        both = quantize(weights, name, importance), quantize_by_llama_cpp(weights, name, importance)
        ours, theirs = (error(weights, stored, name, importance) for stored in both)
        ratios[label] = ours / theirs
    print(name, {label: round(ratio, 4) for label, ratio in ratios.items()})
    # Q2_K of weights far from zero is the one case in which llama.cpp's is better, by 5.2 %.
    beaten = [label for label, ratio in ratios.items() if ratio > BOUND]
    assert beaten == (["far from zero"] if name == "Q2_K" else []), ratios
    assert max(ratios.values()) < 1.06


def test_the_comparison_sees_a_quantiser_without_a_search() -> None:
    """Both arms are real: scales rounded to nearest, as a first attempt has them, are off by more than the bound."""
    weights = matrices()["normal"]
    theirs = error(weights, quantize_by_llama_cpp(weights, "Q4_K"), "Q4_K")
    sub_blocks = weights.reshape(-1, 32)
    low, high = sub_blocks.min(axis=1, keepdims=True), sub_blocks.max(axis=1, keepdims=True)
    step = (high - low) / 15
    rounded = low + step * np.rint((sub_blocks - low) / step)
    assert np.sqrt(np.mean((sub_blocks - rounded) ** 2)) > BOUND * theirs


def test_q8_0_is_llama_cpps_to_the_byte() -> None:
    weights = matrices()["student t, 3 degrees"]
    assert np.array_equal(quantize(weights, "Q8_0"), quantize_by_llama_cpp(weights, "Q8_0"))
