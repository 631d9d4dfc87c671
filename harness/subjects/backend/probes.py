"""The trainer's decision tables, filled in by the trainer's own functions over every input."""

import itertools
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from q4kd.harness.runs.probes import probe
from q4kd.trainer.files import write_json

if TYPE_CHECKING:
    from q4kd.trainer.device.devices import DeviceClass

_TYPES = {"quantised": ("F32", "Q4_K", "Q6_K"), "plain": ("F32", "F16")}
_CLASSES: "tuple[DeviceClass, ...]" = ("cpu", "classic", "unified")
_KNOWN = {
    "GB10 12.1": ((12, 1), True),
    "GB10 12.1, attribute unknown": ((12, 1), None),
    "RTX 4090 8.9": ((8, 9), False),
    "H100 9.0": ((9, 0), False),
    "H200 9.0, attribute unknown": ((9, 0), None),
    "RTX 5090 12.0": ((12, 0), False),
    "Jetson Orin 8.7, attribute unknown": ((8, 7), None),
    "A100 8.0": ((8, 0), False),
    "an unknown integrated 19.9": ((19, 9), True),
}
_REFUSED_OVERRIDES = ("2", "yes", "-1", " 1", "true", "on", "00", "01", "managed")


@probe("decision-tables")
def decision_tables(out: Path) -> None:
    """Write the tables of backends, device classes and allocations."""
    from q4kd.trainer.device.backend import OVERRIDES, backend_override, choose_backend
    from q4kd.trainer.device.devices import allocation_policy, classify

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
    every = list(itertools.product((divmod(number, 10) for number in range(201)), (True, False, None)))
    classes = Counter((integrated, classify(capability, integrated)) for capability, integrated in every)
    sources: Counter[str] = Counter()
    for (capability, integrated), override in itertools.product(every, (None, "", "0", "1")):
        place = classify(capability, integrated)
        found = allocation_policy(place, override).allocation
        by_class = "managed" if place == "unified" else "device"
        wanted = {"0": "device", "1": "managed"}.get(override or "", by_class)
        kind = "override" if override else "class"
        sources[f"decided by the {kind}" if found == wanted else f"against the {kind}"] += 1
    tables = {
        "backend": backends,
        "precedence": precedence,
        "allocation": allocation,
        "allocation_values": {value: _answer(value) for value in _REFUSED_OVERRIDES},
        "allocation_sources": {"against the override": 0, "against the class": 0, **sources},
        "device_class": {name: classify(*facts) for name, facts in _KNOWN.items()},
        "device_classes": {
            f"attribute {integrated}: {answer}": count for (integrated, answer), count in classes.items()
        },
    }
    write_json(out, {"tables": tables})


def _answer(override: str) -> str:
    """Return the allocation that an override gives on a classic device, or that it is refused."""
    from q4kd.trainer.device.devices import allocation_policy
    from q4kd.trainer.errors import InputError

    try:
        return allocation_policy("classic", override).allocation
    except InputError:
        return "refused"
