"""What becomes of a command whose readers go away, whose disk is full, or whose streams were closed."""

import errno
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from q4kd.harness.__main__ import main
from q4kd.harness.cli.output import GuardedStream, Interrupt
from q4kd.trainer.demo import student_path, teacher_path

PROGRAM = [sys.executable, "-P", "-m", "q4kd.harness"]


def _words(out: Path, *more: str) -> list[str]:
    (out.parent / "text.txt").write_text("some words to learn from, again and again\n" * 400)
    settings = ["--set", "batch_size=2", "--set", "eval_tokens=0", "--set", "log_every=1", *more]
    return [
        *(
            "distill",
            "--teacher",
            str(teacher_path()),
            "--student",
            str(student_path()),
            "--from-scratch",
            "--out",
            str(out),
        ),
        *("--data", str(out.parent / "text.txt"), "--seq-len", "32", "--dtype", "float32", *settings),
    ]


def _steps(out: Path) -> int:
    path = out / "events.jsonl"
    return path.read_text().count('"event": "step"') if path.exists() else 0


def test_a_run_whose_reader_has_gone_goes_on_to_its_end(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = " ".join([*PROGRAM, *_words(out, "--set", "steps=6")])
    script = f"set -o pipefail; {command} | head -n 2 >/dev/null"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    assert "q4kd: standard output cannot be written (Broken pipe): the run goes on" in done.stderr
    assert _steps(out) == 6 and (out / "model" / "config.json").is_file() and (out / "summary.json").is_file()


def test_a_closed_terminal_ends_a_run_with_a_checkpoint_and_sends_twice(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = subprocess.Popen(
        [*PROGRAM, *_words(out, "--set", "steps=4000")], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while _steps(out) < 2:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    assert process.stderr is not None
    process.stderr.close()
    process.send_signal(signal.SIGHUP)
    time.sleep(0.01)
    process.send_signal(signal.SIGHUP)  # a shell passes on what the kernel has sent already
    assert process.wait(60) == 129
    assert list(out.glob("checkpoints/step-*"))


@pytest.mark.parametrize("target", ["/dev/full", "closed pipe", "closed"])
def test_other_commands_keep_their_codes(tmp_path: Path, target: str) -> None:
    (tmp_path / "bad.yaml").write_text("a: [")
    for words, code in ((["contracts", "schema"], 74 if target == "/dev/full" else 0), (["contracts", "validate"], 2)):
        words = [*words, str(tmp_path / "bad.yaml")] if words[1] == "validate" else words
        with open("/dev/full", "w") as full:  # noqa: PTH123 - a device
            read, write = os.pipe()
            os.close(read)
            stdout = {"/dev/full": full.fileno(), "closed pipe": write, "closed": None}[target]
            command = ["bash", "-c", '"$@" >&-', "bash", *PROGRAM, *words] if stdout is None else [*PROGRAM, *words]
            done = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
            os.close(write)
        assert done.returncode == code, done.stderr
        assert done.stderr.count("\n") == int(code != 0)


def test_closed_streams_are_no_file_of_the_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [*PROGRAM, *_words(out, "--set", "steps=2")]
    done = subprocess.run(["bash", "-c", '"$@" <&- >&- 2>&-', "bash", *command], timeout=120, check=False)
    assert done.returncode == 0
    assert (out / ".lock").read_bytes() == b""


def test_letters_that_the_output_lacks_are_escaped(tmp_path: Path) -> None:
    stream = io.TextIOWrapper(raw := io.BytesIO(), encoding="ascii", errors="strict")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "stdout", stream)
        (tmp_path / "é").mkdir()
        assert main(["contracts", "validate", str(tmp_path / "é")]) in (0, 1, 2)
        print("é", end="")
        stream.flush()
    assert raw.getvalue().endswith(b"\\xe9")


def test_the_first_error_is_kept_and_later_text_dropped() -> None:
    class Full(io.StringIO):
        def write(self, _text: str) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    guard = GuardedStream(Full())
    assert guard.write("text") == 4
    guard.flush()
    assert guard.lost is guard.error is not None and guard.error.errno == errno.ENOSPC
    gone = GuardedStream(Full())
    gone.error = BrokenPipeError(errno.EPIPE, "Broken pipe")
    assert gone.lost is None and gone.write("more") == 4


def test_what_an_interruption_breaks_is_an_interruption(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def cut_off(_self: object, *_arguments: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)
        except KeyboardInterrupt:
            raise RecursionError("maximum recursion depth exceeded") from None

    monkeypatch.setattr("q4kd.harness.cli.main._CommandLine.parse_known_args", cut_off)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err == "q4kd: interrupted\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not Interrupt().came
