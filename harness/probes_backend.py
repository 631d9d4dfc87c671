"""The trainer's decision tables, filled in by the trainer's own functions over every input."""

import argparse
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

from q4kd.trainer.files import write_json

_TYPES = {"quantised": ("F32", "Q4_K", "Q6_K"), "plain": ("F32", "F16")}
_CLASSES: tuple[Any, ...] = ("cpu", "classic", "unified")
_KNOWN = {
    "GB10 12.1": ((12, 1), True),
    "GB10 12.1, attribute unknown": ((12, 1), None),
    "RTX 4090 8.9": ((8, 9), False),
    "H100 9.0": ((9, 0), False),
    "H200 9.0, attribute unknown": ((9, 0), None),
    "RTX 5090 12.0": ((12, 0), False),
    "an unknown integrated 19.9": ((19, 9), True),
}


def decision_tables(arguments: list[str]) -> int:
    """Write the backend, device-class, allocation and dtype tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(arguments)

    from q4kd.trainer.backend import OVERRIDES, backend_override, choose_backend
    from q4kd.trainer.device import allocation_policy, classify

    backends = {
        f"{override} / {kind} / {place} / {'fits' if fits else 'too large'}": choose_backend(
            override, types, place, dense_fits=fits
        ).backend
        for override, (kind, types), place, fits in itertools.product(
            OVERRIDES, _TYPES.items(), _CLASSES, (True, False)
        )
    }
    precedence = {
        f"option {option}, variable {variable}": backend_override(
            option, {"Q4KD_TEACHER_BACKEND": variable} if variable else {}
        )
        for option, variable in itertools.product((None, "q4k", "dense"), (None, "q4k", "dense"))
    }
    allocation = {
        f"{place} / {override or 'unset'}": allocation_policy(place, override).allocation
        for place, override in itertools.product(_CLASSES, (None, "0", "1"))
    }
    answers = Counter(
        classify(divmod(number, 10), integrated)
        for number, integrated in itertools.product(range(201), (True, False, None))
    )
    device_class: dict[str, object] = {name: classify(*facts) for name, facts in _KNOWN.items()}
    device_class["answers over 0.0 to 20.0, attribute true, false and unknown"] = sum(answers.values())
    device_class["answers that are neither class"] = sum(
        count for answer, count in answers.items() if answer not in ("classic", "unified")
    )
    tables = {
        "backend": backends,
        "precedence": precedence,
        "allocation": allocation,
        "device_class": device_class,
    }
    write_json(args.out, {"tables": tables})
    return 0
