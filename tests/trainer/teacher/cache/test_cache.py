"""From a cache to a run without a teacher: the same steps, exact resume, no cache that belongs to something else."""

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked_pair import ForkedPair
from safetensors.torch import load_file, save_file

from q4kd.harness.__main__ import main
from q4kd.harness.inputs.command_lines import scratch_words
from q4kd.trainer import make_cache as cache_run
from q4kd.trainer.demo import student_path, teacher_path
from q4kd.trainer.teacher.cache import writer as cache_writer
from q4kd.trainer.teacher.cache.reader import CacheReader
from q4kd.trainer.teacher.cache.store import read_index
from q4kd.trainer.train.checkpoint import list_checkpoints

SEQ_LEN, VOCAB, STEPS = 32, 2048, 5


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "a.py").write_text(Path(json.encoder.__file__).read_text()[:6000])
    (folder / "b.py").write_text(Path(hashlib.__file__).read_text()[:3000])
    return folder


def files(corpus: Path, student: Path | None = None) -> list[str]:
    settings = {"seq_len": SEQ_LEN, "threads": 1, "dtype": "float32", "batch_size": 4}
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    return ["--student", str(student or student_path()), "--data", str(corpus), *words]


def make(corpus: Path, out: Path, *words: str) -> int:
    made = ("--teacher", str(teacher_path()), "--sample-tokens", "0", "--shard-mb", "1", "--out", str(out))
    return main(["cache", *files(corpus), *made, *words])


def distill(corpus: Path, out: Path, *words: str, student: Path | None = None) -> list[str]:
    settings = {"steps": STEPS, "lr": 0.002, "warmup_steps": 2, "eval_tokens": 64, "seed": 5, "alpha": 0.2}
    plain = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    plain += scratch_words(student or student_path())
    return ["distill", *files(corpus, student), *plain, "--out", str(out), *words]


def events(out: Path, name: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (out / "events.jsonl").read_text().splitlines())
    return [event for event in lines if event["event"] == name]


def losses(out: Path) -> list[float]:
    return [event["loss"] for event in events(out, "step")]


@pytest.fixture(scope="module")
def cache(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("caches") / "k16"
    assert make(corpus, folder, "--k", "16") == 0
    return folder


@pytest.fixture(scope="module")
def online(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "online"
    assert main(distill(corpus, out, "--teacher", str(teacher_path()))) == 0
    return out


def test_a_run_from_a_whole_cache_is_the_online_run(corpus: Path, online: Path, tmp_path: Path) -> None:
    """With every token listed only float16 is between the two."""
    assert make(corpus, tmp_path / "cache", "--k", str(VOCAB)) == 0
    out = tmp_path / "run"
    assert main(distill(corpus, out, "--teacher-cache", str(tmp_path / "cache"))) == 0
    assert losses(out) == pytest.approx(losses(online), abs=1e-3)
    own, other = (load_file(folder / "model" / "model.safetensors") for folder in (out, online))
    difference = max(float((own[name] - other[name]).norm() / other[name].norm()) for name in own)
    # Measured 2.2e-3: AdamW's first steps go by the sign of a gradient, however small.
    assert 0 < difference < 1e-2


def test_listed_tokens_give_a_lower_bound_and_an_honest_record(
    corpus: Path, cache: Path, online: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(distill(corpus, out, "--teacher-cache", str(cache))) == 0
    # The first step is of the same student on the same windows.
    first, whole = events(out, "step")[0], events(online, "step")[0]
    assert first["ce"] == pytest.approx(whole["ce"], rel=1e-6)
    assert 0.5 * whole["kd"] < first["kd"] < whole["kd"]
    printed = capsys.readouterr().out
    assert "teacher: cached, 16 of 2048 tokens" in printed
    assert "KL to teacher" not in printed
    record = json.loads((out / "run.json").read_text())
    digest = hashlib.sha256(teacher_path().read_bytes()).hexdigest()
    assert record["teacher"] == {"sha256": digest, "cache": cache.name, "k": 16}
    assert record["config"]["best_metric"] == "loss"
    evaluations = events(out, "eval")
    assert evaluations
    assert evaluations[-1]["loss"] < evaluations[0]["loss"]
    assert all("kl" not in event for event in evaluations)
    assert json.loads((out / "checkpoints" / "best.json").read_text())["metric"] == "loss"


def test_resume_is_exact_and_of_the_same_teacher(
    corpus: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--teacher-cache", str(cache))
    assert main(distill(corpus, tmp_path / "whole", *given)) == 0
    assert main(distill(corpus, tmp_path / "parts", *given, "--max-steps", "2")) == 0
    assert main(distill(corpus, tmp_path / "parts", *given, "--max-steps", "4", "--resume")) == 0
    state = json.loads((list_checkpoints(tmp_path / "parts")[-1] / "state.json").read_text())
    assert state["config"]["cached_teacher"].endswith(" k=16")
    index = (cache / "cache.json").read_text()
    try:
        (cache / "cache.json").write_text(index.replace(json.loads(index)["key"]["teacher_sha256"], "0" * 64))
        assert main(distill(corpus, tmp_path / "parts", *given, "--resume")) == 2
        assert "cached_teacher" in capsys.readouterr().err
    finally:
        (cache / "cache.json").write_text(index)
    assert main(distill(corpus, tmp_path / "parts", *given, "--resume")) == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_two_processes_read_their_windows_and_take_the_steps_of_one(corpus: Path, cache: Path, tmp_path: Path) -> None:
    given = ("--teacher-cache", str(cache))
    assert main(distill(corpus, tmp_path / "one", *given)) == 0
    with ForkedPair() as pair:
        pair.run(distill(corpus, tmp_path / "two", *given, "--set", "batch_size=2"))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=2e-5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--set", "seq_len=16"), "seq_len: 32 → 16"),
        (("--set", "packing=stream"), "packing: documents → stream"),
        (("--set", "data_glob=a*"), "data_sha256"),
        (("--teacher", str(student_path() / "config.json")), "teacher_sha256"),
        (("--teacher", "/nonexistent.gguf"), "No such file"),
        (("--set", "temperature=2"), "setting temperature: expected 1 with teacher_cache"),
        (("--set", "streaming=true"), "setting streaming"),
        (("--set", "best_metric=kl"), "setting best_metric"),
        (("--teacher-cache", "/nonexistent"), "cache.json"),
    ],
)
def test_another_cache_is_refused_by_what_differs(
    corpus: Path, cache: Path, tmp_path: Path, words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(distill(corpus, tmp_path / "run", "--teacher-cache", str(cache), *words)) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_another_tokenizer_or_width_is_refused(
    corpus: Path, cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def student(name: str) -> Path:
        return Path(shutil.copytree(student_path(), tmp_path / name))

    other = student("tokens")
    document = json.loads((other / "tokenizer.json").read_text())
    # Ids of two rare tokens change places: widths and most of the data stay as they are.
    vocabulary = document["model"]["vocab"]
    one, two = list(vocabulary)[-2:]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    (other / "tokenizer.json").write_text(json.dumps(document))
    given = ("--teacher-cache", str(cache))
    assert main(distill(corpus, tmp_path / "run", *given, student=other)) == 2
    assert "tokenizer_sha256" in capsys.readouterr().err
    wider = student("wider")
    config = json.loads((wider / "config.json").read_text()) | {"vocab_size": VOCAB + 64}
    (wider / "config.json").write_text(json.dumps(config))
    assert main(distill(corpus, tmp_path / "run", *given, student=wider)) == 2
    assert "rows: 2048 → 2112" in capsys.readouterr().err


def test_a_student_that_says_what_the_cache_does_is_refused(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from q4kd.trainer.data.batch import Batch
    from q4kd.trainer.errors import DegenerateDistillationError
    from q4kd.trainer.loss.config import KDLossConfig
    from q4kd.trainer.student.model import DistillationModel, load_student
    from q4kd.trainer.teacher.cache.cached_teacher import CachedTeacher
    from q4kd.trainer.teacher.cache.signal import take_top
    from q4kd.trainer.teacher.cache.store import CacheIndex, CacheKey
    from q4kd.trainer.train.guards import check_cached_not_degenerate

    model = DistillationModel(load_student(student_path(), 1), KDLossConfig()).eval()
    ids = torch.arange(2 * SEQ_LEN).view(2, SEQ_LEN)
    with torch.no_grad():
        logits = model.hidden(ids).flatten(0, 1) @ model.head_weight.T
    batch = Batch(ids, ids, None, np.array([0, 1]))
    # The first sequence of the batch decides, whatever is said of the second.
    for scales, name in (((1.0, 8.0), "same"), ((8.0, 1.0), "other")):
        (tmp_path / name).mkdir()
        index = CacheIndex(tmp_path / name, CacheKey("", "", "", VOCAB, SEQ_LEN, 2, "none"), 8, {})
        index.write_shard(0, take_top(logits * torch.tensor(scales).repeat_interleave(SEQ_LEN)[:, None], 8))
        cached = CachedTeacher(index)
        if name == "same":
            with pytest.raises(DegenerateDistillationError, match="over the cached tokens"):
                check_cached_not_degenerate(cached, model, batch)
        else:
            assert check_cached_not_degenerate(cached, model, batch) > 1e-3


@pytest.mark.parametrize(("every_s", "lines"), [(0.0, 3), (1e6, 0)])
def test_progress_is_said_now_and_then(
    every_s: float, lines: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from q4kd.trainer.teacher.cache.store import CacheIndex, CacheKey

    monkeypatch.setattr(cache_writer, "_SAY_EVERY_S", every_s)
    say = cache_writer._progress(CacheIndex(tmp_path, CacheKey("", "", "", VOCAB, SEQ_LEN, 9, "none"), 8, {}), 9)
    for _ in range(3):
        say(2)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == lines
    assert not said or said[-1].startswith("cache: 6 of 9 windows")


def test_a_killed_writer_loses_one_shard_and_resumes_to_the_same_bytes(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--k", "1024")
    assert make(corpus, tmp_path / "whole", *words) == 0
    killed = tmp_path / "killed"
    command = ["cache", *files(corpus), "--teacher", str(teacher_path()), "--sample-tokens", "0", "--shard-mb", "1"]
    program = subprocess.Popen(
        [sys.executable, "-m", "q4kd.harness", *command, *words, "--out", str(killed)], stdout=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not list(killed.glob("signal-*.safetensors")):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    program.send_signal(signal.SIGKILL)
    assert program.wait() == -signal.SIGKILL
    (killed / ".signal-000001.safetensors.x.tmp").write_bytes(b"half")
    before = {
        path.name: path.stat().st_mtime_ns for path in killed.glob("signal-*") if path.name in read_shards(killed)
    }
    if len(read_shards(killed)) == len(read_shards(tmp_path / "whole")):
        pytest.skip("the writer was done before it was killed")
    assert make(corpus, killed, *words) == 0
    assert contents(killed) == contents(tmp_path / "whole")
    assert all((killed / name).stat().st_mtime_ns == was for name, was in before.items())
    # What is damaged is made anew, and only that.
    path = killed / "signal-000000.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    assert make(corpus, killed, *words) == 0
    assert "signal-000000.safetensors is damaged or missing: made anew" in capsys.readouterr().out
    assert contents(killed) == contents(tmp_path / "whole")


def read_shards(folder: Path) -> set[str]:
    path = folder / "cache.json"
    return set(json.loads(path.read_text())["shards"]) if path.is_file() else set()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != ".lock"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--k", "8"), "k of the cache"),
        (("--k", "0"), "--k: expected 1"),
        (("--k", "4000"), "at most 2048"),
        (("--set", "seq_len=16"), "seq_len: 32 → 16"),
        (("--set", "streaming=true"), "setting streaming"),
        (("--sample-tokens", "-1"), "--sample-tokens"),
    ],
)
def test_a_writer_refuses_what_is_there_already_and_what_cannot_be(
    corpus: Path, cache: Path, words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(cache)
    assert make(corpus, cache, "--k", "16", *words) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert contents(cache) == before


def test_shards_and_drafts_of_somebody_are_left(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".signal-notes.tmp").write_bytes(b"mine")
    (tmp_path / "signal-000000.safetensors").write_bytes(b"mine")
    assert make(corpus, tmp_path, "--k", "16") == 2
    assert "expected no shard where cache.json is not" in capsys.readouterr().err
    assert (tmp_path / "signal-000000.safetensors").read_bytes() == b"mine"
    (tmp_path / "signal-000000.safetensors").unlink()
    assert make(corpus, tmp_path, "--k", "16") == 0
    assert (tmp_path / ".signal-notes.tmp").read_bytes() == b"mine"


def test_several_processes_and_a_full_disk_are_refused(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = shutil.disk_usage(tmp_path)
    full = lambda _path: usage._replace(free=1000)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(cache_writer.shutil, "disk_usage", full)
        assert make(corpus, tmp_path / "cache") == 2
    assert "of free disk" in capsys.readouterr().err
    assert not list((tmp_path / "cache").glob("signal*"))
    with monkeypatch.context() as patch:
        patch.setitem(os.environ, "WORLD_SIZE", "2")
        assert make(corpus, tmp_path / "cache") == 2
    assert "expected one process, got 2" in capsys.readouterr().err

    def refuse(*_arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("q4kd.trainer.teacher.cache.store.write_atomic", refuse)
    assert make(corpus, tmp_path / "cache") == 74
    assert "0 of 1 shards are kept" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["id", "sum", "nan", "repeated"])
def test_a_shard_that_is_no_distribution_is_refused(
    corpus: Path, cache: Path, tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Digest and index agree with it: whoever wrote it wrote both."""
    folder = Path(shutil.copytree(cache, tmp_path / "cache"))
    path = folder / "signal-000000.safetensors"
    tensors = load_file(path)
    if what == "id":
        tensors["ids"] = torch.full_like(tensors["ids"].int(), VOCAB).to(torch.uint16)
    elif what == "repeated":
        tensors["ids"] = torch.zeros_like(tensors["ids"].int()).to(torch.uint16)
    else:
        tensors["tail"].fill_(0.0 if what == "sum" else float("nan"))
    save_file(tensors, path)
    index = json.loads((folder / "cache.json").read_text())
    index["shards"][path.name] |= {
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "bytes": path.stat().st_size,
    }
    (folder / "cache.json").write_text(json.dumps(index))
    assert main(distill(corpus, tmp_path / "run", "--teacher-cache", str(folder))) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "make it anew" in error


def test_the_table_says_what_each_k_costs(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cache_run, "write_cache", lambda *_arguments: None)
    log = tmp_path / "events.jsonl"
    words = ("--k", "16", "--sample-tokens", "64", "--events", str(log))
    assert make(corpus, tmp_path / "cache", *words) == 0
    errors = events(tmp_path, "cache_error")[0]["errors"]
    assert [error["k"] for error in errors] == [8, 16, 32, 128]
    kl = [error["cached"] for error in errors]
    assert kl == sorted(kl)
    assert kl[-1] < errors[0]["online"]
    assert all(a["tail_mass"] > b["tail_mass"] > 0 for a, b in itertools.pairwise(errors))
    printed = capsys.readouterr().out
    assert "*  16           66" in printed
    assert printed.index("bytes (k 16)") < printed.index("bytes/token")


def test_batches_know_their_windows(cache: Path) -> None:
    from q4kd.trainer.data.batch import Batch

    batch = Batch(torch.arange(8).view(4, 2), torch.zeros(4, 2).long(), None, np.array([7, 5, 3, 1]))
    parts = [part.windows_B for part in batch[::2].to(torch.device("cpu")).split(1)]
    assert [part.tolist() for part in parts if part is not None] == [[7], [3]]
    assert dataclasses.replace(batch, labels_BT=batch.ids_BT).windows_B is batch.windows_B
    assert batch.arrays()["windows"].tolist() == [7, 5, 3, 1]
    reader = CacheReader(read_index(cache))
    whole, one = reader.read(np.array([3, 1])), reader.read(np.array([1]))
    assert torch.equal(whole.ids_MK[SEQ_LEN:], one.ids_MK)
