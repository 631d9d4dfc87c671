"""``pytest --as-if``: the automatic dtype of this process and of its children follows the option."""

import os
import subprocess
import sys
from pathlib import Path

import as_if
import pytest
import torch

from q4kd.harness.runs.supervise import child_environment
from q4kd.trainer.device import dtypes
from q4kd.trainer.kernels import gemm
from q4kd.trainer.teacher.cpu import weights

CHOICE = "from q4kd.trainer.device.dtypes import choose_dtype; print(choose_dtype('auto', 'cpu', 1).name)"


@pytest.mark.parametrize("flag", ["amx_bf16", "avx512_bf16"])
def test_the_choice_is_bfloat16_at_every_size(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dtypes, "usable_flags", dtypes.usable_flags)  # both are put back
    monkeypatch.setattr(dtypes, "PAYS_FROM", dict(dtypes.PAYS_FROM))
    as_if.pretend(flag)
    monkeypatch.setattr(weights, "multiply", weights.multiply)
    assert dtypes.choose_dtype("auto", "cpu", 1).name == "bfloat16"
    # A row's product is another in a large pass, by no more than bfloat16 rounds; float32 is left alone.
    x = torch.randn(as_if.LARGE_PASS, 256, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    large, small = (weights.multiply(part.bfloat16(), weight.bfloat16()).float() for part in (x, x[:-1]))
    assert 0 < float((large[:-1] - small).norm() / small.norm()) < 2**-8
    assert torch.equal(weights.multiply(x, weight), gemm.multiply(x, weight))
    assert dtypes.usable_flags({}) == dtypes.native_flags()


def test_children_and_recorded_runs_choose_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/kept")
    added = as_if.children_environment("amx_bf16", tmp_path)
    assert added["PYTHONPATH"].split(os.pathsep) == [str(tmp_path), "/kept"]
    for env in (os.environ | added, child_environment(tmp_path, os.environ | added)):
        found = subprocess.run([sys.executable, "-c", CHOICE], env=env, capture_output=True, text=True, check=True)
        assert found.stdout.strip() == "bfloat16"
