"""A measurement of what ``q4kd export`` writes: each form made by the command, then run by the programs it is for."""

import contextlib
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from q4kd.harness.inputs.arrays import Array, Arrays, read_array, save_arrays
from q4kd.harness.runs.probes import probe
from q4kd.trainer.files import write_json

if TYPE_CHECKING:
    from torch import Tensor

FORMS = ("f16", "q8_0", "q4_k_m")
# 32,768 normal weights lose this much at most; without a search of scales they lose 3 to 23 % more.
LOW_LIMITS = {"Q2_K": 0.2675, "Q3_K": 0.1456, "Q5_0": 0.0408, "Q4_0": 0.0825, "IQ4_NL": 0.0742, "IQ4_XS": 0.0748}


@probe("exported-models")
def exported_models(run: Path, pieces: Path, own_head: Path, ids: Path, text: Path, out: Path, facts: Path) -> int:
    """Export a run in every form, a SentencePiece model, and one with a head of its own beside a config that ties it.

    Records logits, and ids that a GGUF's tokenizer gives.
    """
    import torch

    from q4kd.harness.__main__ import main
    from q4kd.trainer.device.placement import place_teacher
    from q4kd.trainer.events import EventLog
    from q4kd.trainer.formats.gguf.tokenizer import read_tokenizer
    from q4kd.trainer.formats.open import open_model
    from q4kd.trainer.teacher.teacher import load_teacher

    ids_1T = torch.from_numpy(read_array(ids)).long().unsqueeze(0)
    codes = {"hf": main(["export", str(run), "--format", "hf", "--out", "hf"])}
    for form in FORMS:
        codes[form] = main(["export", str(run), "--format", "gguf", "--quantize", form, "--out", f"{form}.gguf"])
    codes["pieces"] = main(["export", str(pieces), "--format", "gguf", "--quantize", "f16", "--out", "pieces.gguf"])
    codes["own head"] = main(["export", str(own_head), "--format", "gguf", "--quantize", "f32", "--out", "head.gguf"])
    with Path("inspect.json").open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        codes["inspect"] = main(["inspect", "q4_k_m.gguf", "--json"])
    write_json(facts, {"exit_codes": codes, "tables": {"recipe": _recipe()}})
    if any(codes.values()):
        return max(codes.values())
    arrays: Arrays = {"run": _logits(run / "model", ids_1T), "hf": _logits(Path("hf"), ids_1T)}
    arrays["own head"] = _logits(own_head, ids_1T)
    for form in FORMS:
        teacher = load_teacher(place_teacher(Path(f"{form}.gguf"), dtype="float32"), events=EventLog(None))
        arrays[form] = teacher.logits(ids_1T)[0].numpy()
    tokenizer = read_tokenizer(open_model(Path("f16.gguf")))
    arrays["ids"] = np.array(tokenizer.encode(text.read_text(encoding="utf-8")).ids)
    save_arrays(out, arrays)
    return 0


def _recipe() -> dict[str, str | bool]:
    """Return which layers mixtures store with more bits, and whether normal weights are rounded as well as can be.

    The gguf package decodes. A quantiser that searches no scale is 4 to 11 % worse (tests/trainer/formats/blocks).
    """
    from gguf import GGMLQuantizationType, quants

    from q4kd.trainer.formats.blocks.quantize import quantize
    from q4kd.trainer.formats.gguf.recipes import Mixture, tensor_type, uses_more_bits

    found: dict[str, str | bool] = {
        f"{layers} layers": " ".join(str(layer) for layer in range(layers) if uses_more_bits(layer, layers))
        for layers in (24, 32)
    }
    weights = np.random.default_rng(21).standard_normal((32, 4096)).astype(np.float32)

    def error(name: str, some: Array, importance: Array | None = None, step: int = 1) -> float:
        stored = quantize(some, name) if importance is None else quantize(some, name, importance)
        decoded = quants.dequantize(stored, GGMLQuantizationType[name]).reshape(some.shape)
        return float(np.linalg.norm((decoded - some)[:, ::step]) / np.linalg.norm(some[:, ::step]))

    for name, limit in (("Q4_K", 0.0700), ("Q5_K", 0.03451), ("Q6_K", 0.01697)):
        found[f"{name} within {limit:.3%}"] = 0 < error(name, weights) <= limit
    some = np.ascontiguousarray(weights[:, :1024])
    for name, limit in LOW_LIMITS.items():
        found[f"{name} within {limit:.2%}"] = 0 < error(name, some) <= limit
    importance = np.ones(1024, np.float32)
    importance[::8] = 100
    for name in ("Q3_K", "Q4_K"):
        found[f"{name} by importance"] = error(name, some, importance, 8) < 0.8 * error(name, some, None, 8)
    for recipe in ("q3_k_m", "q4_k_s", "q5_k_m"):
        for part in ("attn_v", "ffn_down", "attn_output"):
            kinds = [tensor_type(f"blk.{at}.{part}.weight", (256, 256), Mixture(recipe, 32, False)) for at in range(32)]
            found[f"{recipe} {part}"] = ", ".join(f"{len(list(run))} {kind}" for kind, run in itertools.groupby(kinds))
    return found


def _logits(folder: Path, ids_1T: "Tensor") -> Array:
    """Return the logits of transformers, float32 ``[T, V]``, as a user would load the folder."""
    import torch
    from transformers import AutoModelForCausalLM

    load: Any = AutoModelForCausalLM.from_pretrained
    model = load(folder, use_safetensors=True, local_files_only=True).eval()
    with torch.no_grad():
        logits_TV: Tensor = model(ids_1T).logits[0]
    return logits_TV.float().numpy()
