"""Measurements on a CUDA device inside the child: decoders, a teacher held still, a teacher kept busy."""

import argparse
import io
import time
from pathlib import Path
from typing import Any

import numpy as np

from q4kd.trainer.files import write_atomic

_APART_S = 1.0


def cuda_decode(arguments: list[str]) -> int:
    """Decode packed rows of every type on the device to float32; outputs are poisoned with NaN first."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)

    import torch

    from q4kd.trainer.cuda.kernels import Kernels
    from q4kd.trainer.formats import FORMATS

    kernels = Kernels("cuda")
    results: dict[str, Any] = {}
    with np.load(args.rows, allow_pickle=False) as arrays:
        for name in arrays.files:
            packed = torch.from_numpy(arrays[name]).cuda()
            form = FORMATS[name.upper()]
            cols = packed.shape[1] // form.block_bytes * form.block_size
            out = torch.full((len(packed), cols), torch.nan, device="cuda")
            kernels.decode(form.name, packed, 0, len(packed), cols, out)
            results[name] = out.cpu().numpy()
    buffer = io.BytesIO()
    np.savez(buffer, **results)
    write_atomic(args.out, buffer.getvalue())
    return 0


def cuda_hold(arguments: list[str]) -> int:
    """Load a teacher on the device, hold it still, and take one forward pass; the supervisor looks on."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--ids", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    args = parser.parse_args(arguments)

    import torch

    from q4kd.trainer.events import EventLog
    from q4kd.trainer.placement import place_teacher
    from q4kd.trainer.teacher import load_teacher

    events = EventLog(Path("events.jsonl"))
    events.start()
    events.emit("imports_done")
    teacher = load_teacher(place_teacher(args.model, device="cuda"), events=events)
    # Samples up to half a second outside a phase belong to it: keep the load and the pass further away than that.
    time.sleep(_APART_S)
    events.emit("hold_started")
    time.sleep(args.seconds)
    events.emit("held")
    time.sleep(_APART_S)
    ids = torch.from_numpy(np.atleast_2d(np.load(args.ids, allow_pickle=False))).long()
    logits = teacher.logits(ids)
    finite = bool(torch.isfinite(logits).all())
    events.emit("forward_done", tokens=ids.numel(), finite=finite)
    events.emit("done", step=0)
    return 0 if finite else 1


def cuda_busy(arguments: list[str]) -> int:
    """Take forward passes of a teacher on the device for some seconds, an event after each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    args = parser.parse_args(arguments)

    import torch

    from q4kd.trainer.events import EventLog
    from q4kd.trainer.placement import place_teacher
    from q4kd.trainer.teacher import load_teacher

    events = EventLog(Path("events.jsonl"))
    events.start()
    events.emit("imports_done")
    teacher = load_teacher(place_teacher(args.model, device="cuda"), events=events)
    ids = torch.randint(0, teacher.vocab_size, (32, 256), generator=torch.Generator().manual_seed(3))
    started = time.monotonic()
    while time.monotonic() - started < args.seconds:
        teacher.hidden(ids)
        torch.cuda.synchronize()
        events.emit("forward_done", tokens=ids.numel())
    events.emit("done", step=0)
    return 0
