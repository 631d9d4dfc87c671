"""A measurement of what ``q4kd export`` writes: each form made by the command, then run by the programs it is for."""

import argparse
import io
from pathlib import Path
from typing import Any

import numpy as np

from q4kd.trainer.files import write_atomic, write_json

FORMS = ("f16", "q8_0", "q4_k_m")


def exported_models(arguments: list[str]) -> int:
    """Export a run in every form, and record the logits of each, and the ids that the GGUF's tokenizer gives."""
    parser = argparse.ArgumentParser()
    for option in ("--run", "--ids", "--text", "--out", "--facts"):
        parser.add_argument(option, type=Path, required=True)
    args = parser.parse_args(arguments)

    import torch

    from q4kd.harness.__main__ import main
    from q4kd.trainer.events import EventLog
    from q4kd.trainer.gguf_tokenizer import read_tokenizer
    from q4kd.trainer.model_open import open_model
    from q4kd.trainer.placement import place_teacher
    from q4kd.trainer.teacher import load_teacher

    ids = torch.from_numpy(np.load(args.ids, allow_pickle=False)).long().unsqueeze(0)
    codes = {"hf": main(["export", str(args.run), "--format", "hf", "--out", "hf"])}
    for form in FORMS:
        codes[form] = main(["export", str(args.run), "--format", "gguf", "--quantize", form, "--out", f"{form}.gguf"])
    write_json(args.facts, {"exit_codes": codes})
    if any(codes.values()):
        return max(codes.values())
    arrays: dict[str, Any] = {"run": _logits(args.run / "model", ids), "hf": _logits(Path("hf"), ids)}
    for form in FORMS:
        teacher = load_teacher(place_teacher(Path(f"{form}.gguf"), dtype="float32"), events=EventLog(None))
        arrays[form] = teacher.logits(ids)[0].numpy()
    text = args.text.read_text(encoding="utf-8")
    arrays["ids"] = np.array(read_tokenizer(open_model(Path("f16.gguf"))).encode(text).ids)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomic(args.out, buffer.getvalue())
    return 0


def _logits(folder: Path, ids: Any) -> Any:
    """Return the logits of transformers, float32 ``[T, V]``, as a user would load the folder."""
    import torch
    from transformers import AutoModelForCausalLM

    load: Any = AutoModelForCausalLM.from_pretrained
    model = load(folder, use_safetensors=True, local_files_only=True).eval()
    with torch.no_grad():
        return model(ids).logits[0].float().numpy()
