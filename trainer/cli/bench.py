"""The command ``q4kd bench``: speed against other engines, every arm timed in the same run."""

import argparse
import os
from pathlib import Path

from q4kd.trainer.cli.arguments import count
from q4kd.trainer.errors import InputError, outside, unknown_name, unwritable

_CPU_ENGINES = ("dense", "transformers", "llama.cpp")
_PEERS = ("trl-bf16", "trl-nf4")
_MIXTURES = ("qwen3-30b-a3b", "qwen3.6-35b-a3b", "gpt-oss-20b")
_SHAPES = ("qwen2.5-7b", *_MIXTURES)
_DTYPES = ("auto", "float32", "bfloat16")
_MAX_ROUNDS = 1000


def add_commands(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register ``bench`` and its sub-commands."""
    bench = subparsers.add_parser("bench", help="speed against other engines, in turn in one run")
    commands = bench.add_subparsers(dest="bench_command", required=True, metavar="WHAT")
    teacher = commands.add_parser("teacher", help="prefill with logits at every position")
    teacher.add_argument("--model", type=Path, metavar="FILE", help="GGUF (default: a synthetic one, 129 M weights)")
    teacher.add_argument("--type", metavar="NAME", help="GGML type of the synthetic one's layers (CPU)")
    teacher.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    teacher.add_argument("--tokens", default="1024", metavar="N,…", help="positions of a sequence, a comparison each")
    teacher.add_argument("--pairs", type=int, default=9, metavar="N", help="counted rounds")
    teacher.add_argument("--threads", type=int, default=2, metavar="N", help="of every CPU engine")
    teacher.add_argument("--dtype", choices=_DTYPES, default="auto", help="of the CPU engines that have a choice")
    teacher.add_argument("--clock", choices=("wall", "processor"), default="wall", help="seconds of the CPU engines")
    teacher.add_argument("--against", default="dense,llama.cpp", metavar="ENGINE,…", help=", ".join(_CPU_ENGINES))
    teacher.add_argument(
        "--shape", choices=_SHAPES, default=_SHAPES[0], help="of the synthetic model, with --device cuda"
    )
    teacher.add_argument("--out", type=Path, metavar="DIR", help="write bench.json there")
    teacher.set_defaults(run=_teacher)
    dtypes = commands.add_parser("dtypes", help="the packed teacher in float32 and in bfloat16 on this CPU, by size")
    dtypes.add_argument("--model", type=Path, metavar="FILE", help="GGUF (default: a synthetic one, 390 M weights)")
    dtypes.add_argument("--positions", default="1,8,32,90,256,1024", metavar="N,…", help="of a pass, a comparison each")
    dtypes.add_argument("--rounds", type=int, default=3, metavar="N", help="counted rounds")
    dtypes.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="of torch")
    dtypes.add_argument("--out", type=Path, metavar="DIR", help="write dtypes.json there")
    dtypes.set_defaults(run=_dtypes)
    loss = commands.add_parser("loss", help="the fused loss against the four matrix products it cannot do without")
    loss.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    loss.add_argument("--tokens", metavar="N", help="positions (default: by device)")
    loss.add_argument("--vocab", metavar="N", help="rows of the student's head (default: by device)")
    loss.add_argument("--hidden", metavar="N", help="student's size (default: by device)")
    loss.add_argument("--teacher-hidden", metavar="N", help="teacher's size, a multiple of 256 (default: by device)")
    loss.add_argument("--chunk", default="0", metavar="N", help="tokens of a chunk of fast; 0 chooses")
    loss.add_argument("--divergence", choices=("forward_kl", "reverse_kl", "jsd"), default="forward_kl")
    loss.add_argument("--temperature", type=float, default=1.0, metavar="T")
    loss.add_argument("--pairs", type=int, default=15, metavar="N", help="counted rounds")
    loss.add_argument("--out", type=Path, metavar="DIR", help="write loss.json there")
    loss.set_defaults(run=_loss)
    load = commands.add_parser("load", help="seconds and device memory of loading a 7B-shaped file")
    load.add_argument("--out", type=Path, default=Path("bench-load"), metavar="DIR", help="write load.json there")
    load.set_defaults(run=_load)
    step = commands.add_parser("step", help="an optimiser step beside its parts, and beside TRL's GKD trainer")
    step.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    step.add_argument("--shape", default=None, metavar="BxT", help="sequences and positions (default 32x256, CPU 4x64)")
    step.add_argument("--rounds", type=int, default=9, metavar="N", help="counted rounds")
    peers = "trl-bf16, trl-nf4 (CUDA; each must be installed)"
    step.add_argument("--against", default="", metavar="PEER,…", help=peers)
    step.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of q4kd distill")
    step.add_argument("--layers", type=int, default=28, metavar="N", help="of the 7B-shaped teacher")
    step.add_argument("--out", type=Path, default=Path("bench-step"), metavar="DIR", help="write step.json there")
    step.set_defaults(run=_step)
    kernels = commands.add_parser("kernels", help="bandwidth of the CUDA decoders, time of the small-batch products")
    kernels.set_defaults(run=_kernels)


def _check_cuda() -> str:
    """Return the CUDA device's name, or refuse a machine without one before anything larger is imported."""
    from q4kd.trainer.device.devices import cuda_facts

    return cuda_facts().name


def _kernels(_args: argparse.Namespace) -> int:
    print(_check_cuda())
    from q4kd.trainer.bench.kernels import decode_table, launch_table, product_table

    for table in (decode_table, product_table, launch_table):
        print(table())
    return 0


def _loss(args: argparse.Namespace) -> int:
    import dataclasses

    if args.device == "cuda":
        _check_cuda()
    from q4kd.trainer.bench.loss.comparison import compare_loss, table
    from q4kd.trainer.bench.loss.inputs import CPU_SHAPE, CUDA_SHAPE
    from q4kd.trainer.loss.config import KDLossConfig

    default = CUDA_SHAPE if args.device == "cuda" else CPU_SHAPE
    sizes = {
        name: count(f"--{name.replace('_', '-')}", getattr(args, name), 1 << 22)
        for name in ("tokens", "vocab", "hidden", "teacher_hidden")
        if getattr(args, name)
    }
    shape = dataclasses.replace(default, **sizes)
    if shape.teacher_hidden % 256:
        expected, got = "a multiple of 256", args.teacher_hidden
        raise InputError("--teacher-hidden", expected=expected, got=got, remedy="round it up")
    chunk = 0 if args.chunk == "0" else count("--chunk", args.chunk, 1 << 20)
    if not 1e-3 <= args.temperature <= 1e3:
        raise outside("--temperature", args.temperature, 1e-3, 1e3)
    config = KDLossConfig(chunk_tokens=chunk, divergence=args.divergence, temperature=args.temperature)
    found = compare_loss(shape, args.device, config, count("--pairs", str(args.pairs), _MAX_ROUNDS), print)
    lines = list(table(found))
    if args.device == "cuda" and shape.vocab % 8 == 0:
        from q4kd.trainer.bench.loss.kernels import kernel_rates, kernel_table

        found["kernels"] = kernel_rates(shape.vocab, args.temperature)
        lines += ["", *kernel_table(found["kernels"])]
    if args.out:
        _write(args.out, "loss.json", found)
    print("\n".join(lines))
    return 0


def _write(folder: Path, name: str, found: object) -> None:
    from q4kd.trainer.files import write_json

    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / name, found)
    except OSError as error:
        raise unwritable(f"--out {folder}", error) from error


def _load(args: argparse.Namespace) -> int:
    _check_cuda()
    from q4kd.trainer.bench.load import run_load

    print("\n".join(run_load(args.out)))
    return 0


def _teacher(args: argparse.Namespace) -> int:
    if args.shape != _SHAPES[0] and args.device != "cuda":
        remedy = "add --device cuda, or leave --shape out"
        raise InputError(f"--shape {args.shape}", expected="--device cuda", got=args.device, remedy=remedy)
    if args.shape in _MIXTURES:
        _check_cuda()
        from q4kd.trainer.bench.teacher.mixture import main as compare_mixture

        words = ["--model", args.shape, "--out", str(args.out or Path("bench-cuda"))]
        return compare_mixture([*words, "--rounds", str(args.pairs)])
    if args.device == "cuda":
        _check_cuda()
        from q4kd.trainer.bench.teacher.cuda import main

        # That comparison makes a 7B-shaped model on the device and has engines and shapes of its own.
        out = args.out or Path("bench-cuda")
        return main(["--out", str(out), "--rounds", str(args.pairs), "--skip", "load"])
    lengths = [count("--tokens", text, 1 << 20) for text in args.tokens.split(",")]
    engines = [name for name in args.against.split(",") if name]
    for name in engines:
        if name not in _CPU_ENGINES:
            raise unknown_name(f"--against {name[:40]}", name, _CPU_ENGINES, "engine")
    rounds = count("--pairs", str(args.pairs), _MAX_ROUNDS)
    threads = count("--threads", str(args.threads), 1024)

    from q4kd.trainer.bench.synthetic import LAYER_TYPES
    from q4kd.trainer.bench.teacher.comparison import compare_on_cpu, table
    from q4kd.trainer.device.dtypes import choose_dtype

    if args.type is not None and args.type not in LAYER_TYPES:
        raise unknown_name(f"--type {args.type[:40]}", args.type, LAYER_TYPES, "type")
    if args.type is not None and args.model is not None:
        expected, remedy = "a synthetic model, whose layers have it", "leave out --model, or --type"
        raise InputError("--type", expected=expected, got="--model too", remedy=remedy)
    dtype = choose_dtype(args.dtype, "cpu", min(lengths))
    print(f"dtype: {dtype.name} ({dtype.reason})")
    found = compare_on_cpu(
        args.model,
        engines,
        lengths,
        rounds=rounds,
        threads=threads,
        dtype=dtype.name,
        announce=print,
        layer_type=args.type,
        clock=args.clock,
    )
    if args.out:
        _write(args.out, "bench.json", found)
    print("\n".join(table(found)))
    return 0 if found["shapes"] else 1


def _dtypes(args: argparse.Namespace) -> int:
    lengths = [count("--positions", text, 1 << 15) for text in args.positions.split(",")]
    rounds = count("--rounds", str(args.rounds), _MAX_ROUNDS)
    threads = count("--threads", str(args.threads), 1024)
    from q4kd.trainer.bench.teacher.dtypes import compare_dtypes, table

    found = compare_dtypes(args.model, lengths, rounds=rounds, threads=threads, announce=print)
    if args.out:
        _write(args.out, "dtypes.json", found)
    print("\n".join(table(found)))
    return 0


def _step(args: argparse.Namespace) -> int:
    from q4kd.trainer.config.run_file import parse_assignment

    if args.device == "cuda":
        _check_cuda()
    batch, cross, length = (args.shape or ("32x256" if args.device == "cuda" else "4x64")).partition("x")
    if not cross:
        got, remedy = repr(args.shape)[:40], "write sequences, an x, and the positions of each"
        raise InputError("--shape", expected="BxT, such as 32x256", got=got, remedy=remedy)
    peers = [name for name in args.against.split(",") if name]
    for name in peers:
        if name not in _PEERS or args.device != "cuda":
            expected, got = "trl-bf16 or trl-nf4, with --device cuda", f"{name!r} on {args.device}"[:60]
            raise InputError("--against", expected=expected, got=got, remedy="leave it out, or name these on a GPU")
    from q4kd.trainer.bench.interleave import Shape
    from q4kd.trainer.bench.step.comparison import run_step

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
