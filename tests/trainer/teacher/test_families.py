"""Every dense family as a teacher: transformers' own model is what its file means, written by an independent writer.

The error is relative Frobenius at each position, in float32; texts are longer than windows and than the context before
scaling.
"""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from architecture_models import row_errors  # noqa: E402
from emulated_cuda import build, product  # noqa: E402, F401 - the fixture stands in for the CUDA product
from family_models import CASES, LENGTH, WINDOW, MadeFamily, made_family, make_family, write_family  # noqa: E402
from teachers import load_quietly  # noqa: E402

import q4kd.trainer.kernels.attention as attention_module  # noqa: E402
from q4kd.harness.oracles.families import family_logits, read_family  # noqa: E402
from q4kd.trainer.teacher.cuda.forward import CudaForward  # noqa: E402

BOUND = 1e-5
IDS = np.random.default_rng(4).integers(0, 320, (2, LENGTH))
STARTS = np.repeat([0, 40, 41], [40, 1, LENGTH - 41])


@pytest.fixture(scope="module", params=CASES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MadeFamily:
    return made_family(tmp_path_factory.mktemp("families"), request.param, CASES[request.param], IDS)


def device_logits(forward: CudaForward, ids_BT: np.ndarray, starts_BT: np.ndarray | None = None) -> np.ndarray:
    starts = None if starts_BT is None else torch.from_numpy(starts_BT)
    hidden = forward.hidden(torch.from_numpy(ids_BT), starts)
    return forward.head_logits(hidden.flatten(0, 1)).view(*ids_BT.shape, -1).float().numpy()


def test_the_teacher_is_the_model_that_transformers_runs(made: MadeFamily) -> None:
    for backend in ("q4k", "dense"):
        found = load_quietly(made.path, backend=backend).logits(torch.from_numpy(IDS)).numpy()
        assert row_errors(found, made.logits).max() <= BOUND


def test_the_oracle_is_the_model_that_transformers_runs(made: MadeFamily) -> None:
    # Weights are float32 in the file, and transformers computes rotary frequencies in float32.
    model = read_family(made.path)
    for row in range(2):
        assert row_errors(family_logits(model, IDS[row]), made.logits[row]).max() <= 1e-5


def test_the_cuda_forward_computes_the_same(made: MadeFamily) -> None:
    found = device_logits(build(path=made.path, dtype=torch.float32), IDS)
    assert row_errors(found, made.logits).max() <= BOUND
    assert row_errors(device_logits(build(path=made.path), IDS), made.logits).max() <= 5e-2


def test_packed_documents_are_each_alone(made: MadeFamily) -> None:
    model, ids = read_family(made.path), IDS[0]
    alone = np.concatenate([family_logits(model, part) for part in np.split(ids, [40, 41])])
    teacher = load_quietly(made.path)
    hidden = teacher.hidden(torch.from_numpy(ids[None]), torch.from_numpy(STARTS[None]))
    assert row_errors(teacher.head_logits(hidden[0]).numpy(), alone).max() <= BOUND
    found = device_logits(build(path=made.path, dtype=torch.float32), ids[None], STARTS[None])[0]
    assert row_errors(found, alone).max() <= BOUND


def test_blocks_of_queries_read_the_same_keys(made: MadeFamily, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_module, "_LONG", 1)
    monkeypatch.setattr(attention_module, "_OWN_PRODUCTS", True)
    monkeypatch.setattr(attention_module, "_BLOCK", 5)
    found = load_quietly(made.path).logits(torch.from_numpy(IDS)).numpy()
    assert row_errors(found, made.logits).max() <= BOUND


def test_the_head_that_the_loss_decodes_gives_the_same_logits(made: MadeFamily) -> None:
    from q4kd.trainer.loss.last_step import apply_last_step

    teacher = load_quietly(made.path)
    hidden = teacher.hidden(torch.from_numpy(IDS))[0]
    decoded = teacher.head.decoded()
    assert decoded is not None
    found = apply_last_step(hidden @ decoded.T, teacher.head.last_step).numpy()
    assert row_errors(found, made.logits[0]).max() <= BOUND


def test_a_long_window_visits_its_own_keys_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["mistral-window"]
    path = write_family(tmp_path / "m.gguf", case, make_family(case))
    seen: list[int] = []
    original = attention_module.multiply

    def counted(x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        seen.append(max(weights.shape))
        return original(x, weights)

    monkeypatch.setattr(attention_module, "multiply", counted)
    monkeypatch.setattr(attention_module, "_LONG", 16)
    monkeypatch.setattr(attention_module, "_BLOCK", 16)
    load_quietly(path).hidden(torch.from_numpy(IDS))
    assert max(seen) == 16 + WINDOW - 1
