"""A measurement of which students are refused before anything is loaded."""

import json
from pathlib import Path
from typing import Any

from q4kd.harness.records.json_types import JsonObject
from q4kd.harness.runs.probes import probe
from q4kd.trainer.errors import InputError
from q4kd.trainer.files import read_json, write_json


@probe("plan-students")
def plan_students(cases: Path, out: Path) -> None:
    """Find each student's shape as a run's plan does; record the subject of the line that refuses it, or none."""
    import torch

    from q4kd.trainer.student.shape import shape_student

    def plan(case: dict[str, Any], folder: Path) -> str | None:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(case["config"]), encoding="utf-8")
        try:
            shape_student(folder, 1, case["length"], torch.float32, is_masked=case["packed"])
        except InputError as error:
            return f"{type(error).__name__}: {str(error).partition(':')[0]}"
        return None

    records: list[JsonObject] = []
    for number, case in enumerate(read_json(cases)["cases"]):
        outcomes = plan(case, Path(f"{number}-refused")), plan(case["twin"], Path(f"{number}-accepted"))
        name = case["case"]
        records.append({"case": name, "error": outcomes[0], "twin": f"not {name}", "twin_error": outcomes[1]})
    write_json(out, {"cases": records})
