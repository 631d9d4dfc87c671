"""The CUDA teacher against dense models of the same weights, in one process and one run.

    python -m q4kd.trainer.bench.teacher.cuda --out DIR [--layers 28] [--rounds 15] [--skip load]

makes Qwen2.5-7B's shapes on the device (``bench/synthetic_7b.py``) and measures, in this order: the device's ceilings;
rounding error of each arm against float32; speed, arms interleaved; utilisation and copies to the host; load and
memory in processes of their own (``bench/load.py``). Numbers go to ``DIR/cuda.json``; a table is printed last.

Arms: ``q4k`` as it is by default (graphs for short passes, decoding ahead for long ones), ``q4k-eager`` without graphs,
``q4k-inline`` never decoding ahead, ``q4k-slabs`` with gate and up apart, 136 MB each; ``dense-q4kd`` is this forward
pass, graphs included, over weights decoded once; ``dense-transformers`` is Qwen2ForCausalLM in bfloat16 with SDPA,
holding the same weights; ``bnb-nf4`` is that model with 4-bit linear layers, where bitsandbytes is installed.
"""

import argparse
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from q4kd.trainer.bench.device_probes import (
    collect_garbage,
    copy_bandwidth,
    current_device,
    gemm_rate,
    host_copies,
    seconds_of,
    utilisation,
)
from q4kd.trainer.bench.interleave import Ids, Ratio, Shape, compare, interleave, make_ids
from q4kd.trainer.bench.synthetic_7b import make_tensors, qwen2_5_7b, tensor_types
from q4kd.trainer.bench.teacher.cuda_errors import compare_errors, make_probe, plain_float32, probe_errors, probe_logits
from q4kd.trainer.bench.teacher.cuda_table import error_lines, speed_line, speed_row, table
from q4kd.trainer.bench.teacher.dense_twin import build_twin, to_nf4
from q4kd.trainer.files import write_json
from q4kd.trainer.formats.architecture import TeacherConfig
from q4kd.trainer.formats.blocks.layout import block_format
from q4kd.trainer.formats.tensor_shapes import expected_shapes
from q4kd.trainer.kernels.teacher_kernels import Kernels
from q4kd.trainer.teacher.cuda.forward import CudaForward

SHAPES = (Shape(1, 256), Shape(4, 256), Shape(32, 256))
HEAD_TOKENS = 1024
SMALL_SLAB_BYTES = 136_000_000
ERROR_ARMS = ("q4k", "dense-q4kd", "dense-transformers")


class CudaArm:
    """One engine on the device; ``interleave.Arm``.

    Args:
        name: name in the table.
        hidden: int64 ids ``[B, T]`` on the device to final hidden states ``[B, T, H]``.
        head: hidden states ``[m, H]`` to logits ``[m, V]``.
        with_head: whether ``run`` makes the logits of every position, ``HEAD_TOKENS`` at a time.
    """

    def __init__(
        self, name: str, hidden: Callable[[Tensor], Tensor], head: Callable[[Tensor], Tensor], *, with_head: bool = True
    ) -> None:
        self.name, self.hidden, self.head, self.with_head = name, hidden, head, with_head

    def prepare(self) -> dict[str, Any]:
        """Return what is known of the engine, which was loaded before."""
        return {"name": self.name, "with_head": self.with_head}

    def forward(self, ids_BT: Tensor) -> None:
        """Run one pass; logits are dropped chunk by chunk, as a loss would."""
        hidden_MH = self.hidden(ids_BT).flatten(0, 1)
        if self.with_head:
            for chunk_MH in torch.split(hidden_MH, HEAD_TOKENS):
                self.head(chunk_MH)

    def logits(self, ids_BT: Tensor) -> Tensor:
        """Return float32 logits ``[B * T, V]``."""
        parts = torch.split(self.hidden(ids_BT).flatten(0, 1), HEAD_TOKENS)
        return torch.cat([self.head(part).float() for part in parts])

    def run(self, ids_BT: Ids, save: Path | None = None) -> float:
        """Return the seconds of one pass between CUDA events; the ids are on the device before the clock starts."""
        ids = torch.from_numpy(ids_BT).cuda()
        with torch.no_grad():
            taken = seconds_of(lambda: self.forward(ids))
            if save is not None:
                import numpy as np

                np.save(save, self.logits(ids).view(*ids.shape, -1).cpu().numpy(), allow_pickle=False)
        return taken

    def without_head(self) -> "CudaArm":
        """Return the same engine, timed without its head."""
        return CudaArm(self.name, self.hidden, self.head, with_head=False)

    def close(self) -> None:
        """Drop the engine."""
        del self.hidden, self.head


def packed_arm(name: str, config: TeacherConfig, backend: str, **options: Any) -> CudaArm:
    """Return this project's teacher over freshly made, always equal weights; ``options`` are ``CudaForward``'s."""
    device = current_device()
    forward = CudaForward(config, make_tensors(config, device), backend, Kernels(device), **options)
    return CudaArm(name, forward.hidden, forward.head_logits)


def twin_arm(name: str, model: Any) -> CudaArm:
    """Return a transformers model as an arm."""
    return CudaArm(name, lambda ids: model.model(input_ids=ids, use_cache=False).last_hidden_state, model.lm_head)


def floor_seconds(config: TeacherConfig, shape: Shape, *, with_head: bool, rate: float, bandwidth: float) -> float:
    """Return the least time of one packed pass: its operations at ``rate``, or its packed bytes at ``bandwidth``."""
    weights, packed_bytes, types = 0, 0, tensor_types(config)
    for name, dims in expected_shapes(config).items():
        if len(dims) == 2 and name != "token_embd.weight" and (with_head or name != "output.weight"):
            weights += dims[0] * dims[1]
            packed_bytes += dims[0] * block_format(types[name]).row_bytes(dims[1])
    # A causal pass takes half of 4 T^2 N D.
    attention = 2 * config.num_layers * config.q_size * shape.batch * shape.length**2
    return max((2 * weights * shape.tokens + attention) / rate, packed_bytes / bandwidth)


def measure(config: TeacherConfig, rounds: int, found: dict[str, Any], say: Callable[[str], None]) -> None:
    """Measure everything that needs only this process into ``found``; see the module's docstring."""
    device = current_device()
    found |= {"environment": environment(), "config": asdict(config)}
    found["ceilings"] = ceilings = {"copy_bytes_per_s": copy_bandwidth(), "bf16_flop_per_s": gemm_rate()}
    copied, multiplied = (value / 1e12 for value in ceilings.values())
    say(f"ceilings: copy {copied:.2f} TB/s, bf16 {multiplied:.0f} TFLOP/s")
    collect_garbage()
    ids_ST, columns = make_probe(config, device)
    reference = twin_arm("float32", build_twin(config, make_tensors(config, device), torch.float32))
    with plain_float32():
        exact = [part.cpu() for part in probe_logits(reference.logits, ids_ST, columns)]
    reference.close()
    collect_garbage()
    say("reference: float32 logits made")
    arms = [
        packed_arm("q4k", config, "q4k"),
        packed_arm("q4k-eager", config, "q4k", graphs=False),
        packed_arm("q4k-inline", config, "q4k", overlap=False),
        packed_arm("q4k-slabs", config, "q4k", scratch_bytes=SMALL_SLAB_BYTES),
        packed_arm("dense-q4kd", config, "dense"),
        twin_arm("dense-transformers", build_twin(config, make_tensors(config, device), torch.bfloat16)),
    ]
    collect_garbage()
    errors = {arm.name: probe_errors(arm.logits, ids_ST, columns, exact) for arm in arms if arm.name in ERROR_ARMS}
    del exact
    found["errors"] = compare_errors(errors, "dense-transformers")
    for line in error_lines(found):
        say(line)
    found["bnb-nf4"] = add_nf4(arms, config, device)
    found["speed"] = []
    for shape in SHAPES:
        for with_head in (False, True):
            rate, bandwidth = ceilings["bf16_flop_per_s"], ceilings["copy_bytes_per_s"]
            floor = floor_seconds(config, shape, with_head=with_head, rate=rate, bandwidth=bandwidth)
            ids_BT = make_ids(shape, config.vocab_size)
            # The list has no name here: its copies of the arms would keep their memory after they are closed.
            found["speed"] += measure_speed(
                [arm if with_head else arm.without_head() for arm in arms], ids_BT, rounds, floor, say
            )
    busiest = torch.from_numpy(make_ids(SHAPES[-1], config.vocab_size)).to(device)
    with torch.no_grad():
        found["utilisation"] = utilisation(lambda: arms[0].forward(busiest))
        found["host_copies"] = host_copies(lambda: arms[0].forward(busiest))
    for arm in arms:
        arm.close()
    arms.clear()
    collect_garbage()


def add_nf4(arms: list[CudaArm], config: TeacherConfig, device: torch.device) -> str:
    """Add the bitsandbytes arm where it runs; return what was done."""
    try:
        model = build_twin(config, make_tensors(config, device), torch.bfloat16)
        to_nf4(model)
        arm = twin_arm("bnb-nf4", model)
        arm.run(make_ids(SHAPES[0], config.vocab_size))
    except Exception as error:  # It is another project's engine: whatever stops it is a result, not our failure.
        return f"not run: {type(error).__name__}: {str(error)[:300]}"
    finally:
        collect_garbage()
    arms.append(arm)
    return "run"


def measure_speed(
    arms: Sequence[CudaArm], ids_BT: Ids, rounds: int, floor: float, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Time every arm on the same ids, turn by turn; a row per arm, ratios against the first, ``floor`` in seconds."""
    for _ in range(3):  # A shape's first pass allocates, its second captures, its third replays.
        for arm in arms:
            arm.run(ids_BT)
    series = interleave(arms, ids_BT, rounds)
    ratios: list[Ratio | None] = [None, *compare(series)]
    rows = [speed_row(one, ratio, floor, arms[0].with_head) for one, ratio in zip(series, ratios, strict=True)]
    for row in rows:
        say(speed_line(row))
    return rows


def environment() -> dict[str, str]:
    """Return the versions and the device that the numbers belong to."""
    import transformers

    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run everything and write ``cuda.json``."""
    parser = argparse.ArgumentParser(
        prog="python -m q4kd.trainer.bench.teacher.cuda", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for cuda.json and load.json")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--skip", choices=("load",), help="leave out the processes of bench/load.py")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    config = qwen2_5_7b(options.layers)
    found: dict[str, Any] = {}
    try:
        measure(config, options.rounds, found, lambda line: print(line, flush=True))
    finally:
        write_json(options.out / "cuda.json", found)
    lines = table(found)
    if options.skip != "load":
        from q4kd.trainer.bench.load import measure_load

        lines += measure_load(config, options.out, lambda line: print(line, flush=True))
    print("\n".join(["", *lines]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
