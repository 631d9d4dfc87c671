"""Loading a student in its dtype, and what settings ask of it."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from q4kd.trainer import wall
from q4kd.trainer.config.settings import DistillConfig, make_config
from q4kd.trainer.demo import student_path
from q4kd.trainer.errors import InputError
from q4kd.trainer.formats.open import open_model
from q4kd.trainer.student import model as student_module
from q4kd.trainer.student.model import load_student, load_tokenizer, set_up_student, student_dtype
from q4kd.trainer.student.shape import shape_student


def settings(**values: object) -> DistillConfig:
    return make_config({"teacher": "t", "student": "s", "data": "d", "out": "o", **values})


def test_dtypes() -> None:
    assert student_dtype(settings()) == torch.float32
    assert student_dtype(settings(device="cuda")) == torch.bfloat16
    assert student_dtype(settings(device="cuda", student_dtype="float32")) == torch.float32
    assert student_dtype(settings(student_dtype="bfloat16")) == torch.bfloat16


def test_a_bfloat16_student_is_the_float32_one_rounded_and_its_buffers_are_not(tmp_path: Any) -> None:
    exact: Any = load_student(student_path(), seed=3)
    exact.save_pretrained(tmp_path)
    for rounded in (load_student(student_path(), 3, torch.bfloat16), load_student(tmp_path, 0, torch.bfloat16)):
        for (name, a), (other, b) in zip(exact.named_parameters(), rounded.named_parameters(), strict=True):
            assert name == other
            assert torch.equal(a.bfloat16(), b)
        buffers = dict(rounded.named_buffers())
        assert any("inv_freq" in name for name in buffers)
        assert all(buffer.dtype == torch.float32 for buffer in buffers.values())


def test_compile_is_asked_of_the_layers_and_not_of_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    student: Any = load_student(student_path(), seed=3)
    asked = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, *_args: asked.append(self))
    set_up_student(student, settings(compile=True))
    assert asked == [student.model]


def test_recomputation_needs_an_architecture_that_offers_it() -> None:
    student: Any = load_student(student_path(), seed=3)
    set_up_student(student, settings(gradient_checkpointing=True))
    assert all(layer.gradient_checkpointing for layer in student.model.layers)
    student.supports_gradient_checkpointing = False
    with pytest.raises(InputError, match="gradient_checkpointing"):
        set_up_student(student, settings(gradient_checkpointing=True))


def test_liger_says_what_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    student: Any = load_student(student_path(), seed=3)
    with pytest.raises(InputError, match="student_kernels torch"):
        set_up_student(student, settings(student_kernels="liger"))
    monkeypatch.setattr(student_module.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(InputError, match=r"pip install 'q4kd\[liger\]'"):
        set_up_student(student, settings(student_kernels="liger", device="cuda"))


@pytest.mark.parametrize("named", ["Qwen/Qwen2.5-0.5B", "folder", "file"])
def test_what_is_no_folder_is_refused_before_the_hub_is_asked(
    named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()

    def ask(*_args: object, **_options: object) -> None:
        raise AssertionError("looked for on the hub")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", ask)
    for look in (lambda path: shape_student(path, 1, 8, torch.float32), lambda path: load_student(path, 0)):
        with pytest.raises(InputError) as caught:
            look(Path(named))
        assert ("hf download Qwen/Qwen2.5-0.5B --local-dir" in str(caught.value)) == ("/" in named)


def test_a_hub_id_in_the_place_of_a_teacher_says_how_to_fetch_it() -> None:
    with pytest.raises(InputError, match=r"hf download a/b-GGUF --include '\*.gguf' --local-dir DIR"):
        open_model(Path("a/b-GGUF"))
    with pytest.raises(InputError, match="name a file that is there"):
        open_model(Path("a/b/c.gguf"))
    with pytest.raises(InputError, match=r"Is a directory; q4kd export .* --format gguf makes one"):
        open_model(student_path())


def test_a_student_that_lost_its_tokenizer_or_half_its_weights_is_one_line(tmp_path: Path) -> None:
    shutil.copy(student_path() / "config.json", tmp_path)
    with pytest.raises(InputError, match=r"expected its tokenizer: .*tokenizer\.json.*, got none"):
        load_tokenizer(tmp_path)
    model: Any = load_student(tmp_path, 0)
    model.save_pretrained(tmp_path, safe_serialization=True)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(InputError, match="SafetensorError"):
        load_student(tmp_path, 0)


def test_compiling_is_a_phase_of_its_own_and_its_code_is_kept_in_the_users_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", default_cache_dir())
    told: list[str] = []
    clock = wall.start(listener=lambda _phase, what, _seconds: told.append(what))
    set_up_student(load_student(student_path(), seed=0), settings(compile=True))
    assert Path(cache_dir()) == tmp_path / "q4kd" / "torch-compile"
    assert (tmp_path / "q4kd" / "torch-compile").stat().st_mode & 0o777 == 0o700
    compiled = torch.compile(lambda x: x * 2 + 1, backend="eager")
    with wall.phase("train"):
        assert compiled(torch.ones(2)).tolist() == [3, 3]
        assert clock.current == "train"
    assert clock.entered["compile"] == len(told) == 1 and told == ["the student"]
    assert clock.seconds()["compile"] > 0
    # What the user has chosen stays.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    set_up_student(load_student(student_path(), seed=0), settings(compile=True))
    assert Path(cache_dir()) == tmp_path / "mine"


def test_capped_attention_is_computed_by_code_that_caps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Releases of transformers differ in whether they take torch's fused attention for Gemma 2, which has no cap."""
    import transformers
    from transformers.models.gemma2 import modeling_gemma2

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    make: Any = transformers.AutoModelForCausalLM.from_config
    monkeypatch.setattr(modeling_gemma2.Gemma2PreTrainedModel, "_supports_sdpa", True)
    capped = transformers.Gemma2Config(**sizes, attn_logit_softcapping=0.1)
    capped.save_pretrained(tmp_path)
    assert make(capped).config._attn_implementation == "sdpa"
    student: Any = load_student(tmp_path, seed=1)
    plain = make(transformers.Gemma2Config(**sizes, attn_logit_softcapping=None)).eval()
    plain.load_state_dict(student.state_dict())
    ids = torch.arange(1, 20)[None]
    assert student.config._attn_implementation == "eager"
    assert not torch.allclose(student.eval()(ids).logits, plain(ids).logits, rtol=0, atol=1e-6)
