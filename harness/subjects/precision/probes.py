"""Measurements of rounding: the logits of a dense model beside the packed teacher, and products on the device."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from q4kd.harness.inputs.arrays import Arrays, read_array, read_arrays, save_array, save_arrays
from q4kd.harness.runs.probes import probe

if TYPE_CHECKING:
    from torch import Tensor

    from q4kd.trainer.kernels.teacher_kernels import Kernels

FUSED_TOKENS = (1, 5, 16)
# How passes differ: sequences in a pass, first positions of each that are computed, threads. The first is held against
# all others.
TOGETHER, HEAD, ALL = 6, 33, 64
WAYS = {
    "alone": (1, ALL, 1),
    "in-threes": (3, ALL, 1),
    "together": (TOGETHER, ALL, 1),
    "many-threads": (3, ALL, 16),
    "first-positions": (1, HEAD, 1),
    "first-of-many": (TOGETHER, HEAD, 16),
}


@probe("dense-logits")
def dense_logits(model: Path, ids: Path, out: Path, device: Literal["cpu", "cuda"]) -> None:
    """Compute bfloat16 logits of a qwen2 GGUF by transformers, its weights decoded by gguf and held dense.

    Nothing of the trainer but names takes part: this is what a user of another engine gets from the same file.
    """
    import torch

    dense = build_dense(model).to(device)
    ids_ST = torch.from_numpy(read_array(ids)).long().to(device)
    with torch.no_grad():
        logits = torch.cat([dense(input_ids=part, use_cache=False).logits.float() for part in torch.split(ids_ST, 8)])
    save_array(out, logits.cpu().numpy())


def build_dense(path: Path) -> Any:
    """Return the ``Qwen2ForCausalLM`` of a qwen2 GGUF: every weight decoded by gguf, rounded once to bfloat16."""
    import gguf
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from q4kd.trainer.formats.tensor_names import gguf_name

    reader = gguf.GGUFReader(path)

    def value(key: str) -> Any:
        return reader.fields[f"qwen2.{key}"].contents()

    weights = {
        tensor.name: gguf.quants.dequantize(np.asarray(tensor.data), tensor.tensor_type) for tensor in reader.tensors
    }
    config = Qwen2Config(
        vocab_size=len(weights["token_embd.weight"]),
        hidden_size=value("embedding_length"),
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=value("attention.head_count"),
        num_key_value_heads=value("attention.head_count_kv"),
        max_position_embeddings=value("context_length"),
        rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": float(value("rope.freq_base"))},
        tie_word_embeddings="output.weight" not in weights,
    )
    config.rope_theta = float(value("rope.freq_base"))  # where transformers 4 looks for it
    model: Any = Qwen2ForCausalLM(config)
    model.to(torch.bfloat16)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(torch.from_numpy(weights[gguf_name(name)].copy()).view(weight.shape))
    return model.eval()


@probe("passes")
def passes(model: Path, ids: Path, out: Path) -> None:
    """Compute logits of the same sequences on the CPU in passes of several sizes, in both dtypes.

    ``ids`` are int64 ``[S, T]``. Writes ``<dtype>-<way>``, float32 ``[S, T or HEAD, V / 16]`` of every sixteenth logit,
    for the ways of ``WAYS``.
    """
    import torch

    from q4kd.trainer.device.placement import place_teacher
    from q4kd.trainer.events import EventLog
    from q4kd.trainer.teacher.teacher import load_teacher

    ids_ST = torch.from_numpy(read_array(ids)).long()
    results: Arrays = {}
    for dtype in ("float32", "bfloat16"):
        teacher = load_teacher(place_teacher(model, backend="q4k", dtype=dtype), events=EventLog(None))
        for way, (sequences, positions, threads) in WAYS.items():
            torch.set_num_threads(threads)
            parts = torch.split(ids_ST[:, :positions], sequences)
            results[f"{dtype}-{way}"] = torch.cat([teacher.logits(part)[..., ::16] for part in parts]).numpy()
    save_arrays(out, results)


@probe("cuda-products")
def cuda_products(operands: Path, out: Path) -> None:
    """Multiply packed matrices on the device in each way that a forward pass does; outputs are poisoned with NaN first.

    Every array ``<type>-<rows>`` of the input, uint8 ``[R, row_bytes]``, is multiplied by ``x-<cols>``, bfloat16 as
    uint16 ``[M, K]``: ``fused`` takes the first 1, 5 and 16 tokens from the packed blocks, stacked to ``[22, R]``;
    ``decoded`` takes the tokens after the 16th from a bfloat16 scratch.
    """
    from q4kd.trainer.kernels.teacher_kernels import Kernels

    save_arrays(out, multiply_all(Kernels("cuda"), read_arrays(operands)))


def multiply_all(kernels: "Kernels", operands: Arrays) -> Arrays:
    """Return ``<name>-fused`` and ``<name>-decoded``, float32, for every packed array (see ``cuda_products``)."""
    import torch

    from q4kd.trainer.formats.blocks.layout import FORMATS
    from q4kd.trainer.kernels.numerics import multiply, pinned_numerics
    from q4kd.trainer.kernels.teacher_kernels import Q6_K_SOA

    results: Arrays = {}
    for name in [name for name in operands if not name.startswith("x-")]:
        type_name = name.partition("-")[0].upper()
        form, packed = FORMATS[type_name], torch.from_numpy(operands[name]).to(kernels.device)
        rows, cols = len(packed), packed.shape[1] // form.block_bytes * form.block_size
        bits = torch.from_numpy(operands[f"x-{cols}"].view(np.int16))
        x_MK = bits.view(torch.bfloat16).to(kernels.device)
        layout = type_name
        if type_name == "Q6_K":
            layout, packed = Q6_K_SOA, kernels.repack_q6_k(packed)

        def poisoned(tokens: int, rows: int = rows) -> "Tensor":
            return torch.full((tokens, rows), torch.nan, dtype=torch.float32, device=kernels.device)

        fused = []
        for tokens in FUSED_TOKENS:
            out = poisoned(tokens)
            kernels.matvec(layout, packed, x_MK[:tokens].contiguous(), rows, out)
            fused.append(out.cpu())
        results[f"{name}-fused"] = torch.cat(fused).numpy()
        weight_RK = torch.full((rows, cols), torch.nan, dtype=torch.bfloat16, device=kernels.device)
        kernels.decode(layout, packed, 0, rows, cols, weight_RK)
        many = x_MK[FUSED_TOKENS[-1] :]
        out = poisoned(len(many))
        with pinned_numerics():
            multiply(many, weight_RK, out)
        results[f"{name}-decoded"] = out.cpu().numpy()
    return results
