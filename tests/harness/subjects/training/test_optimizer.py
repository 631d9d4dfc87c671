"""What the experiments on 8-bit moments run, and how a checkpoint with such moments is counted."""

from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from q4kd.harness.__main__ import build_parser
from q4kd.harness.runs.experiment import EXPERIMENTS, Inputs
from q4kd.harness.subjects.training import optimizer
from q4kd.trainer.cli.arguments import read_run_arguments


def test_each_optimiser_is_stopped_run_whole_and_resumed(tmp_path: Path) -> None:
    for device, count in (("cpu", 1), ("cuda", 3)):
        commands = optimizer.eight_bit_commands(Inputs(tmp_path, "cpu"), device)
        args = {name: build_parser().parse_args(argv) for name, argv in commands}
        configs = {name: read_run_arguments(found) for name, found in args.items()}
        assert len(commands) == 1 + 3 * count and configs.pop("adamw").optimizer == "adamw"
        assert {config.device for config in configs.values()} == {device}
        for name, config in configs.items():
            kind, _, arm = name.rpartition("-")
            assert config.optimizer == kind and args[name].resume is (arm == "resumed")
            assert config.out == Path(f"{kind}-{'whole' if arm == 'whole' else 'stopped'}")
            assert config.max_steps == (optimizer.STOPPED_AT if arm == "stopped" else None)
    assert EXPERIMENTS["eight-bit-runs"].needs == ("bitsandbytes",)
    assert EXPERIMENTS["cuda-eight-bit-runs"].needs == ("cuda", "bitsandbytes")


def test_moments_are_counted_in_the_bytes_that_the_checkpoint_holds(tmp_path: Path) -> None:
    tensors = {
        "matrix|state1": np.zeros((40, 20), np.uint8),
        "matrix|state2": np.zeros((40, 20), np.uint8),
        "matrix|absmax1": np.zeros(4, np.float32),
        "matrix|absmax2": np.zeros(4, np.float32),
        "norm|state1": np.zeros(20, np.float32),
        "norm|state2": np.zeros(20, np.float32),
    }
    save_file(tensors, tmp_path / "o.safetensors")
    counted = optimizer.count_moments(tmp_path / "o.safetensors")
    assert counted == {
        "weights in 8 bits": 800,
        "weights in 32 bits": 20,
        "bytes beyond two moments and a scale for 256": 0,
    }
    # A second moment in 32 bits beside a first one in 8 shows in the bytes.
    save_file(tensors | {"matrix|state2": np.zeros((40, 20), np.float32)}, tmp_path / "o.safetensors")
    spoilt = optimizer.count_moments(tmp_path / "o.safetensors")
    assert spoilt["bytes beyond two moments and a scale for 256"] == 3 * 800
