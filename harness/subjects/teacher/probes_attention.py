"""A measurement of the CPU's attention by itself, in every way that it is computed."""

from pathlib import Path

from q4kd.harness.inputs.arrays import Arrays, read_arrays, save_arrays
from q4kd.harness.runs.probes import probe

# "chosen" is the way that this processor takes: by blocks where it has AVX-512, and the text is long.
WAYS = ("blocked", "whole", "chosen")


@probe("attention")
def attention(given: Path, out: Path) -> None:
    """Attend over ``<case>-q [B, N, T, D]``, ``-k`` and ``-v [B, K, T, D]``, with ``-starts [B, T]`` where given.

    Written are ``<case>-<way>``, float32 ``[B, T, N * D]``.
    """
    import torch

    from q4kd.trainer.kernels.attention import blocked_attention, causal_attention, whole_attention

    arrays = {name: torch.from_numpy(array) for name, array in read_arrays(given).items()}
    ways = dict(zip(WAYS, (blocked_attention, whole_attention, causal_attention), strict=True))
    results: Arrays = {}
    for case in [name.removesuffix("-q") for name in arrays if name.endswith("-q")]:
        q, k, v = (arrays[f"{case}-{part}"] for part in "qkv")
        for way, attend in ways.items():
            results[f"{case}-{way}"] = attend(q, k, v, arrays.get(f"{case}-starts")).flatten(2).numpy()
    save_arrays(out, results)
