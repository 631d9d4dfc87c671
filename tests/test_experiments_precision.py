"""The experiments on rounding, as far as they can be seen without a GPU: the dense peer, the products, their faults."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from host_kernels import HostLauncher, build, host_compiler
from reference_kernels import widening_multiply

from q4kd.harness import experiments_precision as precision
from q4kd.harness.experiment import Inputs, get_experiment
from q4kd.harness.experiments_teacher import GOLDEN_TEACHER
from q4kd.harness.probes_precision import build_dense, multiply_all
from q4kd.harness.reference import read_gguf, reference_logits
from q4kd.harness.sabotage import faults_precision as faults
from q4kd.trainer.cuda import numerics
from q4kd.trainer.cuda.kernels import Kernels
from q4kd.trainer.demo import teacher_path


@pytest.mark.parametrize("path", [teacher_path(), GOLDEN_TEACHER], ids=["tied", "untied"])
def test_the_dense_peer_is_the_same_model_rounded_once(path: Path) -> None:
    pytest.importorskip("transformers")
    model = build_dense(path)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    ids = np.random.default_rng(3).integers(0, 512, (2, 24))
    with torch.no_grad():
        found = model(input_ids=torch.from_numpy(ids)).logits.float().numpy()
    reference = read_gguf(path)
    exact = np.stack([reference_logits(reference, row) for row in ids])
    errors = np.linalg.norm(found - exact, axis=-1) / np.linalg.norm(exact, axis=-1)
    assert 1e-4 < errors.max() < 2e-2  # bfloat16's 8 bits, and no more than that


def test_what_is_kept_of_the_logits_is_what_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "SEQUENCES", 2)
    inputs = Inputs(tmp_path / "inputs", "cpu")
    experiment = get_experiment("bfloat16-errors")
    experiment.prepare(inputs)
    ids = np.load(precision._ids(inputs))
    exact = reference_logits(read_gguf(precision.demo_teacher(inputs)), ids[1])
    facts = {}
    for arm in ("packed", "dense"):
        folder = tmp_path / f"bfloat16-errors.{arm}"
        (folder / "arrays").mkdir(parents=True)
        assert experiment.collect(folder, inputs) == {"comparators": {}}
        np.save(folder / "logits.npy", np.stack([exact, exact]).astype(np.float32))
        facts[arm] = experiment.collect(folder, inputs)["comparators"]["float64"]
        with np.load(folder / "arrays" / "float64.npz") as arrays:
            assert arrays["subject"].shape == (2, 16, 32)
            assert np.array_equal(arrays["subject"][1], arrays["reference"][1])
            assert not np.array_equal(arrays["subject"][0], arrays["reference"][0])
            assert (arrays["reference"][1, 0] == exact[3].astype(np.float32)[:, None]).any(0).sum() == 32
    assert facts["packed"]["subject"] != facts["dense"]["subject"]
    assert facts["packed"]["reference"] == facts["dense"]["reference"]


def test_both_devices_run_the_same_two_programs(tmp_path: Path) -> None:
    inputs = Inputs(tmp_path, "cpu")
    on_cpu, on_cuda = get_experiment("bfloat16-errors"), get_experiment("cuda-bfloat16-errors")
    for ours, theirs in zip(on_cpu.arms, on_cuda.arms, strict=True):
        assert ours.name == theirs.name
        assert [word.replace("cpu", "cuda") for word in ours.argv(inputs)] == theirs.argv(inputs)
        assert "bfloat16" in ours.argv(inputs) or ours.name == "dense"
    assert (on_cuda.exclusive, on_cuda.needs) == (True, ("cuda",))


# --- products: the kernels' own source on the host ---


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> HostLauncher:
    if host_compiler() is None:
        assert not os.environ.get("Q4KD_REQUIRE_KERNELS"), "no C++ compiler; install g++ or clang++"
        pytest.skip("no C++ compiler")
    return HostLauncher(build(tmp_path_factory.mktemp("kernels")))


@pytest.fixture
def operands(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Matrices as the experiment makes them, smaller: one row tile a block, and four."""
    monkeypatch.setattr(precision, "SHAPES", ((261, 768), (275, 512)))
    monkeypatch.setattr(precision, "TOKENS", 16 + 20)
    monkeypatch.setattr("q4kd.trainer.cuda.plans.MANY_ROWS", 270)
    return precision.make_operands()


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Plant a fault in this process, and put back what it replaced."""

    def plant(name: str) -> None:
        def replace(target: str, make: Callable[[Any], Any]) -> None:
            module, _, path = target.partition(":")
            monkeypatch.setattr(f"{module}.{path}", make(original(f"{module}.{path}")))

        monkeypatch.setattr(faults, "replace", replace)
        from q4kd.harness.sabotage.registry import get_fault

        get_fault(name).apply()

    return plant


# As in contracts/q4k-q6k-superblock-v1.yaml.
BOUNDS = {"fused": 2e-3, "decoded": 3e-3}


def original(path: str) -> Any:
    if path.endswith("Kernels.matvec"):
        return Kernels.matvec
    assert path == "q4kd.trainer.cuda.numerics.multiply"
    return numerics.multiply


def worst_errors(launcher: HostLauncher, operands: dict[str, Any]) -> dict[str, float]:
    found = multiply_all(Kernels("cpu", launcher), operands)
    exact = precision.exact_products(operands)
    assert found.keys() == exact.keys()
    errors = {}
    for name, wanted in exact.items():
        assert found[name].shape == wanted.shape
        errors[name] = float((np.linalg.norm(found[name] - wanted, axis=1) / np.linalg.norm(wanted, axis=1)).max())
    return errors


def test_products_are_within_the_bound_on_the_host(
    launcher: HostLauncher, operands: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numerics, "multiply", widening_multiply)
    launcher.launched.clear()
    errors = worst_errors(launcher, operands)
    assert len(errors) == 8
    assert all(error <= 1e-5 for name, error in errors.items() if name.endswith("fused"))
    assert all(1e-3 < error <= BOUNDS["decoded"] for name, error in errors.items() if name.endswith("decoded"))
    assert {name.split("_")[4] for name in launcher.launched if "matvec_q6" in name} == {"r1", "r4"}


@pytest.mark.parametrize(
    ("fault", "ways"), [("device-coarse-activations", {"fused", "decoded"}), ("device-rows-left-out", {"fused"})]
)
def test_planted_faults_leave_the_bound(
    launcher: HostLauncher,
    operands: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    planted: Callable[[str], None],
    fault: str,
    ways: set[str],
) -> None:
    monkeypatch.setattr(numerics, "multiply", widening_multiply)
    planted(fault)
    errors = worst_errors(launcher, operands)
    over = {way for name, error in errors.items() if not error <= BOUNDS[way := name.rpartition("-")[2]]}
    assert over == ways


def test_the_last_rows_of_a_product_are_kept(tmp_path: Path, operands: dict[str, Any]) -> None:
    inputs, folder = Inputs(tmp_path / "inputs", "h200"), tmp_path / "cuda-products"
    (folder / "arrays").mkdir(parents=True)
    experiment = get_experiment("cuda-products")
    assert experiment.collect(folder, inputs) == {"comparators": {}}
    np.savez(folder / "products.npz", **precision.exact_products(operands))
    facts = experiment.collect(folder, inputs)
    assert facts["comparators"].keys() == precision.exact_products(operands).keys()
    with np.load(folder / "arrays" / "q4_k-275-fused.npz") as arrays:
        assert arrays["subject"].shape == (1 + 5 + 16, 256)
        wanted = precision.exact_products(operands)["q4_k-275-fused"][:, -16:]
        assert np.array_equal(arrays["reference"][:, -16:], wanted.astype(np.float32))
