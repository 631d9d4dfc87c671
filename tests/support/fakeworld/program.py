"""The program under test: it measures a number, says so and ends."""

import json
import time
from pathlib import Path


def measured():
    return 10


def ending():
    return 0


def main(args):
    with Path("events.jsonl").open("a") as events:
        events.write(json.dumps({"v": 1, "event": "done", "t": time.monotonic(), "args": args}) + "\n")
    if "pause" in args:
        time.sleep(0.8)
    if "hang" in args:
        time.sleep(60)
    Path("out.json").write_text(json.dumps({"value": measured()}))
    Path("checkpoint.bin").write_bytes(b"x" * 1000)
    print("measured", measured(), "in", Path.cwd())
    return ending()
