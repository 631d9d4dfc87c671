"""Measurements on the GPU that no user command offers: the time of a forward pass, and a large managed allocation."""

import argparse
import sys
import time
from pathlib import Path

import numpy as np

from q4kd.trainer.files import write_json

HEAD_TOKENS = 1024
_SPARE_BYTES = 4 << 30


def forward_times(arguments: list[str]) -> int:
    """Time whole passes of a teacher on the GPU, logits included; ids come as int ``[B, T]``."""
    parser = argparse.ArgumentParser()
    for option in ("--model", "--ids", "--out"):
        parser.add_argument(option, type=Path, required=True)
    parser.add_argument("--warm-up", type=int, required=True)
    parser.add_argument("--passes", type=int, required=True)
    args = parser.parse_args(arguments)

    import torch

    from q4kd.trainer.events import EventLog
    from q4kd.trainer.placement import place_teacher
    from q4kd.trainer.teacher import load_teacher

    events = EventLog(Path("events.jsonl"))
    events.start()
    teacher = load_teacher(place_teacher(args.model, device="cuda"), events=events)
    ids = torch.from_numpy(np.load(args.ids, allow_pickle=False)).long().cuda()
    times = []
    for number in range(args.warm_up + args.passes):
        torch.cuda.synchronize()
        start = time.monotonic()
        hidden_MH = teacher.hidden(ids).flatten(0, 1)
        for rows in torch.split(hidden_MH, HEAD_TOKENS):
            teacher.head_logits(rows)
        torch.cuda.synchronize()
        seconds = time.monotonic() - start
        events.emit("forward_done", tokens=ids.numel(), seconds=seconds)
        if number >= args.warm_up:
            times.append((start, seconds))
    found = np.array(times)
    with args.out.open("wb") as file:
        np.savez(file, start=found[:, 0], seconds=found[:, 1])
    events.emit("done", step=0)
    return 0


def unified_allocation(arguments: list[str]) -> int:
    """Allocate as the policy of this device says, write every page from the GPU and read some back.

    Refuses to begin when the host could not hold the bytes beside what it has.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("--bytes", type=int, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)

    from q4kd.trainer import device
    from q4kd.trainer.cuda.allocation import allocate_bytes

    facts = device.cuda_facts()
    device_class = device.classify(facts.capability, facts.integrated)
    policy = device.allocation_policy(device_class, device.allocation_override())
    device.check_allocation(policy, device_class)
    table: dict[str, object] = {"device class": device_class, "allocation": policy.allocation}
    if device.mem_available() < args.bytes + _SPARE_BYTES:
        print(f"q4kd: {device.mem_available():,} bytes are available, too few to try {args.bytes:,}", file=sys.stderr)
        return 1
    tensor = allocate_bytes(args.bytes, policy.allocation)
    tensor.fill_(171)
    samples = tensor[:: 1 << 20]
    table |= {"bytes": tensor.numel(), "samples read back wrong": int((samples != 171).sum())}
    write_json(args.out, {"tables": {"allocation": table}})
    return 0
