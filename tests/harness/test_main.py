import argparse
import os
import subprocess
import sys
import types

import pytest

from q4kd.harness.cli import main as entry
from q4kd.trainer.errors import InputError, StoppedError, TrainingAborted


def raising(error):
    def run(_args):
        raise error

    return run


@pytest.fixture
def main(monkeypatch):
    """The command line with a few commands of our own."""
    module = types.ModuleType("q4kd_fake_commands")

    def add_commands(subparsers):
        commands = {
            "good": lambda args: 0,
            "no": lambda args: 1,
            "input": raising(InputError("a\x1b[31m.gguf", expected="x", got="y\nz", remedy="do w")),
            "other": raising(StoppedError("", 15)),
            "aborted": raising(TrainingAborted("loss is not finite at step 3")),
            "torch": raising(ModuleNotFoundError("No module named 'torch'", name="torch")),
            "cupy": raising(ModuleNotFoundError("No module named 'cupy'", name="cupy")),
            "module": raising(ModuleNotFoundError("No module named 'q4kd.x'", name="q4kd.x")),
            "defect": raising(ZeroDivisionError("division by zero")),
            "memory": raising(MemoryError()),
            "map": raising(OSError(12, "Cannot allocate memory")),
            "library": raising(ImportError("libtorch_cpu.so: failed to map segment from shared object")),
            "disk": raising(OSError(28, "No space left on device")),
            "stop": raising(KeyboardInterrupt()),
            "usage": raising(SystemExit(2)),
        }
        for name, run in commands.items():
            parser = subparsers.add_parser(name)
            parser.add_argument("--n", type=int)
            parser.set_defaults(run=run)

    module.add_commands = add_commands
    monkeypatch.setitem(sys.modules, "q4kd_fake_commands", module)
    monkeypatch.setattr(entry, "COMMAND_MODULES", ("q4kd_fake_commands",))
    return entry.main


@pytest.mark.parametrize(
    ("command", "code", "said"),
    [
        ("good", 0, ""),
        ("no", 1, ""),
        ("input", 2, "q4kd: a?[31m.gguf: expected x, got y z; do w\n"),
        ("aborted", 1, "q4kd: loss is not finite at step 3\n"),
        ("torch", 2, "q4kd: torch is not installed; pip install 'q4kd[train]'\n"),
        ("cupy", 2, "q4kd: cupy is not installed; pip install 'q4kd[cuda13]'\n"),
        ("module", 3, "q4kd: internal error: No module named 'q4kd.x'; run with --debug for the traceback\n"),
        (
            "defect",
            3,
            "q4kd: internal error: ZeroDivisionError: division by zero; run with --debug for the traceback\n",
        ),
        ("memory", 75, "q4kd: out of memory: MemoryError: ; free some, or raise this shell's limit (ulimit -v)\n"),
        (
            "map",
            75,
            "q4kd: out of memory: OSError: [Errno 12] Cannot allocate memory; free some, or raise this shell's limit "
            "(ulimit -v)\n",
        ),
        (
            "library",
            75,
            "q4kd: out of memory: ImportError: libtorch_cpu.so: failed to map segment from shared object; free some, "
            "or raise this shell's limit (ulimit -v)\n",
        ),
        (
            "disk",
            3,
            "q4kd: internal error: OSError: [Errno 28] No space left on device; run with --debug for the traceback\n",
        ),
        ("stop", 130, "q4kd: interrupted\n"),
        ("other", 143, ""),
        ("usage", 2, ""),
    ],
)
def test_every_ending_has_its_code_and_one_line(main, capsys, command, code, said):
    assert main([command]) == code
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("arguments", [["--debug", "defect"], ["defect", "--debug"], ["defect", "--n", "1", "--debug"]])
def test_debug_shows_the_traceback_wherever_it_stands(main, capsys, arguments):
    assert main(arguments) == 3
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("q4kd: internal error: ZeroDivisionError: division by zero\n")


@pytest.mark.parametrize("arguments", [["goo"], ["good", "--m"], ["good", "--n", "x"], ["--x"]])
def test_bad_arguments_are_one_line(main, capsys, arguments):
    assert main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("q4kd: ")
    assert err.count("\n") == 1
    assert "--help`" in err


def test_help_and_version(main, capsys):
    assert main([]) == 0
    assert "COMMAND" in capsys.readouterr().out
    assert main(["--help"]) == 0
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("q4kd ")


def test_a_closed_pipe_is_not_an_error():
    code = """
import sys
from q4kd.harness.cli import main as entry
import types
module = types.ModuleType("m")
def run(args):
    for _ in range(100000): print("x" * 80)
    return 0
module.add_commands = lambda sub: sub.add_parser("much").set_defaults(run=run)
sys.modules["m"] = module
entry.COMMAND_MODULES = ("m",)
sys.exit(entry.main(["much"]))
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(100)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(30) == 0


def test_the_pinned_commands_are_there_and_cost_no_torch():
    code = """
import sys
from q4kd.harness.__main__ import build_parser
parser = build_parser()
print(*parser._subparsers._group_actions[0].choices)
print("torch" in sys.modules, "numpy" in sys.modules, "cupy" in sys.modules)
"""
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    ).stdout
    commands, loaded = out.splitlines()
    assert {"inspect", "logits", "distill", "contracts", "falsify", "sabotage", "evidence", "doctor"} <= set(
        commands.split()
    )
    assert loaded.split()[0] == "False"
    assert loaded.split()[2] == "False"


def test_the_options_people_script_against():
    from q4kd.harness.cli.falsify import add_commands

    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers())
    args = parser.parse_args(["falsify", "--contracts", "c", "--profile", "cpu", "-k", "FT", "--out", "o"])
    assert (str(args.contracts), args.profile, args.keyword, str(args.out), args.workers) == ("c", "cpu", "FT", "o", 0)
    args = parser.parse_args(["sabotage", "--profile", "cpu", "-k", "FT", "--changed"])
    assert args.changed is True
    assert parser.parse_args(["doctor"]).run
