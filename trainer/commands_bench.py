"""The command ``q4kd bench``: speed against other engines, every arm timed in the same run."""

import argparse
from pathlib import Path

from q4kd.trainer.bounded_options import count
from q4kd.trainer.commands_bench_step import add_step
from q4kd.trainer.errors import InputError

_CPU_ENGINES = ("dense", "transformers", "llama.cpp")
_DTYPES = ("auto", "float32", "bfloat16")
_MAX_ROUNDS = 1000


def add_commands(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register ``bench`` and its sub-commands."""
    bench = subparsers.add_parser("bench", help="speed against other engines, in turn in one run")
    commands = bench.add_subparsers(dest="bench_command", required=True, metavar="WHAT")
    teacher = commands.add_parser("teacher", help="prefill with logits at every position")
    teacher.add_argument("--model", type=Path, metavar="FILE", help="GGUF (default: a synthetic one, 129 M weights)")
    teacher.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    teacher.add_argument("--tokens", default="1024", metavar="N,…", help="positions of a sequence, a comparison each")
    teacher.add_argument("--pairs", type=int, default=9, metavar="N", help="counted rounds")
    teacher.add_argument("--threads", type=int, default=2, metavar="N", help="of every CPU engine")
    teacher.add_argument("--dtype", choices=_DTYPES, default="auto", help="of the CPU engines that have a choice")
    teacher.add_argument("--against", default="dense,llama.cpp", metavar="ENGINE,…", help=", ".join(_CPU_ENGINES))
    teacher.add_argument("--out", type=Path, metavar="DIR", help="write bench.json there")
    teacher.set_defaults(run=_teacher)
    loss = commands.add_parser("loss", help="the fused loss against the four matrix products it cannot do without")
    loss.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    for option, what in (
        ("tokens", "positions"),
        ("vocab", "rows of the student's head"),
        ("hidden", "student's size"),
    ):
        loss.add_argument(f"--{option}", metavar="N", help=f"{what} (default: by device)")
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
    add_step(commands)
    kernels = commands.add_parser("kernels", help="bandwidth of the CUDA decoders, time of the small-batch products")
    kernels.set_defaults(run=_kernels)


def _kernels(_args: argparse.Namespace) -> int:
    from q4kd.trainer.device import cuda_facts

    print(cuda_facts().name)
    from q4kd.trainer.cuda.bench_kernels import decode_bandwidth, matvec_bandwidth, product_table, table

    print(table(decode_bandwidth()))
    print(product_table(matvec_bandwidth()))
    return 0


def _loss(args: argparse.Namespace) -> int:
    import dataclasses

    if args.device == "cuda":
        from q4kd.trainer.device import cuda_facts

        cuda_facts()
    from q4kd.trainer.bench.loss import compare_loss, table
    from q4kd.trainer.bench.loss_inputs import CPU_SHAPE, CUDA_SHAPE
    from q4kd.trainer.loss_config import KDLossConfig

    default = CUDA_SHAPE if args.device == "cuda" else CPU_SHAPE
    sizes = {
        name: count(f"--{name.replace('_', '-')}", getattr(args, name), 1 << 22)
        for name in ("tokens", "vocab", "hidden", "teacher_hidden")
        if getattr(args, name)
    }
    shape = dataclasses.replace(default, **sizes)
    if shape.teacher_hidden % 256:
        raise InputError("--teacher-hidden", expected="a multiple of 256", got=args.teacher_hidden, remedy="correct it")
    chunk = 0 if args.chunk == "0" else count("--chunk", args.chunk, 1 << 20)
    if not 1e-3 <= args.temperature <= 1e3:
        raise InputError("--temperature", expected="1e-3 to 1e3", got=str(args.temperature), remedy="correct it")
    config = KDLossConfig(chunk_tokens=chunk, divergence=args.divergence, temperature=args.temperature)
    found = compare_loss(shape, args.device, config, count("--pairs", str(args.pairs), _MAX_ROUNDS), print)
    lines = list(table(found))
    if args.device == "cuda" and shape.vocab % 8 == 0:
        from q4kd.trainer.bench.loss_kernels import kernel_rates, kernel_table

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
        raise InputError(
            f"--out {folder}", expected="a writable folder", got=str(error.strerror), remedy="choose another"
        ) from error


def _load(args: argparse.Namespace) -> int:
    from q4kd.trainer.device import cuda_facts

    cuda_facts()
    from q4kd.trainer.bench.load import run_load

    print("\n".join(run_load(args.out)))
    return 0


def _teacher(args: argparse.Namespace) -> int:
    if args.device == "cuda":
        from q4kd.trainer.device import cuda_facts

        cuda_facts()
        from q4kd.trainer.bench.cuda import main

        # That comparison makes a 7B-shaped model on the device and has engines and shapes of its own.
        out = args.out or Path("bench-cuda")
        return main(["--out", str(out), "--rounds", str(args.pairs), "--skip", "load"])
    lengths = [count("--tokens", text, 1 << 20) for text in args.tokens.split(",")]
    engines = [name for name in args.against.split(",") if name]
    for name in engines:
        if name not in _CPU_ENGINES:
            raise InputError("--against", expected=", ".join(_CPU_ENGINES), got=repr(name)[:40], remedy="name these")
    rounds = count("--pairs", str(args.pairs), _MAX_ROUNDS)
    threads = count("--threads", str(args.threads), 1024)

    from q4kd.trainer.bench.comparison import compare_on_cpu, table
    from q4kd.trainer.dtypes import choose_dtype

    dtype = choose_dtype(args.dtype, "cpu")
    print(f"dtype: {dtype.name} ({dtype.reason})")
    found = compare_on_cpu(
        args.model, engines, lengths, rounds=rounds, threads=threads, dtype=dtype.name, announce=print
    )
    if args.out:
        _write(args.out, "bench.json", found)
    print("\n".join(table(found)))
    return 0 if found["shapes"] else 1
