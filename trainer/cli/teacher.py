"""The commands that look at a teacher: ``q4kd inspect`` and ``q4kd logits``."""

import argparse
import dataclasses
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from q4kd.trainer.errors import InputError, for_terminal, unwritable

_SHOWN_PARTS, _NAMED_PARTS = 24, 6


def add_commands(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Register the commands; each sets ``run`` to a function from parsed arguments to an exit code."""
    inspect = subparsers.add_parser("inspect", help="a model file: architecture, types, sizes, backend")
    inspect.add_argument("model", type=Path, metavar="MODEL")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.add_argument("--backend", choices=("auto", "q4k", "dense"), help="override the choice")
    inspect.set_defaults(run=_inspect)

    logits = subparsers.add_parser("logits", help="logits of a teacher for given token ids")
    logits.add_argument("model", type=Path, metavar="MODEL")
    logits.add_argument("--ids", type=Path, required=True, help="integer .npy, [T] or [B,T]")
    logits.add_argument("--out", type=Path, required=True, help="float32 .npy to write, [T,V] or [B,T,V]")
    logits.add_argument("--device", default="cpu", help="cpu or cuda")
    logits.add_argument("--backend", choices=("auto", "q4k", "dense"))
    logits.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of matrix products")
    logits.add_argument("--events", type=Path, help="append events as JSON lines to this file")
    logits.set_defaults(run=_logits)


def _inspect(args: argparse.Namespace) -> int:
    from q4kd.trainer.device.placement import place_teacher
    from q4kd.trainer.formats.gguf.unsupported import unsupported_tokenizer

    try:
        placement = place_teacher(args.model, backend=args.backend)
    except InputError as error:
        raise _explain(args.model, error, as_json=args.json) from error
    model, choice = placement.model, placement.choice
    histogram: dict[str, dict[str, int]] = {}
    for tensor in model.tensors.values():
        entry = histogram.setdefault(tensor.type, {"tensors": 0, "weights": 0, "bytes": 0})
        entry["tensors"] += 1
        entry["weights"] += math.prod(tensor.shape)
        entry["bytes"] += tensor.num_bytes
    facts: dict[str, Any] = {
        "file": str(args.model),
        "file_bytes": model.file_bytes,
        "tensor_bytes": model.tensor_bytes,
        "weights": model.num_weights,
        "active_weights": model.weights_per_token,
        "config": dataclasses.asdict(model.config),
        "types": dict(sorted(histogram.items())),
        "backend": {"name": choice.backend, "reason": choice.reason},
    }
    # A teacher does without its tokenizer, `q4kd fidelity` does not.
    unread = list(unsupported_tokenizer(model.metadata)) if model.metadata.get("tokenizer.ggml.model") else []
    if unread:
        facts["unsupported"] = [vars(part) for part in unread]
    if args.json:
        print(json.dumps(facts, indent=1, sort_keys=True))
        return 0
    name = for_terminal(args.model)
    defaults = {field.name: field.default for field in dataclasses.fields(model.config)}
    always = {name for name, default in defaults.items() if default is dataclasses.MISSING}
    held = f"{model.file_bytes:,} bytes" + (f" of {len(model.files)} shards" if len(model.files) > 1 else "")
    print(f"{name}: {model.config.architecture}, {held} ({model.tensor_bytes:,} in tensors)")
    for key, value in facts["config"].items():
        if key in always or value != defaults[key]:
            print(f"  {key:<16} {_described(key, value)}")
    if model.config.num_experts:
        print(f"  {'weights':<16} {model.num_weights:,}, of which {model.weights_per_token:,} are active for a token")
    for name, entry in sorted(histogram.items(), key=lambda item: -item[1]["bytes"]):
        share = entry["bytes"] / max(1, model.tensor_bytes)
        sizes = f"{entry['tensors']:>4} tensors  {entry['weights']:>15,} weights  {entry['bytes']:>15,} bytes"
        print(f"  {name:<16} {sizes}  {share:>6.1%} {'#' * round(20 * share)}")
    print(f"  {'backend':<16} {choice.backend}: {choice.reason}")
    for part in unread:
        print(for_terminal(f"  {part.part:<16} {part.found} is not read by q4kd fidelity; supported: {part.supported}"))
    return 0


def _explain(path: Path, error: InputError, *, as_json: bool) -> InputError:
    """Print every part of a model that is not supported; return the refusal that names them all, or ``error``."""
    from q4kd.trainer.formats.open import explain_refusal

    parts = explain_refusal(path)
    if as_json and parts:
        print(json.dumps({"file": str(path), "unsupported": [vars(part) for part in parts]}, indent=1, sort_keys=True))
    elif parts:
        print(f"{for_terminal(path)}: not supported as a teacher")
        for part in parts[:_SHOWN_PARTS]:
            print(for_terminal(f"  {part.part:<16} {part.found}; supported: {part.supported}"))
        if len(parts) > _SHOWN_PARTS:
            print(f"  and {len(parts) - _SHOWN_PARTS} more; --json lists all")
    named = [f"{part.part} {part.found}" for part in parts if part.is_refused]
    if len(named) < 2:
        return error
    if len(named) > _NAMED_PARTS:
        named[_NAMED_PARTS:] = [f"{len(named) - _NAMED_PARTS} more"]
    remedy = "name a file in which none of these is left; --json lists what would be supported"
    return InputError(str(path), expected="a supported model", got=" and ".join(named), remedy=remedy)


def _described(key: str, value: Any) -> str:
    """Return a value of the config in a few words: layers counted, settings that belong together side by side."""
    if key == "windows":
        counts = Counter(value)
        return ", ".join(
            f"{window or 'none'} in {count} layers" for window, count in sorted(counts.items(), reverse=True)
        )
    if key == "layers":
        return f"{sum(value)} of {len(value)}"
    if isinstance(value, dict):
        return " ".join(f"{name}={_described(name, part)}" for name, part in value.items())
    # Files hold float32, which has seven digits: 1e-06 would otherwise be 9.999999974752427e-07.
    return f"{value:.7g}" if isinstance(value, float) else str(value)


def _logits(args: argparse.Namespace) -> int:
    import time

    import numpy as np
    import torch

    from q4kd.trainer.device.memory_report import sized
    from q4kd.trainer.device.placement import place_teacher
    from q4kd.trainer.events import EventLog
    from q4kd.trainer.export.fidelity_text import read_ids
    from q4kd.trainer.files import replacing
    from q4kd.trainer.teacher.cpu.footprint import predict_footprint
    from q4kd.trainer.teacher.teacher import load_teacher

    ids = read_ids(args.ids)
    if ids.ndim not in (1, 2) or ids.size == 0:
        expected, remedy = "integers [T] or [B,T], not empty", "reshape the array"
        raise InputError(str(args.ids), expected=expected, got=f"{ids.dtype} {ids.shape}", remedy=remedy)
    events = EventLog(args.events)
    events.start()
    events.emit("imports_done")
    placement = place_teacher(
        args.model, backend=args.backend, device=args.device, dtype=args.dtype, positions=int(ids.size)
    )
    teacher = load_teacher(placement, events=events)
    shape = np.atleast_2d(ids).shape
    if args.device == "cpu":
        plan = predict_footprint(teacher.config, *shape, dtype=teacher.dtype)
        events.emit("footprint", **vars(plan))
        print(f"memory plan: activations {sized(plan.activations)}, scratch {sized(plan.scratch)}, file pages")
    started = time.monotonic()
    logits = teacher.logits(torch.from_numpy(np.atleast_2d(ids))).float().cpu().numpy()
    events.emit("forward_done", tokens=int(ids.size), seconds=time.monotonic() - started)
    try:
        with replacing(args.out) as file:
            np.lib.format.write_array(file, logits[0] if ids.ndim == 1 else logits, allow_pickle=False)
    except OSError as error:
        raise unwritable(f"--out {args.out}", error, "a writable path") from error
    said = f"{ids.size} positions x {logits.shape[-1]} in {time.monotonic() - started:.2f} s"
    print(f"logits: {said} -> {for_terminal(args.out)}")
    events.emit("done", step=0)
    return 0
