"""What the experiments of mixtures on a GPU do, by the same probes on the host."""

import inspect
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from host_kernels import host_launcher
from reference_kernels import ReferenceExpertKernels, ReferenceKernels, device_tensors, widening_multiply

import q4kd.trainer.teacher.cuda.forward as forward_module
import q4kd.trainer.teacher.cuda.layers as layers_module
import q4kd.trainer.teacher.cuda.load as load_module
import q4kd.trainer.teacher.cuda.mixture as mixture_module
from q4kd.harness.inputs.arrays import arrays_input, read_arrays
from q4kd.harness.inputs.models.synthetic_mixtures import VOCAB
from q4kd.harness.oracles.families import FamilyModel, family_logits
from q4kd.harness.runs.experiment import Inputs
from q4kd.harness.runs.faults import all_faults
from q4kd.harness.subjects.mixtures import devices, experiments, faults_cuda, probes
from q4kd.harness.subjects.mixtures.experiments import ids_file, marked_file, mixture_file
from q4kd.trainer.formats.model_file import ModelFile
from q4kd.trainer.formats.open import open_model
from q4kd.trainer.kernels.expert_kernels import ExpertKernels
from q4kd.trainer.kernels.teacher_kernels import Kernels
from q4kd.trainer.teacher.cuda.forward import CudaForward


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    return Inputs(tmp_path_factory.mktemp("inputs"), "h200")


@pytest.fixture(autouse=True)
def oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the oracle's logits, which take seconds, serve every test."""
    monkeypatch.setattr(experiments, "family_logits", lambda model, ids: exact_logits(model, tuple(ids.tolist())))


EXACT: dict[tuple[int, ...], np.ndarray] = {}


def exact_logits(model: FamilyModel, ids: tuple[int, ...]) -> np.ndarray:
    if ids not in EXACT:
        EXACT[ids] = family_logits(model, np.array(ids))
    return EXACT[ids]


def stand_in(monkeypatch: pytest.MonkeyPatch, kernels: Callable[[], Any]) -> None:
    """Load to the host what is loaded to a GPU, with these kernels."""
    for module in (forward_module, mixture_module):
        monkeypatch.setattr(module, "multiply", widening_multiply)

    def load(model: ModelFile, backend: str, *, dtype: torch.dtype, allocation: str = "", **bounds: int) -> CudaForward:
        tensors = device_tensors(model)
        return CudaForward(
            model.config, tensors, backend, kernels(), dtype=dtype, overlap=False, graphs=False, **bounds
        )

    monkeypatch.setattr(load_module, "load_forward", load)


def worst(pair: dict[str, np.ndarray]) -> float:
    subject, reference = pair["subject"].astype(float), pair["reference"].astype(float)
    return float((np.linalg.norm(subject - reference, axis=1) / np.linalg.norm(reference, axis=1)).max())


def run_passes(folder: Path, inputs: Inputs) -> dict[str, float]:
    """Run the experiment's probe and return the worst error of every pair that it collects."""
    models = (mixture_file(inputs), marked_file(inputs))
    probes.mixture_passes(ids_file(inputs), folder / "logits.npz", models, "cuda")
    (folder / "arrays").mkdir(exist_ok=True)
    compared = devices.collect_passes(folder, inputs)["comparators"]
    return {name: worst(read_arrays(folder / "arrays" / f"{name}.npz")) for name in compared}


def test_the_passes_of_the_device_are_those_of_the_oracle(
    tmp_path: Path, inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers_module, "ExpertKernels", ReferenceExpertKernels)
    stand_in(monkeypatch, ReferenceKernels)
    errors = run_passes(tmp_path, inputs)
    assert set(errors) == {f"{way}-{what}" for way in devices.WAYS for what in ("float64", "weights", "loads")} | {
        "cpu"
    }
    # Half of what the claims allow: the device sums in another order.
    bounds = {"bfloat16-float64": 3e-2, "bfloat16-weights": 2e-2, "bfloat16-loads": 2e-2}
    assert all(error <= bounds.get(name, 5e-6) for name, error in errors.items()), errors


# Each fault, and a pair that it must move beyond its claim's bound. The fault that needs kernels is below.
CAUGHT = {
    "device-shares-not-renormalised": "float32-float64",
    "device-router-rounded": "float32-float64",
    "device-later-slabs-left-out": "slabs-float64",
    "device-one-expert-fewer": "float32-weights",
    "device-next-expert-chosen": "slabs-weights",
    "device-expert-weights-exchanged": "float32-weights",
    "device-expert-capacity": "float32-loads",
    "device-experts-counted-if-chosen": "slabs-loads",
    "device-few-rows-left-out": "float32-loads",
}


@pytest.mark.parametrize("name", CAUGHT)
def test_faults_of_the_device_move_what_is_judged(
    tmp_path: Path, inputs: Inputs, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    patched = planted(monkeypatch, name, ReferenceExpertKernels)
    monkeypatch.setattr(layers_module, "ExpertKernels", patched)
    stand_in(monkeypatch, ReferenceKernels)
    assert run_passes(tmp_path, inputs)[CAUGHT[name]] > 1e-5


def planted(monkeypatch: pytest.MonkeyPatch, name: str, kernels: type) -> type:
    """Plant a fault in stand-ins of the kernels, or in the function that it names; return the class of kernels."""
    (target,) = all_faults()[name].targets
    stands_in = inspect.unwrap(all_faults()[name].apply)
    attribute = target.rpartition(".")[2]
    if target.endswith(":cut_runs"):
        original = mixture_module.cut_runs
        monkeypatch.setattr(mixture_module, "cut_runs", lambda *given: stands_in(original, *given))
        return kernels
    method = getattr(kernels, attribute)
    return type("Faulty", (kernels,), {attribute: lambda self, *given: stands_in(method, self, *given)})


def decoded_table(folder: Path, inputs: Inputs) -> dict[str, int]:
    probes.expert_decodes(ids_file(inputs), folder / "decoded.npz", marked_file(inputs), "cuda")
    return devices.collect_decodes(folder, inputs)["tables"]["decoded"]


def test_the_kernels_own_source_decodes_the_chosen_experts_alone(
    tmp_path: Path, inputs: Inputs, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    launcher = host_launcher(tmp_path_factory)
    stand_in(monkeypatch, lambda: Kernels("cpu", launcher))
    short = {"text": np.random.default_rng(7).integers(0, VOCAB, (1, 12)), "one": np.full((1, 1), 23)}
    monkeypatch.setattr(devices, "ids_file", lambda at: arrays_input(at, "short.npz", lambda: short))
    monkeypatch.setitem(globals(), "ids_file", devices.ids_file)
    found = decoded_table(tmp_path, inputs)
    assert found["one: experts without a token"] == 13 and len(found) == 6
    assert all(count == 0 for name, count in found.items() if not name.endswith("experts without a token"))
    stands_in = inspect.unwrap(all_faults()["device-idle-experts-decoded"].apply)
    original = ExpertKernels.decode_experts
    monkeypatch.setattr(ExpertKernels, "decode_experts", lambda self, *given: stands_in(original, self, *given))
    assert decoded_table(tmp_path, inputs)["one: decoded without a token"] == 13


def test_decoded_experts_that_a_fault_holds_are_not_in_the_accounts(
    inputs: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers_module, "ExpertKernels", ReferenceExpertKernels)
    stand_in(monkeypatch, ReferenceKernels)
    stands_in = inspect.unwrap(all_faults()["device-experts-held-decoded"].apply)
    original = layers_module.build_experts
    monkeypatch.setattr(layers_module, "build_experts", lambda *given: stands_in(original, *given))
    model = open_model(mixture_file(inputs))
    forward = load_module.load_forward(model, "q4k", dtype=torch.float32)
    held = Counter(forward.vector_bytes)
    for matrix in forward.matrices.values():
        held[matrix.held_as] += matrix.resident_bytes
    assert held == model.bytes_by_type()
    assert sum(copy.nbytes for copy in faults_cuda._HELD) == 2 * 2 * 3 * 8 * 256 * 256
    faults_cuda._HELD.clear()
