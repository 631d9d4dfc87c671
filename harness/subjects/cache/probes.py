"""A measurement of ``q4kd cache``: a writer that is killed within a shard, and what the next one makes of it."""

import importlib
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

from q4kd.harness.runs.probes import probe
from q4kd.trainer.files import read_json, write_json

# The shard, counted from 0, in whose middle the writer is killed.
KILLED_AT = 1


def _write_until_killed(words: tuple[str, ...]) -> None:
    """Run the command, and die with half of a shard in a temporary file."""
    from q4kd.harness.__main__ import main

    store: Any = importlib.import_module("q4kd.trainer.teacher.cache.store")
    whole = store.write_atomic

    def write(path: Path, data: bytes) -> None:
        if f"{KILLED_AT:06d}" in path.name:
            path.with_name(f".{path.name}.half.tmp").write_bytes(data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        whole(path, data)

    store.write_atomic = write
    raise SystemExit(main(list(words)))


@probe("cache-interrupted")
def cache_interrupted(*words: str, cache: Path, facts: Path) -> int:
    """Run ``q4kd WORDS``, which writes a cache, killed once in between; record what was there before it went on."""
    from q4kd.harness.__main__ import main

    process = multiprocessing.get_context("fork").Process(target=_write_until_killed, args=(words,))
    process.start()
    process.join()
    before = read_json(cache / "cache.json")["shards"]
    written = {name: (cache / name).stat().st_mtime_ns for name in before}
    half = len(list(cache.glob(".*.tmp")))
    code = main(list(words))
    writer = {
        "killed": process.exitcode == -signal.SIGKILL,
        "shards it left": len(before),
        "half files it left": half,
        "finished shards written again": sum((cache / name).stat().st_mtime_ns != at for name, at in written.items()),
    }
    write_json(facts, {"writer": writer})
    return code
