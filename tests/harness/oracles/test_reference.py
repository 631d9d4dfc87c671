"""The harness's float64 forward against transformers in float64, and its two ways of reading a model."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from architecture_models import CASES, make_model, make_tokenizer, row_errors, state_arrays  # noqa: E402

from q4kd.harness.oracles.reference import (  # noqa: E402
    from_hugging_face,
    read_gguf,
    reference_attention,
    reference_logits,
)
from q4kd.trainer.formats.gguf.writer import write_gguf  # noqa: E402

SMALL = {"hidden_size": 64, "intermediate_size": 96}
IDS = np.random.default_rng(1).integers(0, 320, 24)


@pytest.mark.parametrize("case", CASES)
def test_it_agrees_with_transformers(case: str) -> None:
    model = make_model(CASES[case], **SMALL)
    exact = reference_logits(from_hugging_face(state_arrays(model), model.config.to_dict()), IDS)
    with torch.no_grad():
        theirs = model.double()(torch.from_numpy(IDS)[None]).logits[0].numpy()
    # transformers computes cosines and sines in float32, whatever the model's type.
    assert row_errors(theirs, exact).max() <= 2e-6


@pytest.mark.parametrize("case", CASES)
def test_a_file_means_the_same_as_the_state_dict_it_was_written_from(tmp_path: Path, case: str) -> None:
    model = make_model(CASES[case], num_hidden_layers=1, **SMALL)
    exact = reference_logits(from_hugging_face(state_arrays(model), model.config.to_dict()), IDS)
    path = tmp_path / "m.gguf"
    write_gguf(path, config=model.config, state=model.state_dict(), tokenizer=make_tokenizer(), recipe="f32", name=case)
    read = read_gguf(path)
    # Only rms_eps, the rotary base and its factors are rounded to float32.
    assert row_errors(reference_logits(read, IDS), exact).max() <= 1e-7

    swapped = dataclasses.replace(read, interleaved=not read.interleaved)
    assert row_errors(reference_logits(swapped, IDS), exact)[1:].min() > 1e-3
    slower = dataclasses.replace(read, frequencies=read.frequencies / 1.01)
    assert row_errors(reference_logits(slower, IDS), exact).max() > 1e-3
    for name in read.weights:
        if name.endswith(("_norm.weight", ".bias")):
            without = {**read.weights, name: np.zeros(1) if name.endswith("bias") else np.ones(1)}
            changed = reference_logits(dataclasses.replace(read, weights=without), IDS)
            # A key's bias shifts every score of a query alike, but for the rotation.
            assert row_errors(changed, exact).max() > 1e-3, name


def test_what_it_does_not_implement_is_an_error(tmp_path: Path) -> None:
    model = make_model(CASES["llama"], num_hidden_layers=1, **SMALL)
    config = model.config.to_dict() | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}
    with pytest.raises(ValueError, match="yarn"):
        from_hugging_face(state_arrays(model), config)


def test_attention_of_documents_is_that_of_each_alone() -> None:
    rng = np.random.default_rng(2)
    q, k, v = (rng.normal(size=(count, 9, 4)) for count in (6, 2, 2))
    starts = np.array([0, 0, 0, 3, 3, 3, 3, 7, 7])
    mixed = reference_attention(q, k, v, starts)
    assert mixed.shape == (9, 6, 4)
    for part in (slice(0, 3), slice(3, 7), slice(7, 9)):
        alone = reference_attention(q[:, part], k[:, part], v[:, part], np.zeros(part.stop - part.start, np.int64))
        assert np.allclose(mixed[part], alone, atol=1e-14)
    # A document's first query reads itself alone: query head 4 the second key-value head's value.
    assert np.allclose(mixed[3, 4], v[1, 3])
