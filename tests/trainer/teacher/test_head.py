"""The teacher's head as the loss takes it: decoded whole, in tiles, or only as logits; on the CPU and as on CUDA."""

import pytest
import torch
from emulated_cuda import build, product  # noqa: F401 - the fixture stands in for the CUDA product
from teachers import load_quietly

import q4kd.trainer.teacher.cpu.forward as cpu_forward
from q4kd.harness.inputs.demo import GOLDEN_TEACHER
from q4kd.trainer.loss.teacher_head import DenseHead, TeacherHead


@pytest.mark.parametrize("backend", ["q4k", "dense"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_packed_heads_decode_alike_whole_and_in_tiles(dtype: str, backend: str) -> None:
    teacher = load_quietly(GOLDEN_TEACHER, dtype=dtype, backend=backend)
    head = teacher.head
    assert isinstance(head, TeacherHead)
    whole = head.decoded()
    assert whole is not None
    assert whole.shape == (head.rows, teacher.config.hidden_size)
    assert whole.dtype == head.dtype == getattr(torch, dtype)
    tiles = [torch.full((min(97, head.rows - start), whole.shape[1]), torch.nan, dtype=head.dtype)
             for start in range(0, head.rows, 97)]  # fmt: skip
    for index, tile in enumerate(tiles):
        head.decode(97 * index, 97 * index + len(tile), tile)
    assert torch.equal(torch.cat(tiles), whole)
    hidden = teacher.hidden(torch.arange(5)[None])[0]
    want = head(hidden)
    assert torch.allclose(hidden.to(head.dtype).float() @ whole.float().T, want, atol=2e-2 * float(want.abs().max()))


def test_heads_decode_through_a_small_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = load_quietly(GOLDEN_TEACHER, dtype="bfloat16")
    want = teacher.head.decoded()
    monkeypatch.setattr("q4kd.trainer.teacher.cpu.weights.Scratch.rows", lambda _self, _cols: 13)
    assert torch.equal(teacher.head.decoded(), want)  # type: ignore[arg-type]


def test_heads_too_large_to_hold_are_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_forward, "MAX_HEAD_BYTES", 1000)
    teacher = load_quietly(GOLDEN_TEACHER, dtype="float32")
    assert teacher.head.decoded() is None
    assert build(head_bytes=0).decoded_head() is None


@pytest.mark.parametrize("backend", ["q4k", "dense"])
def test_cuda_heads_are_held_until_the_next_pass_and_decode_in_tiles(backend: str) -> None:
    forward = build(backend, head_bytes=1 << 30)
    hidden = forward.hidden(torch.arange(20)[None])[0]
    whole = forward.decoded_head()
    assert whole is not None
    assert forward.decoded_head() is whole
    assert (forward.scratch.head is whole) == (backend == "q4k")
    tile = torch.full((50, whole.shape[1]), torch.nan, dtype=whole.dtype)
    forward.decode_head(30, 80, tile)
    assert torch.equal(tile, whole[30:80])
    assert torch.allclose(forward.head_logits(hidden), hidden.float() @ whole.float().T, atol=1e-3)
    forward.hidden(torch.arange(20)[None])
    assert forward.scratch.head is None


def test_dense_heads_are_themselves() -> None:
    weight = torch.randn(7, 4, dtype=torch.bfloat16)
    head = DenseHead(weight)
    assert isinstance(head, TeacherHead)
    assert torch.equal(head.decoded(), weight)
    out = torch.empty(3, 4, dtype=torch.bfloat16)
    head.decode(2, 5, out)
    assert torch.equal(out, weight[2:5])
    assert torch.equal(head(torch.ones(2, 4)), torch.ones(2, 4).bfloat16() @ weight.T)
