"""Whole runs through the command line: they learn, stop, resume to the bit, and refuse what makes no sense."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from q4kd.harness.__main__ import main
from q4kd.harness.inputs.command_lines import scratch_words
from q4kd.trainer.demo import student_path, teacher_path
from q4kd.trainer.errors import InputError
from q4kd.trainer.student.model import load_student, load_tokenizer
from q4kd.trainer.train.checkpoint import list_checkpoints, read_state
from q4kd.trainer.train.guards import check_vocabulary


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for source in (Path(json.__file__), Path(subprocess.__file__), Path(shutil.__file__)):
        shutil.copy(source, folder / f"{source.parent.name}-{source.name}")
    return folder


def arguments(out: Path, corpus: Path, *extra: str, student: Path | None = None) -> list[str]:
    settings = {"steps": 6, "batch_size": 2, "lr": 0.002, "warmup_steps": 2, "threads": 1, "eval_tokens": 64}
    return [
        *("distill", "--teacher", str(teacher_path()), "--student", str(student or student_path())),
        *scratch_words(student or student_path()),
        # float32 is meant: on a processor with AMX, `auto` is bfloat16, whose products depend on the batch they are in.
        *("--data", str(corpus), "--out", str(out), "--seq-len", "32", "--seed", "5", "--dtype", "float32"),
        *[word for key, value in settings.items() for word in ("--set", f"{key}={value}")],
        *extra,
    ]


def events(out: Path, name: str = "") -> list[dict[str, Any]]:
    lines = (out / "events.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if not name or event["event"] == name]


def losses(out: Path) -> dict[int, float]:
    return {event["step"]: event["loss"] for event in events(out, "step")}


def test_a_run_leaves_a_model_that_learned(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(arguments(out, corpus, "--set", "log_every=2", "--set", "accumulation=2")) == 0
    printed = capsys.readouterr().out
    assert [line.split(":")[0] for line in printed.splitlines() if line.startswith("Step")] == [
        "Step 2/6",
        "Step 4/6",
        "Step 6/6",
    ]
    found = losses(out)
    assert list(found) == [1, 2, 3, 4, 5, 6]
    assert found[6] < found[1]
    first, last = events(out, "eval")
    assert last["kl"] < first["kl"]
    assert events(out, "step")[0]["tokens"] == 2 * 2 * 32
    model = load_student(out / "model", seed=0)
    fresh = load_student(student_path(), seed=5)
    assert not torch.equal(model.get_input_embeddings().weight, fresh.get_input_embeddings().weight)
    assert load_tokenizer(out / "model").eos_token_id is not None


def test_smoke_is_exactly_n_steps_projects_and_writes_no_model(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(tmp_path / "run", corpus, "--max-steps", "3")) == 0
    assert list(losses(tmp_path / "run")) == [1, 2, 3]
    assert "3 of 6 steps; the full run would take" in capsys.readouterr().out
    # The first step compiles; it comes once in the full run too.
    first, *others = (event["seconds"] + event["data_s"] for event in events(tmp_path / "run", "step"))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["projected_seconds_of_full_run"] == pytest.approx(first + 5 * sum(others) / 2)
    assert summary["tokens_per_second"] == pytest.approx(64 / (sum(others) / 2))
    assert not (tmp_path / "run" / "model").exists()
    assert main(arguments(tmp_path / "zero", corpus, "--max-steps", "0")) == 2
    assert "max_steps" in capsys.readouterr().err


def test_resume_repeats_the_uninterrupted_run_bit_for_bit(tmp_path: Path, corpus: Path) -> None:
    assert main(arguments(tmp_path / "whole", corpus)) == 0
    assert main(arguments(tmp_path / "parts", corpus, "--max-steps", "2")) == 0
    assert main(arguments(tmp_path / "parts", corpus, "--max-steps", "5", "--resume")) == 0
    assert main(arguments(tmp_path / "parts", corpus, "--resume")) == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert events(tmp_path / "parts", "eval")[-1]["kl"] == events(tmp_path / "whole", "eval")[-1]["kl"]


def test_resume_after_sigkill_is_exact(tmp_path: Path, corpus: Path) -> None:
    settings = ("--set", "checkpoint_every=1", "--set", "steps=30")
    assert main(arguments(tmp_path / "whole", corpus, *settings)) == 0
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "q4kd.harness", *arguments(out, corpus, *settings)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (out / "events.jsonl").exists() or len(events_so_far(out)) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    done = read_state(list_checkpoints(out)[-1]).step
    assert 0 < done < 30
    assert main(arguments(out, corpus, *settings, "--resume")) == 0
    resumed = losses(out)
    assert resumed == losses(tmp_path / "whole")


def events_so_far(out: Path) -> list[str]:
    return [line for line in (out / "events.jsonl").read_text().splitlines() if '"checkpoint"' in line]


def test_resume_refuses_another_run_and_says_what_differs(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert main(arguments(out, corpus, "--resume")) == 2
    assert "expected a checkpoint" in capsys.readouterr().err
    assert main(arguments(out, corpus, "--max-steps", "1")) == 0
    assert main(arguments(out, corpus)) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(arguments(out, corpus, "--resume", "--set", "temperature=3")) == 2
    assert "temperature: 1.0 → 3.0" in capsys.readouterr().err
    (corpus / "later.txt").write_text("more words " * 200)
    assert main(arguments(out, corpus, "--resume")) == 2
    assert "other training data" in capsys.readouterr().err
    (corpus / "later.txt").unlink()
    weights = list_checkpoints(out)[-1] / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    assert main(arguments(out, corpus, "--resume")) == 2
    assert "model.safetensors" in capsys.readouterr().err


def test_a_resumed_run_may_split_its_steps_in_another_way(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert main(arguments(whole, corpus, "--set", "batch_size=4")) == 0
    assert main(arguments(out, corpus, "--set", "batch_size=4", "--max-steps", "2")) == 0
    assert main(arguments(out, corpus, "--set", "batch_size=2", "--resume")) == 2
    assert "batch_size: 4 → 2" in capsys.readouterr().err
    assert main(arguments(out, corpus, "--set", "batch_size=1", "--set", "accumulation=4", "--resume")) == 0
    assert losses(out) == pytest.approx(losses(whole), rel=2e-5)


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path, corpus: Path) -> None:
    out = tmp_path / "run"
    assert main(arguments(out, corpus, "--set", "checkpoint_every=1", "--set", "keep=3")) == 0
    assert [path.name for path in list_checkpoints(out)] == ["step-000004", "step-000005", "step-000006"]


def teacher_as_student(folder: Path) -> Path:
    """Write the demo teacher, decoded, as a Hugging Face student."""
    from safetensors.torch import save_file

    config = json.loads((student_path() / "config.json").read_text())
    reader = gguf.GGUFReader(teacher_path())
    value = {name: field.contents() for name, field in reader.fields.items()}
    config |= {
        "hidden_size": value["qwen2.embedding_length"],
        "intermediate_size": value["qwen2.feed_forward_length"],
        "num_hidden_layers": value["qwen2.block_count"],
        "num_attention_heads": value["qwen2.attention.head_count"],
        "num_key_value_heads": value["qwen2.attention.head_count_kv"],
        "layer_types": ["full_attention"] * value["qwen2.block_count"],
    }
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj"}
    names |= {"attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj"}
    names |= {"ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    tensors = {}
    for tensor in reader.tensors:
        data = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        parts = tensor.name.split(".")
        if parts[0] == "blk":
            tensors[f"model.layers.{parts[1]}.{names[parts[2]]}.{parts[3]}"] = data
        else:
            tensors["model.embed_tokens.weight" if parts[0] == "token_embd" else "model.norm.weight"] = data
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(student_path() / name, folder / name)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_student_that_is_the_teacher_is_refused(
    tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = teacher_as_student(tmp_path / "twin")
    assert main(arguments(tmp_path / "run", corpus, student=student)) == 2
    assert "teacher and student" in capsys.readouterr().err
    assert main(arguments(tmp_path / "run", corpus, "--allow-degenerate-kd", "--max-steps", "1", student=student)) == 0
    # Exactly the same function: the distillation term is there and is zero.
    assert events(tmp_path / "run", "step")[0]["kd"] < 1e-4


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_batch(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import q4kd.trainer.loss.fused as kd_loss

    original = kd_loss.divergence_rows
    monkeypatch.setattr(kd_loss, "divergence_rows", lambda p, q, config: (original(p, q, config)[0] * float("nan"), q))
    out = tmp_path / "run"
    assert main(arguments(out, corpus)) == 65
    assert "not finite" in capsys.readouterr().err
    assert (out / "aborted" / "step-000001-batch.npz").is_file()
    assert events(out, "aborted")[0]["step"] == 1
    assert not losses(out)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (("--teacher", "/nonexistent/t.gguf"), "No such file"),
        (("--teacher", __file__), "expected a GGUF file"),
        (("--student", "/nonexistent"), "config.json"),
        (("--data", "/nonexistent"), "--data"),
        (("--set", "nonsense=1"), "nonsense"),
        (("--set", "seq_len=513"), "at most 512, the teacher's context length"),
        (("--set", "accumulation=5000"), "windows of 32"),
        (("--device", "cuda"), "--device"),
        (("--set", "lr"), "key=value"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(
    tmp_path: Path, corpus: Path, extra: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(tmp_path / "run", corpus, *extra)) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert "Traceback" not in error


def test_vocabularies_are_compared_token_by_token() -> None:
    tokens = ["a", "b", "c", "<pad>"]
    check_vocabulary(tokens, 4, {"a": 0, "b": 1, "c": 2}, 3)
    with pytest.raises(InputError, match="id 1 is 'x'"):
        check_vocabulary(tokens, 4, {"a": 0, "x": 1}, 3)
    with pytest.raises(InputError, match="4 rows"):
        check_vocabulary(tokens, 4, {"a": 0}, 5)
    with pytest.raises(InputError, match="nothing"):
        check_vocabulary(tokens, 8, {"a": 0, "e": 4}, 5)
    with pytest.raises(InputError, match="each id of its tokenizer, 3, got 2 rows"):
        check_vocabulary(tokens, 4, {"a": 0, "b": 1, "c": 2}, 2)
    with pytest.raises(InputError, match="token strings"):
        check_vocabulary([], 4, {"a": 0}, 4)
    # A converter wrote Gemma's runs of spaces plainly; a space is no other letter.
    check_vocabulary(["a", "  "], 2, {"a": 0, "▁▁": 1}, 2)
    for token in ("▁", "▁a"):
        with pytest.raises(InputError, match="id 1 is"):
            check_vocabulary(["a", "  "], 2, {"a": 0, token: 1}, 2)


def test_two_processes_take_the_steps_of_one(tmp_path: Path, corpus: Path) -> None:
    assert main(arguments(tmp_path / "one", corpus, "--set", "batch_size=4")) == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*launcher, "-m", "q4kd.harness", *arguments(tmp_path / "two", corpus, "--set", "batch_size=2")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    # What a process says comes before what the launcher makes of it.
    assert done.returncode == 0, done.stderr[:8000]
    assert done.stdout.count("teacher ready") == 1
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert list(two) == [1, 2, 3, 4, 5, 6]
    assert two == pytest.approx(one, rel=2e-5)
    assert [event["tokens"] for event in events(tmp_path / "two", "step")] == [4 * 32] * 6


def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_keeps_the_last(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import q4kd.trainer.train.checkpoint as checkpoint

    original = checkpoint.write_json

    def full(path: Path, value: object) -> None:
        if "step-000004" in str(path):
            raise OSError(28, "No space left on device")
        original(path, value)

    monkeypatch.setattr(checkpoint, "write_json", full)
    out = tmp_path / "run"
    assert main(arguments(out, corpus, "--set", "checkpoint_every=2")) == 74
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert "kept: step-000002" in error
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000002"]
    monkeypatch.undo()
    assert main(arguments(out, corpus, "--set", "checkpoint_every=2", "--resume")) == 0
    assert list(losses(out)) == [1, 2, 3, 4, 5, 6]


def test_a_signal_waits_for_the_checkpoint_that_is_being_written(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import q4kd.trainer.train.checkpoint as checkpoint
    import q4kd.trainer.train.loop as loop

    write, step, writing = checkpoint.write_tensors, loop.train_step, []

    def slow(*arguments: Any) -> str:
        time.sleep(0.2)
        return write(*arguments)

    def signalled(*arguments: Any) -> Any:
        result = step(*arguments)
        if list((tmp_path / "run" / "checkpoints").glob(".step-000002.tmp")):
            writing.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    monkeypatch.setattr(checkpoint, "write_tensors", slow)
    monkeypatch.setattr(loop, "train_step", signalled)
    out = tmp_path / "run"
    assert main(arguments(out, corpus, "--set", "checkpoint_every=2")) == 143
    assert writing == [True]
    assert "SIGTERM: stopped after step 3" in capsys.readouterr().err
    assert [read_state(path).step for path in list_checkpoints(out)] == [2, 3]
    assert not list((out / "checkpoints").glob(".*"))
    assert not (out / "model").exists()
    monkeypatch.undo()
    assert main(arguments(out, corpus, "--set", "checkpoint_every=2", "--resume")) == 0
    assert list(losses(out)) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("is_there", [True, False])
def test_a_run_on_the_cpu_beside_a_gpu_says_so(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], is_there: bool
) -> None:
    monkeypatch.setattr("q4kd.trainer.distill.has_visible_gpu", lambda: is_there)
    assert main(arguments(tmp_path / "run", corpus, "--set", "steps=1")) == 0
    assert ("this machine has an NVIDIA GPU, which --device cuda uses" in capsys.readouterr().out) is is_there


def test_the_phases_of_a_run_add_up_to_its_wall_time(tmp_path: Path, corpus: Path) -> None:
    out = tmp_path / "run"
    words = arguments(out, corpus, "--set", "checkpoint_every=2", "--set", "eval_every=2")
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "q4kd.harness", *words], capture_output=True, text=True, check=True)
    took = time.monotonic() - begun
    summary = json.loads((out / "summary.json").read_text())
    phases = summary["wall"]
    assert sum(phases.values()) == pytest.approx(summary["wall_seconds"])
    # From the start of the process, as its parent sees it, to the last event: what follows is its end.
    seen = [event["unix"] for event in events(out)]
    assert max(seen) - min(seen) <= summary["wall_seconds"] <= took
    steps = sum(event["seconds"] + event["data_s"] for event in events(out, "step"))
    assert phases["train"] == pytest.approx(steps, rel=0.05)
    assert min(phases[name] for name in ("open", "load", "evaluate", "save", "other")) > 0
    assert done.stdout.splitlines()[-1].startswith(f"wall {summary['wall_seconds']:.1f} s: open {phases['open']:.1f}, ")
    ends = {event["what"] for event in events(out, "phase")}
    assert ends >= {"transformers imported", "memory planned", "data waited for", "student checked", "model written"}
    # What was done by name adds up to its phase, but for what lies between.
    for name, share in (("open", 0.95), ("load", 0.95)):
        assert share * phases[name] <= sum(summary["wall_parts"][name].values()) <= 1.001 * phases[name]
    assert summary["wall_parts"]["open"]["program and torch imported"] > 0.1


def test_weights_alone_are_not_resumed(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    words = ("--set", "checkpoint_every=0", "--set", "eval_every=2", "--set", "keep=1")
    assert main(arguments(out, corpus, *words)) == 0
    checkpoints = out / "checkpoints"
    assert (checkpoints / "step-000006").is_dir()
    evaluated = {event["step"]: event["kl"] for event in events(out, "eval") if event["step"]}
    best = min(evaluated, key=lambda step: evaluated[step])
    assert json.loads((checkpoints / "best.json").read_text())["checkpoint"] == f"step-{best:06d}" == "step-000006"
    # What a run leaves that is killed after its best evaluation and before a checkpoint.
    (checkpoints / "step-000006").rename(checkpoints / "best-000006")
    for name in ("optimizer.safetensors", "random.safetensors"):
        (checkpoints / "best-000006" / name).unlink()
    capsys.readouterr()
    assert main(arguments(out, corpus, *words, "--resume")) == 2
    said = capsys.readouterr().err
    assert "got best-000006 alone, which holds weights and neither moments nor random states; start a new run" in said
    assert main(arguments(out, corpus, *words)) == 2
    assert "best-000006 of an earlier run" in capsys.readouterr().err


def test_two_runs_cannot_share_a_folder(tmp_path: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from q4kd.trainer.train.run.folder import locked

    with locked(tmp_path / "run", is_main=True):
        assert main(arguments(tmp_path / "run", corpus)) == 2
    assert "no other run is using" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(arguments(tmp_path / "file" / "run", corpus)) == 2
    assert "--out" in capsys.readouterr().err
