"""A student's folder: weights that are found, weights that are not, and what other people's code makes of it."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from q4kd.harness.__main__ import main
from q4kd.trainer.demo import student_path, teacher_path
from q4kd.trainer.errors import InputError
from q4kd.trainer.student.folder import check_folder
from q4kd.trainer.student.loaded import check_finite
from q4kd.trainer.student.model import load_student, load_tokenizer

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def weighted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weighted") / "student"
    student: Any = load_student(student_path(), seed=1)
    student.save_pretrained(folder)
    load_tokenizer(student_path()).save_pretrained(folder)
    return folder


@pytest.fixture
def student(weighted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(weighted, tmp_path / "student"))


def rename(change: Callable[[str], str | None]) -> Callable[[Path], None]:
    """Return what renames a model's tensors, or drops those whose new name is None."""

    def apply(folder: Path) -> None:
        kept = {change(name): value for name, value in load_file(folder / WHOLE).items()}
        save_file({name: value for name, value in kept.items() if name}, folder / WHOLE, metadata={"format": "pt"})

    return apply


def shard(folder: Path, weight_map: object = None) -> None:
    """Cut a model into two shards; with ``weight_map`` in the place of the index's own."""
    tensors = sorted(load_file(folder / WHOLE).items())
    (folder / WHOLE).unlink()
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    parts = [dict(tensors[::2]), dict(tensors[1::2])]
    for name, part in zip(names, parts, strict=True):
        save_file(part, folder / name, metadata={"format": "pt"})
    found = {key: name for name, part in zip(names, parts, strict=True) for key in part}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": found if weight_map is None else weight_map}))


def change_config(**changes: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))

    return apply


def move(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / WHOLE).rename(folder / name)


def without_index(folder: Path) -> None:
    shard(folder)
    (folder / INDEX).unlink()


def without_shard(folder: Path) -> None:
    shard(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def outside(folder: Path) -> None:
    names = sorted(load_file(folder / WHOLE))
    shutil.copy(folder / WHOLE, folder.parent / "outside.safetensors")
    shard(folder, dict.fromkeys(names, "../outside.safetensors"))


def pipe(folder: Path) -> None:
    (folder / WHOLE).unlink()
    os.mkfifo(folder / WHOLE)


def dangling(folder: Path) -> None:
    (folder / WHOLE).unlink()
    (folder / WHOLE).symlink_to("blobs/none")


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    save_file({"a": torch.ones(1)}, folder / "adapter_model.safetensors")


def adapter_alone(folder: Path) -> None:
    adapter(folder)
    (folder / WHOLE).unlink()


def not_numbers(folder: Path) -> None:
    tensors = load_file(folder / WHOLE)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, folder / WHOLE, metadata={"format": "pt"})


def other_shape(folder: Path) -> None:
    tensors = load_file(folder / WHOLE)
    tensors["model.norm.weight"] = torch.ones(7)
    save_file(tensors, folder / WHOLE, metadata={"format": "pt"})


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "no weights": (lambda folder: (folder / WHOLE).unlink(), "got none; .*pass --from-scratch"),
    "compiled": (rename(lambda name: f"_orig_mod.{name}"), "begin with _orig_mod."),
    "parallel": (rename(lambda name: f"module.{name}"), "begin with module."),
    "a layer missing": (rename(lambda name: None if ".layers.1." in name else name), r"missing, model\.layers\.1\."),
    "renamed": (rename(lambda name: name.replace("q_proj", "query")), r"missing, .*q_proj.*unknown, .*query"),
    "no index": (without_index, "a shard without an index"),
    "no shard": (without_shard, "1 of 2 missing, model-00002-of-00002"),
    "variant": (move("model.fp16.safetensors"), "rename it to model.safetensors"),
    "pickled": (move("pytorch_model.bin"), "pytorch_model.bin, which is not safetensors"),
    "pickled too": (move("pytorch_model.pt"), "pytorch_model.pt, which is not safetensors"),
    "consolidated": (move("consolidated.00.pth"), "consolidated.00.pth"),
    "outside": (outside, r"got '\.\./outside\.safetensors'"),
    "no map": (lambda folder: shard(folder, {}), "got none"),
    "two sets": (lambda folder: (folder / INDEX).write_text("{}"), "one set of weights"),
    "adapter beside": (adapter, "a LoRA adapter beside its weights.*merge_and_unload"),
    "adapter alone": (adapter_alone, "a LoRA adapter without its base.*merge_and_unload"),
    "pipe": (pipe, "a pipe or a device"),
    "dangling": (dangling, "a link to nothing"),
    "NaN": (not_numbers, r"finite numbers, got NaN in model\.layers\.1\.mlp\.up_proj"),
    "another shape": (other_shape, "norm.weight|Mismatch|mismatch"),
    "bitsandbytes": (
        change_config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        "'bits",
    ),
    "unknown": (change_config(quantization_config={"quant_method": "nothing-known"}), "'nothing-known'"),
    "kernel": (change_config(attn_implementation="org/kernel"), "got 'org/kernel'"),
    "kernels": (change_config(_attn_implementation={"": "org/kernel"}), "got 'org/kernel'"),
    "experts": (change_config(experts_implementation="org/experts"), "got 'org/experts'"),
    "heads": (change_config(num_attention_heads=0), "causal LM folder|config"),
    "sizes": (change_config(hidden_size="many"), "causal LM folder"),
    "act": (change_config(hidden_act="nothing"), "causal LM folder"),
    "list": (lambda folder: (folder / "config.json").write_text("[]"), "mapping"),
    "code": (change_config(auto_map={"AutoModelForCausalLM": "org/code--m.M"}, model_type="own"), "causal LM folder"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_run_refuses_in_one_line(
    case: str, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, said = REFUSED[case]
    spoil(student)
    (tmp_path / "text").write_text("words " * 400)
    words = ["distill", "--teacher", str(teacher_path()), "--student", str(student), "--data", str(tmp_path / "text")]
    words += ["--out", str(tmp_path / "run"), "--seq-len", "16", "--max-steps", "1", "--dtype", "float32"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1, error
    assert re.search(said, error), error


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("value", "said"), [(torch.nan, "NaN"), (torch.inf, "an infinity"), (-torch.inf, "an infinity")]
)
def test_one_weight_that_is_no_number_is_found_wherever_it_is(value: float, said: str, dtype: torch.dtype) -> None:
    for place in (0, 12_345, -1):
        model = torch.nn.Linear(257, 99, bias=False).to(dtype)
        check_finite(Path(), model)
        with torch.no_grad():
            model.weight.view(-1)[place] = value
        with pytest.raises(InputError, match=f"{said} in weight"):
            check_finite(Path(), model)


def test_weights_and_from_scratch_exclude_each_other(student: Path) -> None:
    assert check_folder(student, from_scratch=False)
    assert check_folder(student)
    with pytest.raises(InputError, match=r"no weights with --from-scratch, got model\.safetensors"):
        check_folder(student, from_scratch=True)
    assert not check_folder(student_path(), from_scratch=True)
    assert not check_folder(student_path())


def test_shards_with_an_index_and_what_a_trainer_leaves_beside_are_read(student: Path) -> None:
    before: Any = load_student(student, 0)
    shard(student)
    for name in ("training_args.bin", "optimizer.pt", "rng_state_0.pth", "other.gguf"):
        (student / name).write_bytes(b"pickle")
    assert check_folder(student, from_scratch=False)
    after: Any = load_student(student, 0)
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


def test_links_of_a_hub_cache_are_followed(student: Path) -> None:
    blobs = student.parent / "blobs"
    blobs.mkdir()
    (student / WHOLE).rename(blobs / "0123")
    (student / WHOLE).symlink_to("../blobs/0123")
    assert check_folder(student, from_scratch=False)


def test_a_tensor_that_the_config_does_not_know_is_named(student: Path) -> None:
    tensors = load_file(student / WHOLE) | {"model.vision.weight": torch.ones(2)}
    save_file(tensors, student / WHOLE, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"1 unknown, model\.vision\.weight first"):
        load_student(student, 0)


def test_a_head_of_its_own_beside_a_config_that_ties_it_stays_its_own(student: Path) -> None:
    tensors = load_file(student / WHOLE)
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": 2 * embedding}, student / WHOLE, metadata={"format": "pt"})
    assert json.loads((student / "config.json").read_text())["tie_word_embeddings"]
    model: Any = load_student(student, 0)
    assert torch.equal(model.lm_head.weight, 2 * embedding)
    assert model.config.tie_word_embeddings is False
    model.tie_weights()
    assert torch.equal(model.lm_head.weight, 2 * embedding)


@pytest.mark.parametrize(
    "error", [TypeError, AttributeError, ImportError, ZeroDivisionError, RecursionError, Exception]
)
def test_any_error_of_other_peoples_code_is_one_line(
    error: type[Exception], student: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    def fail(*_arguments: object, **_options: object) -> None:
        raise error("two\nlines")

    for name in ("AutoModelForCausalLM", "AutoTokenizer"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", fail)
    for load in (lambda: load_student(student, 0), lambda: load_tokenizer(student)):
        with pytest.raises(InputError, match=f"{error.__name__}: two lines"):
            load()
