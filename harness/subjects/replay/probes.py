"""Several runs of ``q4kd distill``, one after another, each in a fork of one warmed-up process."""

import multiprocessing
from pathlib import Path

from q4kd.harness.runs.probes import probe
from q4kd.trainer.files import read_json, write_json


def _run(argv: list[str]) -> None:
    from q4kd.harness.__main__ import main

    raise SystemExit(main(argv))


@probe("distill-legs")
def distill_legs(cases: Path, out: Path) -> None:
    """Run the command lines of a JSON file ``{"legs": [[…], …]}`` in turn and record the exit code of each.

    Each is a process of its own, with the random states and settings of a process that has just started: forking saves
    nothing but its imports, and inherits a planted fault.
    """
    import accelerate  # noqa: F401
    from transformers import AutoModelForCausalLM  # noqa: F401
    from transformers.models.qwen2 import modeling_qwen2  # noqa: F401

    import q4kd.trainer.distill  # noqa: F401

    codes = []
    for argv in read_json(cases)["legs"]:
        # The forks come before torch has threads.
        leg = multiprocessing.get_context("fork").Process(target=_run, args=(argv,))
        leg.start()
        leg.join()
        codes.append(leg.exitcode)
    write_json(out, {"tables": {"legs": {"legs": len(codes), "of them ended with 0": codes.count(0)}}})
