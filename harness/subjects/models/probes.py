"""Measurements on many model files in one child process, through the trainer's own loading functions."""

import contextlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from q4kd.harness.inputs.arrays import Array, Arrays, read_arrays, save_arrays
from q4kd.harness.runs.probes import probe
from q4kd.trainer.files import write_json


@probe("model-logits")
def model_logits(
    ids: Path,
    out: Path,
    models: tuple[Path, ...],
    device: Literal["cpu", "cuda"] = "cpu",
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """Compute logits of several models: ``<stem>-<case>``, float32 ``[B, T, V]``, for each file and each case of ids.

    ``--ids`` holds ``<case>``, int ``[B, T]``, and ``<case>-starts`` where a sequence holds several documents.
    """
    import torch

    from q4kd.trainer.device.placement import place_teacher
    from q4kd.trainer.events import EventLog
    from q4kd.trainer.teacher.teacher import load_teacher

    given = {name: torch.from_numpy(array).long() for name, array in read_arrays(ids).items()}
    arrays: Arrays = {}
    for path in models:
        teacher = load_teacher(place_teacher(path, dtype=dtype, device=device), events=EventLog(None))
        for case in (name for name in given if not name.endswith("-starts")):
            hidden_MH = teacher.hidden(given[case], given.get(f"{case}-starts")).flatten(0, 1)
            arrays[f"{path.stem}-{case}"] = teacher.head_logits(hidden_MH).view(*given[case].shape, -1).cpu().numpy()
    save_arrays(out, arrays)


@probe("read-headers")
def read_headers(out: Path, models: tuple[Path, ...], shards: tuple[Path, ...], unsupported: Path) -> None:
    """Write ``rows`` and ``shards``: digests of every value and tensor of models as the trainer opens them.

    See ``headers.rows``. A model that is refused has one row of zeros. ``inspect.json`` gets what ``q4kd inspect`` says
    of an unsupported model, and its exit code.
    """
    import numpy as np

    from q4kd.harness.__main__ import main
    from q4kd.harness.subjects.models.headers import rows
    from q4kd.trainer.errors import InputError
    from q4kd.trainer.formats.open import open_model

    def plain(value: object) -> object:
        return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value

    def read(path: Path) -> Array:
        try:
            model = open_model(path)
        except InputError:
            return np.zeros((1, 32), np.uint8)
        metadata = {key: plain(value) for key, value in model.metadata.items()}
        return rows(metadata, ((t.name, t.type, t.shape, t.data.tobytes()) for t in model.tensors.values()))

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = main(["inspect", str(unsupported), "--json"])
    said = json.loads(printed.getvalue() or "{}")
    write_json(Path("inspect.json"), {"exit_code": code, "unsupported": said.get("unsupported", [])})
    save_arrays(out, {name: np.concatenate(list(map(read, of))) for name, of in (("rows", models), ("shards", shards))})


@probe("open-models")
def open_models(out: Path, cases: tuple[str, ...]) -> None:
    """Load files that must be refused, and the valid twin of each; record the type of error and its line.

    ``--cases`` is the name of a case, an invalid file and a valid one, repeated.
    """
    from q4kd.trainer.device.placement import place_teacher
    from q4kd.trainer.events import EventLog
    from q4kd.trainer.teacher.teacher import load_teacher

    def outcome(path: str) -> tuple[str | None, str | None]:
        try:
            load_teacher(place_teacher(Path(path)), events=EventLog(None), announce=lambda _line: None)
        except Exception as error:  # the type of whatever comes is the observation
            return type(error).__name__, str(error)[:300]
        return None, None

    records = []
    for case, invalid, valid in zip(cases[0::3], cases[1::3], cases[2::3], strict=True):
        error, message = outcome(invalid)
        said = (message or "").replace(str(Path(invalid).parent), "…")
        twin = {"twin": f"{case}, valid", "twin_error": outcome(valid)[0]}
        records.append({"case": case, "error": error, "message": said, **twin})
    write_json(out, {"cases": records})
