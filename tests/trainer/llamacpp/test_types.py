"""Every type of tensor that is read, alone in a model of each of the first architectures, run by both.

Run by ``nox -s parity``; skipped without llama.cpp. Weights are quantised by the gguf package or by us; of the types of
codes they are random blocks.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("llama_cpp", reason="the independent engine; nox -s parity builds it")

from architecture_models import CASES, make_model, make_tokenizer
from llamacpp_engine import their_logits
from model_files import retype
from parity_rows import parity_row
from teachers import load_quietly

from q4kd.harness.oracles.reference import read_gguf, reference_logits
from q4kd.trainer.formats.blocks.layout import FORMATS
from q4kd.trainer.formats.gguf.writer import write_gguf
from q4kd.trainer.formats.open import open_model
from q4kd.trainer.formats.tensor_shapes import ROPE_FACTORS

MODELS = ("qwen2", "qwen3-tied", "llama3-tied")
IDS = np.random.default_rng(6).integers(0, 320, 64)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Write a model in F32 where it is not written yet."""
    folder = tmp_path_factory.mktemp("types")

    def write(name: str) -> Path:
        path = folder / f"{name}.gguf"
        if not path.exists():
            model = make_model(CASES[name])
            state, tokenizer = model.state_dict(), make_tokenizer()
            write_gguf(path, config=model.config, state=state, tokenizer=tokenizer, recipe="f32", name=name)
        return path

    return write


def _is_matrix(tensor: str) -> bool:
    return not ("norm" in tensor or tensor.endswith(".bias") or tensor == ROPE_FACTORS)


@pytest.mark.parametrize("type_name", FORMATS)
@pytest.mark.parametrize("name", MODELS)
def test_a_file_of_one_type(
    source: Callable[[str], Path],
    tmp_path: Path,
    name: str,
    type_name: str,
    record_parity: Callable[[dict[str, Any]], None],
) -> None:
    # llama.cpp's qwen2 multiplies by the scales beside NVFP4 matrices in attention alone (src/models/qwen2.cpp gives
    # none to build_ffn): elsewhere this file has none.
    unscaled = ("token_embd", "ffn_") if name == "qwen2" else ("token_embd",)
    path = retype(source(name), tmp_path / "m.gguf", lambda x: type_name if _is_matrix(x) else None, unscaled)
    assert {tensor.type for tensor in open_model(path).tensors.values()} == {"F32", type_name}
    ours = load_quietly(path, backend="q4k", dtype="float32").logits(torch.from_numpy(IDS)[None])[0].numpy()
    exact = reference_logits(read_gguf(path), IDS)
    row = parity_row(f"{name} all {type_name}", type_name, ours, their_logits(path, IDS), exact)
    record_parity(row)
    assert row["error"] <= 1e-5
    assert row["cosine"] >= (0.99999 if type_name in ("F32", "F16", "BF16") else 0.999)
