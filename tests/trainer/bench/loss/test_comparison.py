"""``q4kd bench loss`` on the CPU: arms do the work they are named for, bytes are counted, input is checked."""

import json
from pathlib import Path

import pytest
import torch

from q4kd.harness.__main__ import main
from q4kd.trainer.bench.loss import comparison as bench
from q4kd.trainer.loss.config import KDLossConfig

SHAPE = bench.LossShape(tokens=20, vocab=96, hidden=8, teacher_hidden=256, padding=8)


def test_command_writes_rows_and_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--tokens", "20", "--vocab", "96", "--hidden", "8", "--teacher-hidden", "256", "--chunk", "7")
    assert main(["bench", "loss", *sizes, "--pairs", "2", "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "loss.json").read_text())
    assert [row["arm"] for row in found["rows"]] == ["products", "products-chunked", "fast", "low"]
    assert found["config"]["chunk_tokens"] == 7
    assert found["head_bytes"] == (96 + 128) * 256 * 4
    assert all(row["seconds"] > 0 and row["ratio_low"] <= row["ratio"] <= row["ratio_high"] for row in found["rows"])
    printed = capsys.readouterr().out
    assert all(f"{row['arm']} " in printed for row in found["rows"])


@pytest.mark.parametrize(
    ("words", "subject"),
    [
        (["--tokens", "0"], "--tokens"),
        (["--teacher-hidden", "100"], "--teacher-hidden"),
        (["--temperature", "0"], "--temperature"),
        (["--chunk", "-1"], "--chunk"),
        (["--pairs", "1000000"], "--pairs"),
    ],
)
def test_input_is_checked(words: list[str], subject: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "loss", *words]) == 2
    assert subject in capsys.readouterr().err


def test_products_are_the_four_in_whole_and_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    work = bench.make_work(SHAPE, torch.device("cpu"))
    flop = 0
    real = torch.mm

    def count(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        nonlocal flop
        flop += 2 * a.shape[0] * a.shape[1] * b.shape[1]

    def mm(a, b, **options):  # type: ignore[no-untyped-def]
        count(a, a, b)
        return real(a, b, **options)

    def wide(a, b):  # type: ignore[no-untyped-def]
        count(a, a, b)
        return a @ b

    monkeypatch.setattr(torch, "mm", mm)
    monkeypatch.setattr(bench, "multiply_wide", wide)
    monkeypatch.setattr(bench, "add_product", lambda out, a, b, **_options: count(out, a, b))
    for chunk, step, sums in ((20, 20, False), (8, 4, True)):
        flop = 0
        bench.Products(work, chunk, step, torch.float32, sums=sums)()
        assert flop == SHAPE.flop


def test_bytes_are_those_beyond_the_gradients() -> None:
    work = bench.make_work(SHAPE, torch.device("cpu"))

    def step() -> None:
        work.hidden.grad, work.weight.grad = torch.zeros_like(work.hidden), torch.zeros_like(work.weight)
        torch.zeros(1 << 20)

    assert 4 << 20 <= bench.peak_bytes(step, work) <= (4 << 20) + 4096
    config = KDLossConfig(chunk_tokens=5)
    bench.loss_step(work, config)
    assert work.hidden.grad is not None
    assert work.hidden.grad.abs().sum() > 0
