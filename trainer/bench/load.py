"""From a GGUF file in the page cache to a teacher that can run: seconds, and what the process then holds.

Every load happens in a process of its own, after the imports and the CUDA context; transformers' GGUF path, which makes
a dense model, gets a time limit. With ``--arm`` this module is that process: it prints one JSON object.

    python -m q4kd.trainer.bench.load --model FILE --arm q4k|transformers [--tokens 8192]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from q4kd.trainer.files import write_json
from q4kd.trainer.formats.architecture import TeacherConfig

ARMS = ("q4k", "transformers")
DEFAULT_LIMIT_S = 120.0
PASS_LENGTH = 256
HEAD_TOKENS = 256


def measure_load(
    config: TeacherConfig, out: Path, say: Callable[[str], None], *, repeats: int = 3, limit_s: float = DEFAULT_LIMIT_S
) -> list[str]:
    """Write a synthetic file of these dimensions, load it with every arm, write ``load.json`` and return table lines.

    This project loads it ``repeats`` times: the first may still find parts of the file outside the page cache.
    ``limit_s`` are the seconds that transformers' load may take.
    """
    import torch

    from q4kd.trainer.bench.synthetic_7b import make_tensors, write_gguf

    with tempfile.TemporaryDirectory(prefix="q4kd-bench-") as folder:
        model = Path(folder) / "model.gguf"
        started = time.monotonic()
        write_gguf(model, config, make_tensors(config, torch.device("cuda")))
        torch.cuda.empty_cache()
        found: dict[str, Any] = {"file_bytes": model.stat().st_size}
        say(f"wrote {found['file_bytes']:,} bytes in {time.monotonic() - started:.1f} s")
        found["q4k"] = [run_arm(model, "q4k", 60.0) for _ in range(repeats)]
        found["transformers"] = run_arm(model, "transformers", limit_s)
    write_json(out / "load.json", found)
    return load_table(found)


def run_load(out: Path) -> list[str]:
    """Measure loads of a synthetic Qwen2.5-7B on the current device; write ``load.json`` and return table lines."""
    from q4kd.trainer.bench.synthetic_7b import qwen2_5_7b

    out.mkdir(parents=True, exist_ok=True)
    return measure_load(qwen2_5_7b(), out, print)


def run_arm(model: Path, arm: str, limit_s: float) -> dict[str, Any]:
    """Load ``model`` in a fresh process and return its JSON, or ``{"failed": why}``."""
    command = [sys.executable, "-P", "-m", "q4kd.trainer.bench.load", "--model", str(model), "--arm", arm]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        return {"failed": f"not ready after {limit_s:.0f} s"}
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        return {"failed": f"exit {done.returncode}: {done.stderr.strip()[-500:]}"}
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def load_table(found: dict[str, Any]) -> list[str]:
    """Return the table's lines: a line per fact, medians over the loads."""
    lines = [f"load of a file of {found['file_bytes']:,} bytes, in the page cache, to a teacher that can run:"]
    lines += [f"  q4k           failed: {answer['failed']}" for answer in found["q4k"] if "failed" in answer]
    ready = [answer for answer in found["q4k"] if "failed" not in answer]
    if ready:
        lines += _packed_lines(ready)
    other = found["transformers"]
    if "failed" in other:
        lines.append(f"  transformers  failed: {other['failed']}")
    else:
        held = _megabytes(other["loaded_bytes"]["nvml_process"])
        lines.append(f"  transformers  {other['seconds']:.2f} s, then {held} by NVML")
    return lines


def _packed_lines(ready: Sequence[dict[str, Any]]) -> list[str]:
    seconds, last = [answer["seconds"] for answer in ready], ready[-1]
    stages = {
        "CUDA context alone": "context_bytes",
        "after load": "loaded_bytes",
        f"after {last['tokens']:,} tokens": "after_hidden_bytes",
        "after head logits": "after_head_bytes",
    }
    return [
        f"  q4k           {statistics.median(seconds):.2f} s (median of {', '.join(f'{one:.2f}' for one in seconds)})",
        f"    weights {_megabytes(last['resident_weight_bytes'])}, {last['resident_ratio']:.4f} of the file's tensors",
        f"    scratch {_megabytes(last['scratch_bytes'])}; the decoded head, while it is held, "
        f"{_megabytes(last['head_scratch_bytes'])}",
        *(
            f"    process {what:<20} {_megabytes(last[stage]['nvml_process']):>10} by NVML"
            for what, stage in stages.items()
        ),
        f"    torch's peak {_megabytes(last['torch_peak_in_hidden'])} in the pass, "
        f"{_megabytes(last['torch_peak_in_head'])} in the head",
    ]


def _megabytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 1e6:,.0f} MB"


def load_packed(model: Path, tokens: int) -> dict[str, Any]:
    """Load with this project, then run ``tokens`` positions; return seconds and the bytes held at each stage."""
    import torch

    from q4kd.trainer.formats.open import open_model
    from q4kd.trainer.teacher.cuda.load import load_forward

    start_cuda()
    context = held_bytes()
    started = time.monotonic()
    opened = open_model(model)
    forward = load_forward(opened, "q4k")
    torch.cuda.synchronize()
    seconds = time.monotonic() - started
    loaded = held_bytes()
    ids = torch.randint(0, opened.config.vocab_size, (tokens // PASS_LENGTH, PASS_LENGTH), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    hidden = forward.hidden(ids)
    torch.cuda.synchronize()
    after_hidden, peak_hidden = held_bytes(), torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    logits = forward.head_logits(hidden.flatten(0, 1)[:HEAD_TOKENS])
    torch.cuda.synchronize()
    weights = sum(matrix.resident_bytes for matrix in forward.matrices.values()) + sum(forward.vector_bytes.values())
    head = logits.shape[1] * hidden.shape[-1] * 2
    return {
        "arm": "q4k",
        "seconds": seconds,
        "file_tensor_bytes": opened.tensor_bytes,
        "resident_weight_bytes": weights,
        "resident_ratio": weights / opened.tensor_bytes,
        "scratch_bytes": forward.scratch.num_bytes - head,
        "head_scratch_bytes": head,
        "context_bytes": context,
        "loaded_bytes": loaded,
        "tokens": tokens,
        "after_hidden_bytes": after_hidden,
        "torch_peak_in_hidden": peak_hidden,
        "torch_peak_in_head": torch.cuda.max_memory_allocated(),
        "after_head_bytes": held_bytes(),
        "logits_finite": bool(logits.isfinite().all()),
    }


def start_cuda() -> None:
    """Make this process's CUDA context, which is no part of a load."""
    import torch

    torch.zeros(1, device="cuda")
    torch.cuda.synchronize()


def held_bytes() -> dict[str, int | None]:
    """Return what this process holds on the device: by NVML, and by torch's allocator; and what the device has in use.

    A caching allocator gives nothing back by itself, so after a pass these are also the pass's peak.
    """
    import torch

    from q4kd.trainer.device.memory_report import nvml_process_bytes

    free, total = torch.cuda.mem_get_info()
    return {
        "nvml_process": nvml_process_bytes(os.getpid(), torch.cuda.current_device())[0],
        "device_in_use": total - free,
        "torch_reserved": torch.cuda.memory_reserved(),
        "torch_allocated": torch.cuda.memory_allocated(),
    }


def load_transformers(model: Path) -> dict[str, Any]:
    """Load with transformers' own GGUF path, onto the device in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM

    start_cuda()
    started = time.monotonic()
    loaded: Any = AutoModelForCausalLM.from_pretrained(model.parent, gguf_file=model.name, dtype=torch.bfloat16)
    loaded.to("cuda")
    torch.cuda.synchronize()
    seconds = time.monotonic() - started
    return {
        "arm": "transformers",
        "seconds": seconds,
        "dtypes": sorted({str(weight.dtype) for weight in loaded.parameters()}),
        "loaded_bytes": held_bytes(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Load once and print JSON."""
    parser = argparse.ArgumentParser(prog="python -m q4kd.trainer.bench.load", description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--arm", choices=ARMS, required=True)
    parser.add_argument("--tokens", type=int, default=8192)
    options = parser.parse_args(arguments)
    answer = load_packed(options.model, options.tokens) if options.arm == "q4k" else load_transformers(options.model)
    print(json.dumps(answer))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
