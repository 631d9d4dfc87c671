"""Measurements on the GPU that no user command offers: the time of a forward pass, and a large managed allocation."""

import sys
import time
from pathlib import Path

import numpy as np

from q4kd.harness.inputs.arrays import read_array, save_arrays
from q4kd.harness.runs.probes import probe
from q4kd.trainer.files import write_json

HEAD_TOKENS = 1024
_SPARE_BYTES = 4 << 30


@probe("forward-times")
def forward_times(model: Path, ids: Path, out: Path, warm_up: int, passes: int) -> None:
    """Time whole passes of a teacher on the GPU, logits included; ids come as int ``[B, T]``."""
    import torch

    from q4kd.trainer.device.placement import place_teacher
    from q4kd.trainer.events import EventLog
    from q4kd.trainer.teacher.teacher import load_teacher

    events = EventLog(Path("events.jsonl"))
    events.start()
    teacher = load_teacher(place_teacher(model, device="cuda"), events=events)
    ids_BT = torch.from_numpy(read_array(ids)).long().cuda()
    times = []
    for number in range(warm_up + passes):
        torch.cuda.synchronize()
        start = time.monotonic()
        hidden_MH = teacher.hidden(ids_BT).flatten(0, 1)
        for rows in torch.split(hidden_MH, HEAD_TOKENS):
            teacher.head_logits(rows)
        torch.cuda.synchronize()
        seconds = time.monotonic() - start
        events.emit("forward_done", tokens=ids_BT.numel(), seconds=seconds)
        if number >= warm_up:
            times.append((start, seconds))
    found = np.array(times)
    save_arrays(out, {"start": found[:, 0], "seconds": found[:, 1]})
    events.emit("done", step=0)


@probe("unified-allocation")
def unified_allocation(bytes: int, out: Path) -> int:  # noqa: A002 - the name of the option
    """Allocate as the policy of this device says, write every page from the GPU and read some back.

    It refuses to begin, with exit code 1, when the host could not hold the bytes beside what it has.
    """
    from q4kd.trainer.device import devices as device
    from q4kd.trainer.device.allocation import allocate_bytes

    facts = device.cuda_facts()
    device_class = device.classify(facts.capability, facts.integrated)
    policy = device.allocation_policy(device_class, device.allocation_override())
    device.check_allocation(policy, device_class)
    table: dict[str, object] = {"device class": device_class, "allocation": policy.allocation}
    if device.mem_available() < bytes + _SPARE_BYTES:
        print(f"q4kd: {device.mem_available():,} bytes are available, too few to try {bytes:,}", file=sys.stderr)
        return 1
    tensor = allocate_bytes(bytes, policy.allocation)
    tensor.fill_(171)
    samples = tensor[:: 1 << 20]
    table |= {"bytes": tensor.numel(), "samples read back wrong": int((samples != 171).sum())}
    write_json(out, {"tables": {"allocation": table}})
    return 0
