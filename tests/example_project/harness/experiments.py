"""One supervised run of the program, on numbers with duplicates; the harness sorts them itself."""

import json
import random
from pathlib import Path
from typing import Any

from q4kd.harness.runs.experiment import Arm, Experiment, Inputs, register


def _make(path: Path) -> None:
    draw = random.Random(7)
    path.write_text(json.dumps([draw.randrange(200) for _ in range(500)]))


def _argv(inputs: Inputs) -> list[str]:
    return ["module", "harness", str(inputs.file("numbers.json", _make)), "sorted.json"]


def _collect(run_dir: Path, inputs: Inputs) -> dict[str, Any]:
    written = run_dir / "sorted.json"
    given = json.loads(inputs.file("numbers.json", _make).read_text())
    return {"given": given, "sorted": json.loads(written.read_text()) if written.exists() else None}


register(Experiment("sort-numbers", "sorts 500 numbers", (), (Arm(None, _argv, 60.0),), collect=_collect))
