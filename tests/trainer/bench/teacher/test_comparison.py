"""The comparison's own arithmetic and its worker processes; the engines' speed is no test's business."""

import sys
import time
from pathlib import Path

import numpy as np
import pytest

from q4kd.harness.__main__ import main
from q4kd.trainer.bench.interleave import Ids, Series, Shape, compare, interleave, make_ids
from q4kd.trainer.bench.synthetic import LAYER_TYPES, random_layer_blocks, write_large_teacher
from q4kd.trainer.bench.teacher.comparison import agree, compare_on_cpu, least_cosine, table
from q4kd.trainer.bench.teacher.cpu import TeacherArm, worker_arm
from q4kd.trainer.bench.teacher.worker import ArmFailed, WorkerArm
from q4kd.trainer.formats.open import open_model


class Recorded:
    """An arm that takes prescribed seconds and notes its turns."""

    def __init__(self, name: str, seconds: list[float], turns: list[str]) -> None:
        self.name, self._seconds, self._turns = name, seconds, turns

    def prepare(self) -> dict[str, object]:
        return {}

    def run(self, ids_BT: Ids, save: Path | None = None) -> float:
        self._turns.append(self.name)
        if save is not None:
            np.save(save, np.full((*ids_BT.shape, 4), 1.0 if self.name == "a" else -1.0, np.float32))
        return self._seconds[(self._turns.count(self.name) - 1) % len(self._seconds)]

    def close(self) -> None:
        pass


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bench") / "small.gguf"
    write_large_teacher(path, layers=1, hidden=256, ffn=256, vocab=256, kv_heads=2, tied=True)
    return path


def test_arms_take_turns_and_the_order_rotates() -> None:
    turns: list[str] = []
    arms = [Recorded(name, [1.0], turns) for name in "abc"]
    series = interleave(arms, make_ids(Shape(2, 3), 9), 3)
    assert "".join(turns) == "cab" + "abc" + "bca" + "cab"
    assert [len(one.seconds) for one in series] == [3, 3, 3]


def test_a_ratio_is_taken_between_neighbours() -> None:
    # The machine slows down tenfold on the way; each round's ratio is the same.
    shape = Shape(1, 100)
    ours, theirs = Series("us", shape, (1.0, 2.0, 10.0)), Series("them", shape, (1.5, 3.0, 15.0))
    (ratio,) = compare([ours, theirs])
    assert (ratio.median, ratio.least, ratio.greatest, ratio.rounds) == (1.5, 1.5, 1.5, 3)
    assert ours.tokens_per_second == 50
    (spread,) = compare([Series("us", shape, (1.0, 1.0, 1.0, 1.0)), Series("them", shape, (1.0, 2.0, 3.0, 4.0))])
    assert (spread.low, spread.median, spread.high, spread.greatest) == (1.75, 2.5, 3.25, 4.0)


def test_the_uncounted_round_is_not_in_the_series() -> None:
    turns: list[str] = []
    (series,) = interleave([Recorded("a", [99.0, 1.0, 2.0], turns)], make_ids(Shape(1, 2), 5), 2)
    assert series.seconds == (1.0, 2.0)


def test_ids_are_the_same_for_everyone_and_within_the_vocabulary() -> None:
    ids = make_ids(Shape(3, 50), 7)
    assert ids.shape == (3, 50)
    assert ids.dtype == np.int64
    assert set(ids.ravel()) == set(range(7))
    assert np.array_equal(ids, make_ids(Shape(3, 50), 7))


def test_the_worst_position_decides_about_agreement(tmp_path: Path) -> None:
    ours = np.random.default_rng(0).normal(size=(1, 4, 8)).astype(np.float32)
    theirs = ours * 3
    assert least_cosine(ours, theirs) == pytest.approx(1.0)
    theirs[0, 2] *= -1
    assert least_cosine(ours, theirs) == pytest.approx(-1.0)
    theirs[0, 2] = np.nan
    assert least_cosine(ours, theirs) == -1.0
    arms = [Recorded(name, [1.0], []) for name in "ab"]
    assert agree(arms, make_ids(Shape(1, 2), 5), tmp_path) == {"b": pytest.approx(-1.0)}


def test_a_whole_comparison_runs_in_worker_processes(model: Path) -> None:
    found = compare_on_cpu(
        model, ["dense"], [3, 300], rounds=2, threads=1, dtype="float32", announce=lambda _line: None
    )
    assert found["not_run"] == {}
    assert [result["shape"] for result in found["shapes"]] == ["1x3", "1x300"]
    for result in found["shapes"]:
        assert result["least_cosine"]["dense-float32"] > 0.999999
        assert all(seconds > 0 for one in result["series"] for seconds in one["seconds"])
    facts = found["facts"]
    assert facts["q4k-float32"]["resident_bytes"].keys() == {"Q4_K", "Q6_K", "F32"}
    assert facts["dense-float32"]["resident_bytes"].keys() == {"F32"}
    assert any("times as fast" in line for line in table(found))


def test_an_engine_that_cannot_run_is_reported_and_the_others_go_on(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "llama_cpp.py").write_text("raise ImportError('no such engine here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = compare_on_cpu(model, ["llama.cpp"], [3], rounds=1, threads=1, dtype="float32", announce=lambda _line: None)
    assert "no such engine here" in found["not_run"]["llama.cpp"]
    assert len(found["shapes"]) == 1
    assert "not run" in table(found)[-1]


def test_a_worker_that_dies_is_a_failed_arm() -> None:
    arm = WorkerArm("gone", "q4kd.trainer.no_such_module", [], 1)
    try:
        with pytest.raises(ArmFailed, match="exit code 1"):
            arm.prepare()
    finally:
        arm.close()


def test_a_worker_gets_its_threads_and_is_gone_after_close(model: Path) -> None:
    arm = worker_arm("q4k", model, 2, "float32")
    facts = arm.prepare()
    process = arm._process
    assert facts["threads"] == 2
    assert process is not None
    assert process.poll() is None
    assert process.args[0] == sys.executable
    arm.close()
    assert process.poll() == 0


def test_layers_of_every_type_are_centred_and_of_one_size() -> None:
    import gguf

    for name in LAYER_TYPES:
        packed = random_layer_blocks(np.random.default_rng(3), name, 256, 512, 0.02)
        weights = gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[name])
        assert weights.shape == (256, 512)
        assert weights.std() == pytest.approx(0.02, rel=0.05), name
        assert abs(weights.mean()) < 0.003, name


def test_a_synthetic_teacher_has_layers_of_the_type_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "typed.gguf"
    write_large_teacher(path, layers=1, hidden=256, ffn=256, vocab=256, kv_heads=2, tied=True, layer_type="Q3_K")
    tensors = open_model(path).tensors
    matrices = {name: tensor.type for name, tensor in tensors.items() if len(tensor.shape) == 2}
    assert matrices.pop("token_embd.weight") == "Q6_K"
    assert set(matrices.values()) == {"Q3_K"}


def test_processor_seconds_do_not_count_waiting(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arm = TeacherArm("q4k", model, 1, "float32", "processor")
    arm.prepare()
    logits = arm._teacher.logits

    def slow(*args: object, **kwargs: object) -> object:
        time.sleep(0.5)
        return logits(*args, **kwargs)

    monkeypatch.setattr(arm._teacher, "logits", slow)
    assert 0 < arm.run(make_ids(Shape(1, 4), 256)) < 0.4


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--type", "Q9"], "use one of Q4_0"), (["--type", "Q3_K", "--model", "x.gguf"], "leave out --model, or --type")],
)
def test_a_type_is_one_that_the_synthetic_model_can_have(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "teacher", *words]) == 2
    assert said in capsys.readouterr().err
