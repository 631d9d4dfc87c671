"""The plan of a student counts the head that will be loaded, whatever its config says of it."""

import json
import shutil
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from safetensors.torch import save_file  # noqa: E402

from q4kd.trainer.demo import student_path  # noqa: E402
from q4kd.trainer.student.model import load_student  # noqa: E402
from q4kd.trainer.student.shape import shape_student  # noqa: E402

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    """The demo student's, whose config ties the head, drawn from a seed; the head is stored beside the embedding."""
    model = load_student(student_path(), 0)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def _save(folder: Path, state: dict[str, torch.Tensor], *, is_sharded: bool) -> Path:
    shutil.copytree(student_path(), folder)
    if not is_sharded:
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    places = {name: f"model-0000{1 + (name == HEAD)}-of-00002.safetensors" for name in state}
    for file in set(places.values()):
        part = {name: tensor for name, tensor in state.items() if places[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


@pytest.mark.parametrize("is_sharded", [False, True])
@pytest.mark.parametrize(
    ("case", "dtype", "is_tied"),
    [
        ("equal", torch.float32, True),
        ("absent", torch.float32, True),
        ("last row differs", torch.float32, False),
        ("within rounding", torch.float32, False),
        ("within rounding", torch.bfloat16, True),
    ],
)
def test_what_is_planned_is_what_is_loaded(
    tmp_path: Path, weights: dict[str, torch.Tensor], case: str, dtype: torch.dtype, is_tied: bool, is_sharded: bool
) -> None:
    if case == "absent":
        del weights[HEAD]
    elif case == "last row differs":
        weights[HEAD][-1, -1] += 1
    elif case == "within rounding":
        weights[EMBEDDING] = weights[EMBEDDING].bfloat16().float()
        weights[HEAD] = weights[EMBEDDING] * (1 + 2**-12)
    folder = _save(tmp_path / "student", weights, is_sharded=is_sharded)
    shape, loaded = shape_student(folder, 1, 8, dtype), load_student(folder, 0, dtype)
    assert shape.parameters == sum(parameter.numel() for parameter in loaded.parameters())
    head, embedding = loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight
    assert shape.is_tied == (head is embedding) == is_tied


def test_a_folder_without_weights_is_as_its_config_says() -> None:
    assert shape_student(student_path(), 1, 8, torch.float32).is_tied
