"""The experiment on products, by the kernels' own source on the host: its bound, its faults, what it keeps."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from host_kernels import HostLauncher, host_launcher
from reference_kernels import widening_multiply

from q4kd.harness.runs import faults as registry
from q4kd.harness.runs.experiment import Inputs, get_experiment
from q4kd.harness.subjects.precision import faults as faults_precision
from q4kd.harness.subjects.precision import products
from q4kd.harness.subjects.precision.probes import multiply_all
from q4kd.trainer.kernels import numerics
from q4kd.trainer.kernels.teacher_kernels import Kernels


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> HostLauncher:
    return host_launcher(tmp_path_factory)


@pytest.fixture
def operands(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Matrices as the experiment makes them, smaller: one row tile a block, and four."""
    monkeypatch.setattr(products, "SHAPES", ((261, 768), (275, 512)))
    monkeypatch.setattr(products, "TOKENS", 16 + 24)
    monkeypatch.setattr("q4kd.trainer.kernels.teacher_kernels.MANY_ROWS", 270)
    return products.make_operands()


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Plant a fault in this process, and put back what it replaced."""

    def plant(name: str) -> None:
        def replace(target: str, make: Callable[[Any], Any]) -> None:
            module, _, path = target.partition(":")
            monkeypatch.setattr(f"{module}.{path}", make(original(f"{module}.{path}")))

        for module in (registry, faults_precision):
            monkeypatch.setattr(module, "replace", replace)
        registry.get_fault(name).apply()

    return plant


# As in contracts/q4k-q6k-superblock-v1.yaml.
BOUND = 2e-3


def original(path: str) -> Any:
    if path.endswith("Kernels.matvec"):
        return Kernels.matvec
    assert path == "q4kd.trainer.kernels.numerics.multiply"
    return numerics.multiply


def worst_errors(launcher: HostLauncher, operands: dict[str, Any]) -> dict[str, float]:
    found = multiply_all(Kernels("cpu", launcher), operands)
    exact = products.exact_products(operands)
    assert found.keys() == exact.keys()
    errors = {}
    for name, wanted in exact.items():
        assert found[name].shape == wanted.shape
        judged = (-1, products.GROUP * wanted.shape[1]) if name.endswith("decoded") else wanted.shape
        off, exactly = (found[name] - wanted).reshape(judged), wanted.reshape(judged)
        errors[name] = float((np.linalg.norm(off, axis=1) / np.linalg.norm(exactly, axis=1)).max())
    return errors


def test_products_are_within_the_bound_on_the_host(
    launcher: HostLauncher, operands: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numerics, "multiply", widening_multiply)
    launcher.launched.clear()
    errors = worst_errors(launcher, operands)
    assert len(errors) == 8
    assert all(error <= 1e-5 for name, error in errors.items() if name.endswith("fused"))
    assert all(1e-3 < error <= BOUND for name, error in errors.items() if name.endswith("decoded"))
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
    over = {name.rpartition("-")[2] for name, error in errors.items() if not error <= BOUND}
    assert over == ways


def test_the_last_rows_of_a_product_are_kept(tmp_path: Path, operands: dict[str, Any]) -> None:
    inputs, folder = Inputs(tmp_path / "inputs", "h200"), tmp_path / "cuda-products"
    (folder / "arrays").mkdir(parents=True)
    experiment = get_experiment("cuda-products")
    assert experiment.collect(folder, inputs) == {"comparators": {}}
    np.savez(folder / "products.npz", **products.exact_products(operands))
    facts = experiment.collect(folder, inputs)
    assert facts["comparators"].keys() == products.exact_products(operands).keys()
    with np.load(folder / "arrays" / "q4_k-275-fused.npz") as arrays:
        assert arrays["subject"].shape == (1 + 5 + 16, 256)
        wanted = products.exact_products(operands)["q4_k-275-fused"][:, -16:]
        assert np.array_equal(arrays["reference"][:, -16:], wanted.astype(np.float32))
    with np.load(folder / "arrays" / "q4_k-275-decoded.npz") as arrays:
        assert arrays["subject"].shape == (24 // products.GROUP, products.GROUP * 64)
