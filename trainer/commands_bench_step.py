"""The command ``q4kd bench step``."""

import argparse
from pathlib import Path

from q4kd.trainer.bounded_options import count
from q4kd.trainer.errors import InputError

PEERS = ("trl-bf16", "trl-nf4")
_MAX_ROUNDS = 1000


def add_step(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register ``step`` among the sub-commands of ``bench``."""
    step = commands.add_parser("step", help="an optimiser step beside its parts, and beside TRL's GKD trainer")
    step.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    step.add_argument("--shape", default=None, metavar="BxT", help="sequences and positions (default 32x256, CPU 4x64)")
    step.add_argument("--rounds", type=int, default=9, metavar="N", help="counted rounds")
    step.add_argument(
        "--against", default="", metavar="PEER,…", help="trl-bf16, trl-nf4 (CUDA; each must be installed)"
    )
    step.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of q4kd distill")
    step.add_argument("--layers", type=int, default=28, metavar="N", help="of the 7B-shaped teacher")
    step.add_argument("--out", type=Path, default=Path("bench-step"), metavar="DIR", help="write step.json there")
    step.set_defaults(run=_step)


def _step(args: argparse.Namespace) -> int:
    from q4kd.trainer.config_file import parse_assignment

    if args.device == "cuda":
        from q4kd.trainer.device import cuda_facts

        cuda_facts()
    batch, cross, length = (args.shape or ("32x256" if args.device == "cuda" else "4x64")).partition("x")
    if not cross:
        raise InputError("--shape", expected="BxT, such as 32x256", got=repr(args.shape)[:40], remedy="correct it")
    peers = [name for name in args.against.split(",") if name]
    for name in peers:
        if name not in PEERS or args.device != "cuda":
            raise InputError(
                "--against",
                expected="trl-bf16 or trl-nf4, with --device cuda",
                got=f"{name!r} on {args.device}"[:60],
                remedy="name these",
            )
    from q4kd.trainer.bench.interleave import Shape
    from q4kd.trainer.bench.step import run_step

    lines = run_step(
        out=args.out,
        device=args.device,
        shape=Shape(count("--shape", batch, 1 << 16), count("--shape", length, 1 << 20)),
        rounds=count("--rounds", str(args.rounds), _MAX_ROUNDS),
        against=peers,
        settings=dict(parse_assignment(text) for text in args.set),
        layers=count("--layers", str(args.layers), 28),
    )
    print("\n".join(["", *lines]))
    return 0
