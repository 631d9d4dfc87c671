"""Measurements on many model files in one child process, through the trainer's own loading functions."""

from pathlib import Path

from q4kd.harness.inputs.arrays import Arrays, read_array, save_arrays
from q4kd.harness.runs.probes import probe
from q4kd.trainer.files import write_json


@probe("model-logits")
def model_logits(ids: Path, out: Path, models: tuple[Path, ...]) -> None:
    """Compute the logits of several models for the same ids: one array for each file, named by its stem."""
    import torch

    from q4kd.trainer.device.placement import place_teacher
    from q4kd.trainer.events import EventLog
    from q4kd.trainer.teacher.teacher import load_teacher

    ids_1T = torch.from_numpy(read_array(ids)).long().unsqueeze(0)
    arrays: Arrays = {}
    for path in models:
        teacher = load_teacher(place_teacher(path, dtype="float32"), events=EventLog(None))
        arrays[path.stem] = teacher.logits(ids_1T)[0].numpy()
    save_arrays(out, arrays)


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
