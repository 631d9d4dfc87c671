"""Measurements on a CUDA device inside the child: decoders, a teacher held still, a teacher kept busy."""

import time
from pathlib import Path

import numpy as np

from q4kd.harness.inputs.arrays import Arrays, read_array, read_arrays, save_arrays
from q4kd.harness.runs.probes import probe

_APART_S = 1.0


@probe("cuda-decode")
def cuda_decode(rows: Path, out: Path) -> None:
    """Decode packed rows of every type on the device to float32; outputs are poisoned with NaN first."""
    import torch

    from q4kd.trainer.formats.blocks.layout import FORMATS
    from q4kd.trainer.kernels.teacher_kernels import Kernels

    kernels = Kernels("cuda")
    results: Arrays = {}
    for name, array in read_arrays(rows).items():
        packed = torch.from_numpy(array).cuda()
        form = FORMATS[name.upper()]
        cols = packed.shape[1] // form.block_bytes * form.block_size
        decoded = torch.full((len(packed), cols), torch.nan, device="cuda")
        kernels.decode(form.name, packed, 0, len(packed), cols, decoded)
        results[name] = decoded.cpu().numpy()
    save_arrays(out, results)


@probe("cuda-hold")
def cuda_hold(model: Path, ids: Path, seconds: float) -> int:
    """Load a teacher on the device, hold it still, and take one forward pass; the supervisor looks on."""
    import torch

    from q4kd.trainer.device.placement import place_teacher
    from q4kd.trainer.events import EventLog
    from q4kd.trainer.teacher.teacher import load_teacher

    events = EventLog(Path("events.jsonl"))
    events.start()
    events.emit("imports_done")
    teacher = load_teacher(place_teacher(model, device="cuda"), events=events)
    # Samples up to half a second outside a phase belong to it: keep the load and the pass further away than that.
    time.sleep(_APART_S)
    events.emit("hold_started")
    time.sleep(seconds)
    events.emit("held")
    time.sleep(_APART_S)
    ids_BT = torch.from_numpy(np.atleast_2d(read_array(ids))).long()
    logits = teacher.logits(ids_BT)
    finite = bool(torch.isfinite(logits).all())
    events.emit("forward_done", tokens=ids_BT.numel(), finite=finite)
    events.emit("done", step=0)
    return 0 if finite else 1


@probe("cuda-busy")
def cuda_busy(model: Path, seconds: float) -> None:
    """Take forward passes of a teacher on the device for some seconds, an event after each."""
    import torch

    from q4kd.trainer.device.placement import place_teacher
    from q4kd.trainer.events import EventLog
    from q4kd.trainer.teacher.teacher import load_teacher

    events = EventLog(Path("events.jsonl"))
    events.start()
    events.emit("imports_done")
    teacher = load_teacher(place_teacher(model, device="cuda"), events=events)
    ids = torch.randint(0, teacher.vocab_size, (32, 256), generator=torch.Generator().manual_seed(3))
    started = time.monotonic()
    while time.monotonic() - started < seconds:
        teacher.hidden(ids)
        torch.cuda.synchronize()
        events.emit("forward_done", tokens=ids.numel())
    events.emit("done", step=0)
