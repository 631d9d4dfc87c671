"""Our recipes beside llama.cpp's choice of types, tensor by tensor: run by ``nox -s parity``; skipped without it."""

from pathlib import Path

import gguf
import pytest

pytest.importorskip("llama_cpp", reason="the independent engine; nox -s parity builds it")

from architecture_models import CASES, Case, make_model, make_tokenizer
from llamacpp_engine import FILE_TYPES, quantise

from q4kd.trainer.formats.gguf.recipes import RECIPES, Mixture, tensor_type
from q4kd.trainer.formats.gguf.writer import write_gguf

LAYERS = 17  # an eighth of them is two layers, a sixteenth one
# Query heads to a key head, columns of most matrices, and whether the head is tied.
MODELS = {"shared": (4, 256, "qwen2"), "pairs": (2, 256, "qwen2-tied"), "odd": (2, 320, "qwen2")}
MODELS["fused"] = (4, 256, "phi3")  # Q, K and V are one matrix


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for name, (groups, hidden, case) in MODELS.items():
        model = make_model(
            CASES.get(case, Case(case)),
            hidden_size=hidden,
            intermediate_size=hidden,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=4 // groups,
        )
        made[name] = tmp_path_factory.mktemp("recipes") / f"{name}.gguf"
        state, tokenizer = model.state_dict(), make_tokenizer()
        write_gguf(made[name], config=model.config, state=state, tokenizer=tokenizer, recipe="f16", name=name)
    return made


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe.upper() in FILE_TYPES])
def test_every_tensor_gets_the_type_that_llama_cpp_gives_it(
    sources: dict[str, Path], tmp_path: Path, recipe: str, name: str
) -> None:
    theirs = gguf.GGUFReader(quantise(sources[name], tmp_path / "theirs.gguf", recipe.upper()))
    mixture = Mixture(recipe, LAYERS, tied=name == "pairs", groups=MODELS[name][0])
    wanted = {tensor.name: tensor.tensor_type.name for tensor in theirs.tensors}
    shapes = {tensor.name: tuple(tensor.shape.tolist()[::-1]) for tensor in theirs.tensors}
    ours = {key: tensor_type(key, shape, mixture) for key, shape in shapes.items()}
    if (recipe, name) == ("q4_k_m", "odd"):  # we take Q8_0 where superblocks do not fit
        assert set(wanted.values()) == {"F32", "Q5_0", "Q8_0"}
        assert set(ours.values()) == {"F32", "Q8_0"}
    else:
        assert ours == wanted
    assert int(theirs.fields["general.file_type"].contents()) == RECIPES[recipe]
