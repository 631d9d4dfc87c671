"""The CUDA forward over the kernels' own source, built by the host compiler: the golden file, whole."""

import numpy as np
import pytest
import torch
from host_kernels import host_launcher
from reference_kernels import device_tensors, widening_multiply

import q4kd.trainer.teacher.cuda.forward as forward_module
import q4kd.trainer.teacher.cuda.parts as parts_module
from q4kd.harness.inputs.demo import GOLDEN_LOGITS, GOLDEN_TEACHER
from q4kd.harness.oracles.reference import read_gguf, reference_logits
from q4kd.trainer.formats.open import open_model
from q4kd.trainer.kernels.teacher_kernels import Kernels
from q4kd.trainer.teacher.cuda.forward import CudaForward


def test_the_golden_logits_come_from_the_kernels_own_source(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward_module, "multiply", widening_multiply)
    monkeypatch.setattr(parts_module, "multiply", widening_multiply)
    with np.load(GOLDEN_LOGITS, allow_pickle=False) as arrays:
        ids = arrays["ids"].astype(np.int64)[:20]
    exact = reference_logits(read_gguf(GOLDEN_TEACHER), ids)
    kernels, model = Kernels("cpu", host_launcher(tmp_path_factory)), open_model(GOLDEN_TEACHER)
    for dtype, tokens, bound in ((torch.float32, 20, 1e-5), (torch.bfloat16, 20, 2e-2), (torch.bfloat16, 3, 2e-2)):
        forward = CudaForward(
            model.config, device_tensors(model), "q4k", kernels, dtype=dtype, overlap=False, graphs=False
        )
        hidden = forward.hidden(torch.from_numpy(ids[None, :tokens]))
        found = forward.head_logits(hidden[0]).numpy()
        errors = np.linalg.norm(found - exact[:tokens], axis=1) / np.linalg.norm(exact[:tokens], axis=1)
        assert errors.max() <= bound
        assert forward.head_logits(hidden[0, :0]).shape == (0, found.shape[1])
