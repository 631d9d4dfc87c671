"""``q4kd cache``: a teacher's signals on disk, for ``q4kd distill --teacher-cache``."""

import argparse
import os
from pathlib import Path
from typing import Any

from q4kd.trainer.cli.arguments import add_run_arguments, read_run_arguments
from q4kd.trainer.config.settings import no_stream
from q4kd.trainer.errors import InputError, outside

DEFAULT_K = 32
_TABLE_KS = (8, 32, 128)


def add_commands(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register ``cache``, which takes the arguments of ``distill``; its ``--out`` is the cache's folder."""
    cache = subparsers.add_parser("cache", help="a teacher's top-k log-probabilities, to train without it")
    add_run_arguments(cache, omit=("out", "teacher_cache"))
    cache.add_argument("--out", type=Path, required=True, metavar="CACHE", help="folder of the cache")
    compared = "tokens on which KL is compared with online for k = 8, 32, 128 first; 0 skips it"
    for option, metavar, default, text in (
        ("--k", "K", DEFAULT_K, "tokens listed at each position"),
        ("--sample-tokens", "N", 4096, compared),
        ("--shard-mb", "N", 64, "size of a shard, which an interruption loses"),
    ):
        cache.add_argument(option, type=int, default=default, metavar=metavar, help=f"{text} (default {default})")
    cache.add_argument("--events", type=Path, help="append events as JSON lines to this file")
    cache.set_defaults(run=_cache)


def _check_arguments(args: argparse.Namespace, config: Any) -> None:
    for option, value, low, high in (
        ("--k", args.k, 1, 4096),
        ("--sample-tokens", args.sample_tokens, 0, 1 << 24),
        ("--shard-mb", args.shard_mb, 1, 1000),
    ):
        if not low <= value <= high:
            raise outside(option, value, low, high)
    if config.teacher is None:
        raise InputError("setting teacher", expected="a path", got="nothing", remedy="pass --teacher: it is run here")
    if config.streaming:
        raise no_stream()
    processes = int(os.environ.get("WORLD_SIZE", "1"))  # torchrun sets it.
    if processes > 1:
        remedy = "start it without torchrun; to share the work, cache parts of the data in folders of their own"
        raise InputError("q4kd cache", expected="one process", got=f"{processes}", remedy=remedy)


def _cache(args: argparse.Namespace) -> int:
    config = read_run_arguments(args)
    _check_arguments(args, config)

    from q4kd.trainer.make_cache import make_cache

    sizes = {"k": args.k, "sample_tokens": args.sample_tokens, "shard_bytes": args.shard_mb * 1_000_000}
    make_cache(config, **sizes, table_ks=_TABLE_KS, events_path=args.events)
    return 0
