import pytest
import torch

from q4kd.trainer.device.allocation import let_segments_grow


@pytest.mark.parametrize(
    ("version", "variable"), [("2.6.0", "PYTORCH_CUDA_ALLOC_CONF"), ("2.13.0+cpu", "PYTORCH_ALLOC_CONF")]
)
def test_segments_grow_by_the_variable_that_torch_reads(monkeypatch, version, variable):
    monkeypatch.setattr(torch, "__version__", version)
    environment: dict[str, str] = {}
    let_segments_grow(environment, "x86_64")
    assert environment == {variable: "expandable_segments:True"}


@pytest.mark.parametrize("variable", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_what_the_user_settled_stays(variable):
    environment = {variable: "max_split_size_mb:256"}
    let_segments_grow(environment, "x86_64")
    assert environment == {variable: "max_split_size_mb:256"}


def test_machines_that_were_not_measured_are_left_alone():
    environment: dict[str, str] = {}
    let_segments_grow(environment, "aarch64")
    assert environment == {}
