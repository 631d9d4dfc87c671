"""A measurement of the teacher's gated delta rule by itself."""

from pathlib import Path

from q4kd.harness.inputs.arrays import Arrays, read_arrays, save_arrays
from q4kd.harness.runs.probes import probe

# For how many chunks the systems are solved at once: one as the CPU does, several as a GPU does.
AT_ONCE = (1, 3)


@probe("delta-rule")
def delta_rule(given: Path, out: Path) -> None:
    """Read states of ``<case>-q``, ``-k [B, T, K, D]``, ``-v [B, T, V, D]``, ``-decay``, ``-strength [B, T, V]``.

    ``<case>-starts [B, T]`` is given where a sequence holds several documents. Written are ``<case>-<chunks at once>``,
    float32 ``[B, T, V * D]``.
    """
    import torch

    from q4kd.trainer.teacher.delta_rule import delta_rule as read
    from q4kd.trainer.teacher.delta_rule import unit_heads

    arrays = {name: torch.from_numpy(array) for name, array in read_arrays(given).items()}
    results: Arrays = {}
    for case in [name.removesuffix("-q") for name in arrays if name.endswith("-q")]:
        q, k, v, decay, strength = (arrays[f"{case}-{part}"] for part in ("q", "k", "v", "decay", "strength"))
        for count in AT_ONCE:
            heads = unit_heads(q), unit_heads(k), v
            found = read(*heads, decay, strength, arrays.get(f"{case}-starts"), chunks_at_once=count)
            results[f"{case}-{count}"] = found.flatten(2).numpy()
    save_arrays(out, results)
