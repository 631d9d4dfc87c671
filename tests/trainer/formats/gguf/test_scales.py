"""Scales of whole tensors are taken from beside NVFP4 matrices, and refused anywhere else."""

from pathlib import Path

import gguf
import numpy as np
import pytest
from model_files import write_model

from q4kd.trainer.errors import InputError
from q4kd.trainer.formats.gguf.reader import open_gguf

MATRIX = "blk.0.attn_q"


def write(path: Path, *vectors: tuple[str, np.ndarray], matrix: str = MATRIX) -> Path:
    """A model of zeros with one NVFP4 matrix ``[64, 64]`` and further vectors."""

    def change(writer: gguf.GGUFWriter) -> None:
        shape = writer.tensors[-1].pop(f"{matrix}.weight").shape
        blocks = np.full((shape[0], 36), 0x38, np.uint8)
        writer.add_tensor(f"{matrix}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.NVFP4)
        for name, vector in vectors:
            writer.add_tensor(name, vector)

    return write_model(path, change)


def one(value: float) -> np.ndarray:
    return np.array([value], np.float32)


def test_a_scale_goes_to_its_matrix_and_an_input_scale_nowhere(tmp_path: Path) -> None:
    model = open_gguf(write(tmp_path / "m.gguf", (f"{MATRIX}.input_scale", one(5)), (f"{MATRIX}.scale", one(0.25))))
    assert model.tensors[f"{MATRIX}.weight"].scale == 0.25
    assert {tensor.scale for name, tensor in model.tensors.items() if name != f"{MATRIX}.weight"} == {1.0}
    assert not any(name.endswith("scale") for name in model.tensors)


def test_without_one_the_matrix_is_taken_as_it_is(tmp_path: Path) -> None:
    assert open_gguf(write(tmp_path / "m.gguf")).tensors[f"{MATRIX}.weight"].scale == 1.0


@pytest.mark.parametrize(
    ("name", "vector", "message"),
    [
        ("blk.0.attn_k.scale", one(2), r"attn_k\.scale: expected an NVFP4 matrix beside it, got .* in F32"),
        ("blk.0.attn_k.input_scale", one(2), "expected an NVFP4 matrix beside it"),
        ("blk.7.attn_q.scale", one(2), "expected an NVFP4 matrix beside it, got none"),
        (f"{MATRIX}.scale", np.ones(2, np.float32), r"expected one F32 number, got F32 of shape \(2,\)"),
        (f"{MATRIX}.scale", np.ones(1, np.float16), "expected one F32 number, got F16"),
        (f"{MATRIX}.scale", one(np.nan), "expected a finite scale below 1.4e\\+11, got nan"),
        (f"{MATRIX}.input_scale", one(np.inf), "expected a finite scale below .*, got inf"),
        (f"{MATRIX}.scale", one(-3e38), "expected a finite scale below .*, got -3"),
    ],
)
def test_any_other_scale_is_refused_by_name(tmp_path: Path, name: str, vector: np.ndarray, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_gguf(write(tmp_path / "m.gguf", (name, vector)))


def test_an_embedding_has_no_scale(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", ("token_embd.scale", one(2)), matrix="token_embd")
    with pytest.raises(InputError, match=r"token_embd\.scale"):
        open_gguf(path)
