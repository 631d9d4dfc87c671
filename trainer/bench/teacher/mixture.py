"""A packed mixture of experts against transformers' dense one of the same weights, in one process and one run.

    python -m q4kd.trainer.bench.teacher.mixture --out DIR [--model gpt-oss-20b] [--layers 24] [--shapes 4x2048]

makes a model's shapes on the device, Qwen3-30B-A3B's or those of the hybrid decoder Qwen3.6-35B-A3B in Q4_K_M's types
(``bench/synthetic_30b_a3b.py``), or gpt-oss-20b's in MXFP4 and Q8_0 (``bench/synthetic_gpt_oss.py``), and measures, in
this order: the device's ceilings; what the packed teacher alone takes of the device, by NVML where it answers; how far
both are from float32 in a model of the first layers; speed with the logits of every position, arms interleaved. Numbers
go to ``DIR/mixture.json``; a table is printed last.

Arms: ``q4k`` as it is by default, ``q4k-inline`` never decoding ahead, ``q4k-slabs-N`` with scratch for N megabytes of
gate and up, ``q4k-rows-N`` holding the activations of N rows; ``transformers`` is its own model in bfloat16 with its
grouped products, attention by SDPA, or the eager one for gpt-oss. Each arm of Qwen3's 48 layers holds 18.6 GB of
weights, transformers' 61 GB; of gpt-oss's 24 layers 12.1 GB and 42 GB.
"""

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch

from q4kd.trainer.bench import synthetic_30b_a3b, synthetic_gpt_oss
from q4kd.trainer.bench.device_probes import collect_garbage, copy_bandwidth, current_device, gemm_rate
from q4kd.trainer.bench.interleave import Shape, make_ids
from q4kd.trainer.bench.synthetic_35b_a3b import qwen36_35b_a3b
from q4kd.trainer.bench.teacher.cuda import CudaArm, environment, measure_speed, twin_arm
from q4kd.trainer.bench.teacher.cuda_errors import plain_float32, row_errors
from q4kd.trainer.bench.teacher.cuda_table import speed_line
from q4kd.trainer.bench.teacher.gpt_oss_twin import build_gpt_oss_twin
from q4kd.trainer.bench.teacher.mixture_twin import build_mixture_twin
from q4kd.trainer.files import write_json
from q4kd.trainer.formats.architecture import TeacherConfig
from q4kd.trainer.formats.blocks.layout import block_format
from q4kd.trainer.formats.tensor_shapes import expected_shapes
from q4kd.trainer.kernels.teacher_kernels import Kernels
from q4kd.trainer.teacher.cuda.forward import CudaForward
from q4kd.trainer.teacher.cuda.recurrent import rule_flop
from q4kd.trainer.teacher.cuda.weights import DeviceTensor

DEFAULT_SHAPES = (Shape(4, 2048), Shape(32, 2048))
ERROR_LAYERS = 4
ERROR_SHAPE = Shape(8, 256)


class Synthetic(NamedTuple):
    """How a model is made without its weights.

    Attributes:
        layers: of the whole model.
        configure: the dimensions of its first layers.
        types: every tensor's GGML type.
        tensors: random tensors on a device.
        twin: transformers' dense model of the same weights, in a dtype.
    """

    layers: int
    configure: Callable[[int], TeacherConfig]
    types: Callable[[TeacherConfig], dict[str, str]]
    tensors: Callable[[TeacherConfig, torch.device], Mapping[str, DeviceTensor]]
    twin: Callable[[TeacherConfig, Mapping[str, DeviceTensor], torch.dtype], Any]


MODELS = {
    "qwen3-30b-a3b": Synthetic(
        48,
        synthetic_30b_a3b.qwen3_30b_a3b,
        synthetic_30b_a3b.tensor_types,
        synthetic_30b_a3b.make_tensors,
        build_mixture_twin,
    ),
    "qwen3.6-35b-a3b": Synthetic(
        40,
        qwen36_35b_a3b,
        synthetic_30b_a3b.tensor_types,
        synthetic_30b_a3b.make_tensors,
        build_mixture_twin,
    ),
    "gpt-oss-20b": Synthetic(
        24,
        synthetic_gpt_oss.gpt_oss_20b,
        synthetic_gpt_oss.tensor_types,
        synthetic_gpt_oss.make_tensors,
        build_gpt_oss_twin,
    ),
}
_MADE_AS = {"qwen3moe": "qwen3-30b-a3b", "qwen35moe": "qwen3.6-35b-a3b", "gpt-oss": "gpt-oss-20b"}


def synthetic(config: TeacherConfig) -> Synthetic:
    """Return how a model of these dimensions is made."""
    return MODELS[_MADE_AS[config.architecture]]


def make_tensors(config: TeacherConfig, device: torch.device) -> Mapping[str, DeviceTensor]:
    """Return every tensor of a model with these dimensions, random and always equal, on the device."""
    return synthetic(config).tensors(config, device)


def build_dense_twin(config: TeacherConfig, dtype: torch.dtype) -> Any:
    """Return transformers' model of the same weights on the current device."""
    return synthetic(config).twin(config, make_tensors(config, current_device()), dtype)


def packed_arm(name: str, config: TeacherConfig, **options: Any) -> tuple[CudaArm, CudaForward]:
    """Return this project's teacher over freshly made, always equal weights, and its forward pass."""
    device = current_device()
    forward = CudaForward(config, make_tensors(config, device), "q4k", Kernels(device), **options)
    return CudaArm(name, forward.hidden, forward.head_logits), forward


def work_of(config: TeacherConfig, shape: Shape) -> dict[str, float]:
    """Return what a pass cannot do without: FLOP of its products, packed bytes read, bytes of decoded experts written.

    All experts are counted as chosen, which many tokens make sure of.
    """
    types, share = synthetic(config).types(config), config.experts_per_token / config.num_experts
    flop, packed, decoded = 0.0, 0, 0
    for name, type_name in types.items():
        dims = expected_shapes(config)[name]
        if len(dims) < 2 or name == "token_embd.weight" or name.endswith(".bias"):
            continue
        rows = dims[0] * dims[1] if len(dims) == 3 else dims[0]
        weights = rows * dims[-1]
        flop += 2 * weights * shape.tokens * (share if len(dims) == 3 else 1)
        packed += rows * block_format(type_name).row_bytes(dims[-1])
        decoded += 2 * weights if len(dims) == 3 else 0
    # A causal pass takes half of 4 T^2 N D in each layer that attends, and a window of W keys no more than 4 T W N D.
    attending = [layer for layer in range(config.num_layers) if config.recurrence_of(layer) is None]
    keys = [min(shape.length, 2 * config.window(layer) or shape.length) for layer in attending]
    flop += 2 * sum(keys) * config.q_size * shape.tokens
    if config.recurrence is not None:
        flop += (config.num_layers - len(attending)) * shape.tokens * rule_flop(config.recurrence)
    return {"flop": flop, "packed_bytes": packed, "decoded_expert_bytes": decoded}


def process_bytes() -> int | None:
    """Return the device memory of this process by NVML; None where it does not say."""
    import pynvml

    pynvml.nvmlInit()
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
        mine = [one for one in pynvml.nvmlDeviceGetComputeRunningProcesses(handle) if one.pid == os.getpid()]
        return int(mine[0].usedGpuMemory) if mine and mine[0].usedGpuMemory else None
    except pynvml.NVMLError:
        return None
    finally:
        pynvml.nvmlShutdown()


def device_bytes() -> int:
    """Return the bytes that are in use on the whole device, by the driver."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def measure_memory(config: TeacherConfig, shapes: Sequence[Shape], before: int) -> dict[str, Any]:
    """Run every shape on the packed teacher and return what it took; ``before`` is ``device_bytes`` at the start."""
    file_bytes = sum(tensor.packed.nbytes for tensor in make_tensors(config, current_device()).values())
    collect_garbage()
    arm, forward = packed_arm("q4k", config)
    collect_garbage()
    resident = sum(matrix.resident_bytes for matrix in forward.matrices.values()) + sum(forward.vector_bytes.values())
    found: dict[str, Any] = {
        "file_tensor_bytes": file_bytes,
        "resident_weight_bytes": resident,
        "resident_ratio": resident / file_bytes,
        "scratch_bytes": forward.scratch.num_bytes,
        "passes": [],
    }
    for shape in shapes:
        collect_garbage()
        torch.cuda.reset_peak_memory_stats()
        ids = torch.from_numpy(make_ids(shape, config.vocab_size)).to(current_device())
        with torch.no_grad():
            arm.forward(ids)
        torch.cuda.synchronize()
        found["passes"].append(
            {
                "shape": str(shape),
                "torch_peak": torch.cuda.max_memory_allocated(),
                "torch_reserved": torch.cuda.max_memory_reserved(),
                "process_by_nvml": process_bytes(),
                "device_beyond_start": device_bytes() - before,
            }
        )
    arm.close()
    return found


def measure_errors(config: TeacherConfig) -> dict[str, Any]:
    """Return relative errors of both bfloat16 teachers' logits against transformers' in float32, over all positions.

    Experts of nearly equal weight change places when anything is rounded, so some positions differ much: the median
    and the share of positions beyond 0.1 are given.
    """
    device = current_device()
    ids = torch.from_numpy(make_ids(ERROR_SHAPE, config.vocab_size)).to(device)
    reference = twin_arm("float32", build_dense_twin(config, torch.float32))
    with plain_float32(), torch.no_grad():
        exact = reference.logits(ids).cpu()
    reference.close()
    collect_garbage()
    found = {}
    for name in ("q4k", "q4k-float32", "transformers"):
        if name == "transformers":
            arm = twin_arm(name, build_dense_twin(config, torch.bfloat16))
        else:
            arm = packed_arm(name, config, dtype=torch.float32 if name == "q4k-float32" else torch.bfloat16)[0]
        with torch.no_grad():
            error = row_errors(arm.logits(ids).cpu(), exact)
        found[name] = {
            "median": float(error.median()),
            "worst": float(error.max()),
            "beyond_0.1": float((error > 0.1).double().mean()),
        }
        arm.close()
        del arm
        collect_garbage()
    return found


def measure(
    model: Synthetic,
    layers: int,
    shapes: Sequence[Shape],
    rounds: int,
    variants: Mapping[str, dict[str, int]],
    found: dict[str, Any],
    say: Callable[[str], None],
) -> None:
    """Measure everything into ``found``; see the module's docstring.

    ``variants`` are options of ``CudaForward`` by the names of further arms.
    """
    config = model.configure(layers)
    found |= {"environment": environment(), "config": asdict(config)}
    found["ceilings"] = ceilings = {"copy_bytes_per_s": copy_bandwidth(), "bf16_flop_per_s": gemm_rate()}
    copied, multiplied = (value / 1e12 for value in ceilings.values())
    say(f"ceilings: copy {copied:.2f} TB/s, bf16 {multiplied:.0f} TFLOP/s")
    collect_garbage()
    found["memory"] = measure_memory(config, shapes, device_bytes())
    for line in memory_lines(found):
        say(line)
    collect_garbage()
    found["errors"] = measure_errors(model.configure(min(layers, ERROR_LAYERS)))
    for line in error_lines(found):
        say(line)
    arms = [packed_arm("q4k", config)[0], packed_arm("q4k-inline", config, overlap=False)[0]]
    arms += [packed_arm(name, config, **options)[0] for name, options in variants.items()]
    arms.append(twin_arm("transformers", build_dense_twin(config, torch.bfloat16)))
    collect_garbage()
    found["speed"] = []
    for shape in shapes:
        work = work_of(config, shape)
        moved = work["packed_bytes"] + 2 * work["decoded_expert_bytes"]
        compute, move = work["flop"] / ceilings["bf16_flop_per_s"], moved / ceilings["copy_bytes_per_s"]
        say(
            f"{shape}: {work['flop'] / 1e12:.1f} TFLOP {compute * 1e3:.1f} ms, {moved / 1e9:.1f} GB {move * 1e3:.1f} ms"
        )
        ids_BT = make_ids(shape, config.vocab_size)
        found["speed"] += measure_speed(arms, ids_BT, rounds, max(compute, move), say)
    for arm in arms:
        arm.close()
    arms.clear()
    collect_garbage()


def memory_lines(found: dict[str, Any]) -> list[str]:
    """Return what the packed teacher takes, a pass a line."""
    memory = found["memory"]
    lines = [
        f"weights {memory['resident_weight_bytes'] / 1e9:.3f} GB, {memory['resident_ratio']:.4f} of the tensors; "
        f"scratch {memory['scratch_bytes'] / 1e9:.3f} GB"
    ]
    for one in memory["passes"]:
        more = (one["device_beyond_start"] - memory["file_tensor_bytes"]) / 1e9
        lines.append(
            f"{one['shape']:>8}: torch's peak {one['torch_peak'] / 1e9:.3f} GB, reserved "
            f"{one['torch_reserved'] / 1e9:.3f}; device {one['device_beyond_start'] / 1e9:.3f} GB beyond the context, "
            f"tensors + {more:.3f}; process by NVML {one['process_by_nvml']}"
        )
    return lines


def error_lines(found: dict[str, Any]) -> list[str]:
    """Return how far each teacher is from float32, one a line."""
    return [
        f"error of {name:<13} median {error['median']:.2e}, worst {error['worst']:.2e}, "
        f"beyond 0.1 {error['beyond_0.1']:.4f}"
        for name, error in found["errors"].items()
    ]


def parse_shapes(text: str) -> list[Shape]:
    """Return the shapes of ``4x2048,32x2048``.

    Raises:
        ValueError: for another form.
    """
    return [Shape(int(batch), int(length)) for batch, length in (one.split("x") for one in text.split(","))]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything and write ``mixture.json``."""
    parser = argparse.ArgumentParser(
        prog="python -m q4kd.trainer.bench.teacher.mixture", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for mixture.json")
    parser.add_argument("--model", choices=MODELS, default=next(iter(MODELS)))
    parser.add_argument("--layers", type=int, help="of the model's first layers (default: all)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--shapes", type=parse_shapes, default=list(DEFAULT_SHAPES), metavar="BxT,…")
    parser.add_argument("--slabs", type=int, nargs="*", default=[], metavar="MB", help="other sizes of the scratch")
    parser.add_argument("--rows", type=int, nargs="*", default=[], metavar="N", help="other bounds of the rows held")
    options = parser.parse_args(arguments)
    variants = {f"q4k-slabs-{size}": {"slab_bytes": size * 10**6} for size in options.slabs}
    variants |= {f"q4k-rows-{rows}": {"expert_rows": rows} for rows in options.rows}
    options.out.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    model = MODELS[options.model]
    layers = options.layers or model.layers
    try:
        measure(model, layers, options.shapes, options.rounds, variants, found, lambda line: print(line, flush=True))
    finally:
        write_json(options.out / "mixture.json", found)
    print("\n".join(["", *memory_lines(found), *error_lines(found), *map(speed_line, found["speed"])]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
