"""``q4kd bench step``: arms take real steps, ratios and memory are what they are said to be, input is checked."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from q4kd.harness.__main__ import main
from q4kd.trainer.bench.interleave import Series, Shape, spread
from q4kd.trainer.bench.step import comparison as bench
from q4kd.trainer.bench.step import models as step_models
from q4kd.trainer.bench.step.trl_arm import TrlArm
from q4kd.trainer.bench.synthetic import write_large_teacher
from q4kd.trainer.train.step import StepResult

SHAPE = Shape(2, 8)
SMALL = {"layers": 1, "hidden": 256, "ffn": 256, "vocab": 512}


def series(name: str, *seconds: float) -> Series:
    return Series(name, SHAPE, seconds)


@pytest.fixture
def small_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the pair of the bench one that takes a second."""

    def write(path: Path, *, vocab: int) -> None:
        assert vocab == SMALL["vocab"]
        write_large_teacher(path, **SMALL)

    student = {"vocab_size": SMALL["vocab"], "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    monkeypatch.setattr(step_models, "STUDENT_SMALL", step_models.STUDENT_SMALL | student)
    monkeypatch.setattr(step_models, "write_large_teacher", write)


@pytest.mark.usefixtures("small_pair")
def test_command_takes_real_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[StepResult] = []
    kept = bench.split_of

    def split_of(results: Any, data_seconds: Any) -> dict[str, float]:
        taken.extend(results)
        assert len(data_seconds) == len(results)
        return kept(results, data_seconds)

    monkeypatch.setattr(bench, "split_of", split_of)
    words = ("--shape", "2x8", "--rounds", "3", "--set", "temperature=2", "--out", str(tmp_path))
    assert main(["bench", "step", *words]) == 0
    found = json.loads((tmp_path / "step.json").read_text())
    assert [one["arm"] for one in found["series"]] == ["q4kd", "teacher", "ce"]
    assert all(len(one["seconds"]) == 3 and min(one["seconds"]) > 0 for one in found["series"])
    assert found["not_run"] == {}
    assert found["tokens"] == 16
    assert found["loss"]["temperature"] == 2.0
    # Embedding, one layer and two norms, the head tied to the embedding.
    assert found["facts"]["q4kd"]["parameters"] == found["facts"]["ce"]["parameters"] > 512 * 32
    assert found["facts"]["teacher"]["resident_bytes"] > 0
    # The counted rounds alone, each a step with a teacher: on the same windows the student learns.
    assert len(taken) == 3
    assert all(result.tokens == 16 and result.teacher_s > 0 and result.kd > 0 for result in taken)
    assert taken[-1].loss < taken[0].loss
    # The parts are measured one after another, so that they make up the step.
    assert set(found["split"]) == {"teacher", "student", "loss", "optimizer", "data"}
    assert found["split"]["data"] > 0
    assert 0.5 < sum(found["split"].values()) < 1.05
    printed = capsys.readouterr().out
    assert "step over teacher + ce" in printed
    assert "where the time of a q4kd step goes: teacher " in printed
    assert printed.count("peak") == printed.count("peak of the process, all arms together") == 1
    assert found["process_peak_bytes"] > 50e6
    assert "on the device" not in printed


def test_ratios_are_taken_round_by_round() -> None:
    found = bench.ratios(
        [
            series("q4kd", 4.0, 9.0, 8.0),
            series("teacher", 1.0, 2.0, 2.0),
            series("ce", 1.0, 1.0, 2.0),
            series("trl-bf16", 12.0, 27.0, 8.0),
        ]
    )
    assert found["step over teacher + ce"]["median"] == 2.0
    assert (found["step over teacher + ce"]["least"], found["step over teacher + ce"]["greatest"]) == (2.0, 3.0)
    assert found["trl-bf16 over q4kd"]["median"] == 3.0
    assert "trl-nf4 over q4kd" not in found
    assert bench.ratios([series("teacher", 1.0)]) == {}
    assert spread([3.0]) == dict.fromkeys(("median", "low", "high", "least", "greatest"), 3.0)
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0])["low"] == 2.0


def test_table_says_what_was_found_and_what_was_not_run() -> None:
    found = {
        "shape": "2x8",
        "tokens": 16,
        "series": [{"arm": "q4kd", "seconds": [0.1, 0.2, 0.4]}, {"arm": "ce", "seconds": [0.1, 0.1, 0.1]}],
        "memory": {"q4kd": {"resident": 1, "peak": 3_250_000_000}, "ce": {"resident": 0, "peak": 0}},
        "ratios": {"step over teacher + ce": spread([1.0, 1.25, 1.5])},
        "split": {"teacher": 0.25, "loss": 0.5},
        "not_run": {"trl-nf4": "ImportError: no bitsandbytes"},
    }
    lines = bench.table(found)
    assert lines[0] == "one step of 2x8 tokens, 3 rounds, arms in turn"
    assert lines[1].split() == ["q4kd", "200.0", "ms", "80", "tokens/s", "peak", "3.25", "GB"]
    assert lines[2].split() == ["ce", "100.0", "ms", "160", "tokens/s"]
    assert lines[3] == "  step over teacher + ce: 1.250 (quartiles 1.125..1.375, extremes 1.000..1.500)"
    assert lines[4] == "  where the time of a q4kd step goes: teacher 25.0%, loss 50.0%"
    assert lines[5] == "  trl-nf4: not run: ImportError: no bitsandbytes"


class CountedDevice:
    """A device's allocator, as far as the bench asks it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held = self.most = 0
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: self.held)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: self.most)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: setattr(self, "most", self.held))
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def take(self, size: int) -> None:
        self.held += size
        self.most = max(self.most, self.held)


class CountedArm:
    """Keeps some bytes from its first preparation on, others from its first step on, and takes more in every step."""

    def __init__(self, name: str, device: CountedDevice, kept: int, moments: int, scratch: int) -> None:
        self.name, self._device = name, device
        self._kept, self._moments, self._scratch = kept, moments, scratch
        self.steps, self.closed = 0, False

    def prepare(self) -> dict[str, Any]:
        self._device.take(self._kept)
        return {"kept": self._kept}

    def run(self, ids_BT: Any, save: Path | None = None) -> float:
        assert ids_BT.shape == (SHAPE.batch, SHAPE.length + 1)
        if self.steps == 0:
            self._device.take(self._moments)
        self.steps += 1
        self._device.take(self._scratch)
        self._device.held -= self._scratch
        return 1.0

    def close(self) -> None:
        self.closed = True


def test_memory_of_an_arm_is_told_from_that_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    device = CountedDevice(monkeypatch)
    device.take(50)  # what was there before any arm
    arms = [CountedArm("q4kd", device, 100, 10, 1000), CountedArm("ce", device, 300, 20, 40)]
    said: list[str] = []
    found = bench.measure(arms, SHAPE, 64, 4, torch.device("cuda", 0), said.append)
    assert found["memory"] == {"q4kd": {"resident": 110, "peak": 1110}, "ce": {"resident": 320, "peak": 360}}
    assert found["facts"] == {"q4kd": {"kept": 100}, "ce": {"kept": 300}}
    assert all(arm.closed and arm.steps >= bench.WARM_UP_STEPS + 4 for arm in arms)


def test_a_peer_that_cannot_run_is_a_result_and_our_own_failure_is_not() -> None:
    class Broken:
        def __init__(self, name: str) -> None:
            self.name, self.closed = name, False

        def prepare(self) -> dict[str, Any]:
            raise ImportError("no such trainer " + "x" * 400)

        def run(self, ids_BT: Any, save: Path | None = None) -> float:
            raise AssertionError("never prepared")

        def close(self) -> None:
            self.closed = True

    device = torch.device("cpu")

    class Fixed(Broken):
        def prepare(self) -> dict[str, Any]:
            return {}

        def run(self, ids_BT: Any, save: Path | None = None) -> float:
            return 0.5

    peer = Broken("trl-nf4")
    found = bench.measure([Fixed("q4kd"), peer], SHAPE, 64, 2, device, lambda _line: None)
    assert peer.closed
    assert list(found["memory"]) == ["q4kd"]
    assert found["not_run"]["trl-nf4"].startswith("ImportError: no such trainer xxx")
    assert len(found["not_run"]["trl-nf4"]) < 330
    with pytest.raises(ImportError, match="no such trainer"):
        bench.measure([Broken("q4kd")], SHAPE, 64, 2, device, lambda _line: None)


def test_split_is_of_the_median_step() -> None:
    def result(seconds: float) -> StepResult:
        parts = {"teacher_s": 0.1 * seconds, "student_s": 0.4 * seconds, "loss_s": 0.3 * seconds}
        terms = dict.fromkeys(("loss", "ce", "kd", "grad_norm", "lr"), 1.0)
        return StepResult(**terms, tokens=1, seconds=seconds, **parts, optimizer_s=0.2 * seconds)

    split = bench.split_of([result(1.0), result(2.0), result(30.0)], [0.1, 0.5, 9.0])
    assert split == pytest.approx({"teacher": 0.08, "student": 0.32, "loss": 0.24, "optimizer": 0.16, "data": 0.2})
    assert sum(split.values()) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("words", "subject"),
    [
        (["--shape", "32"], "BxT, such as 32x256"),
        (["--shape", "ax8"], "--shape"),
        (["--shape", "0x8"], "--shape"),
        (["--shape", "2x" + "9" * 40], "--shape"),
        (["--against", "trl-bf16"], "--against"),
        (["--against", "liger"], "--against"),
        (["--rounds", "0"], "--rounds"),
        (["--layers", "29"], "--layers"),
        (["--set", "temperature"], "--set"),
        (["--set", "temprature=2"], "temprature"),
    ],
)
@pytest.mark.usefixtures("small_pair")
def test_input_is_checked(words: list[str], subject: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "step", "--out", str(tmp_path / "out"), *words]) == 2
    refused = capsys.readouterr().err
    assert subject in refused
    assert "Traceback" not in refused
    assert not (tmp_path / "out").exists()


def trl_arm(pair: step_models.Pair) -> TrlArm:
    device = torch.device("cpu")

    def make() -> Any:
        return step_models.peer_student(pair, device)

    return TrlArm("trl-bf16", make, make, lr=1e-3, clip=1.0)


@pytest.mark.usefixtures("small_pair")
def test_gkd_trainer_takes_steps(tmp_path: Path) -> None:
    arm = trl_arm(step_models.make_pair(tmp_path, torch.device("cpu"), 1))
    windows = np.random.default_rng(0).integers(0, SMALL["vocab"], (2, 9))
    if importlib.util.find_spec("trl") is None:
        with pytest.raises(ImportError, match="trl"):
            arm.prepare()
        arm.close()
        pytest.skip("trl is not installed")
    facts = arm.prepare()
    assert facts["lmbda"] == facts["beta"] == 0.0
    before = [parameter.detach().clone() for parameter in arm._model.parameters()]
    assert arm.run(windows) > 0
    # A student that is its own teacher has a loss of zero; AdamW's decay moves it all the same, if there is one.
    assert all(torch.isfinite(parameter).all() for parameter in arm._model.parameters())
    assert len(before) == len(list(arm._model.parameters()))
    arm.close()
    assert "_model" not in arm.__dict__
