"""A measurement of exported students of several families: logits by transformers and by the teacher's own reader."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from q4kd.harness.inputs.arrays import Array, Arrays, read_array, save_arrays
from q4kd.harness.runs.probes import probe
from q4kd.trainer.files import write_json

if TYPE_CHECKING:
    from torch import Tensor


@probe("exported-families")
def exported_families(ids: Path, out: Path, facts: Path, /, *folders: str) -> None:
    """Fill each folder's model with random weights, export it by the command, and record logits by the folder's name.

    Saved are transformers' logits, float32 ``[T, V]``, and under ``NAME.teacher`` those of the GGUF.
    """
    import torch

    from q4kd.harness.__main__ import main
    from q4kd.trainer.device.placement import place_teacher
    from q4kd.trainer.events import EventLog
    from q4kd.trainer.student.model import load_tokenizer
    from q4kd.trainer.teacher.teacher import load_teacher

    ids_1T = torch.from_numpy(read_array(ids)).long().unsqueeze(0)
    arrays, codes = Arrays(), dict[str, int]()
    for folder in map(Path, folders):
        name = folder.name
        arrays[name] = _live_model(folder, Path(name), ids_1T)
        load_tokenizer(folder).save_pretrained(name)
        codes[name] = main(["export", name, "--format", "gguf", "--quantize", "f32", "--out", f"{name}.gguf"])
        if codes[name] == 0:
            teacher = load_teacher(place_teacher(Path(f"{name}.gguf"), dtype="float32"), events=EventLog(None))
            arrays[f"{name}.teacher"] = teacher.logits(ids_1T)[0].numpy()
    write_json(facts, {"exit_codes": codes})
    if not any(codes.values()):
        save_arrays(out, arrays)


def _live_model(folder: Path, out: Path, ids_1T: "Tensor") -> Array:
    """Save a folder's model with weights from a seed, norms of it moved away from one, and return its logits."""
    import torch

    from q4kd.trainer.student.model import load_student

    model: Any = load_student(folder, seed=3).eval()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        logits: Tensor = model(ids_1T).logits[0]
    model.save_pretrained(out)
    return logits.float().numpy()
