"""Makes the demo teacher that ships with the package, from nothing but this interpreter's standard library.

    python -m q4kd.trainer.demo.make_teacher --out DIR [--minutes N | --steps N]

Two stages: ``train`` leaves a float32 checkpoint in ``--checkpoint`` (default ``OUT/float``, not shipped); ``package``
reads it and writes teacher-q4_k_m.gguf, student/, golden.npz and demo.json into ``--out``.
"""

import argparse
import io
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers import __version__ as tokenizers_version
from transformers import Qwen2ForCausalLM

from q4kd.trainer.demo import data_path
from q4kd.trainer.demo.corpus import END_OF_TEXT, read_texts, token_bytes, token_stream, windows
from q4kd.trainer.demo.train import CONTEXT, held_out_loss, student_config, train
from q4kd.trainer.files import read_json, sha256_file, write_atomic, write_json
from q4kd.trainer.formats.gguf.writer import write_gguf

TEACHER = "teacher-q4_k_m.gguf"
NAME = "q4kd demo teacher"
GOLDEN_TOKENS = 64


def package(checkpoint: Path, out: Path, corpus: Path, *, eval_windows: int) -> dict[str, Any]:
    """Quantise a trained checkpoint and write every shipped file; return the card (demo.json)."""
    out.mkdir(parents=True, exist_ok=True)
    model = Qwen2ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    tokenizer_json = read_json(checkpoint / "tokenizer.json")
    held_out = token_stream(tokenizer, read_texts(corpus, held_out=True))
    eval_NT = windows(held_out, CONTEXT, eval_windows)
    sizes_V = token_bytes(tokenizer)
    before = held_out_loss(model, eval_NT, sizes_V)

    teacher = out / TEACHER
    state = model.state_dict()
    write_gguf(teacher, config=model.config, state=state, tokenizer=tokenizer_json, recipe="q4_k_m", name=NAME)
    errors = _errors_by_type(teacher, state)
    _load_dequantised(model, teacher)
    after = held_out_loss(model, eval_NT, sizes_V)

    _write_student(out / "student", tokenizer)
    _write_golden(out / "golden.npz", model, eval_NT[len(eval_NT) // 2, :GOLDEN_TOKENS])
    card = {
        "schema": "q4kd-demo/1",
        "name": NAME,
        "teacher_file": TEACHER,
        "teacher_bytes": teacher.stat().st_size,
        "teacher_sha256": sha256_file(teacher),
        "data": "the Python standard library's source; files held out by q4kd.trainer.data.documents.is_held_out",
        "training": read_json(checkpoint / "training.json"),
        "held_out": {"context": CONTEXT, "windows": len(eval_NT), "float32": before, "q4_k_m": after},
        "round_trip_error": errors,
        "golden": "transformers in float64 over gguf.quants.dequantize of teacher_file",
        "versions": {
            "gguf": version("gguf"),
            "numpy": np.__version__,
            "tokenizers": tokenizers_version,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    write_json(out / "demo.json", card)
    return card


def _huggingface_name(name: str) -> str:
    """Translate a qwen2 GGUF tensor name, by gguf's own table, to the state dict's."""
    mapping = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, 64).mapping
    stem, _dot, suffix = name.rpartition(".")
    for source, (_kind, target) in mapping.items():
        if target == stem and source.startswith(("model.layers.", "model.embed_tokens", "model.norm", "lm_head")):
            return f"{source}.{suffix}"
    raise KeyError(name)


def _load_dequantised(model: Qwen2ForCausalLM, path: Path) -> None:
    """Replace the model's weights with those of a GGUF, decoded by the gguf package."""
    state = {
        _huggingface_name(tensor.name): torch.from_numpy(
            gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        )
        for tensor in gguf.GGUFReader(path).tensors
    }
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise KeyError(f"missing {missing}, unexpected {unexpected}")


def _errors_by_type(path: Path, state: dict[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    """Return each type's worst and mean relative Frobenius error ``||w - stored|| / ||w||`` over its tensors."""
    found: dict[str, list[float]] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        weights = state[_huggingface_name(tensor.name)].numpy()
        decoded = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        error = float(np.linalg.norm(decoded - weights)) / max(float(np.linalg.norm(weights)), 1e-30)
        found.setdefault(tensor.tensor_type.name, []).append(error)
    return {
        kind: {"tensors": len(errors), "worst": max(errors), "mean": sum(errors) / len(errors)}
        for kind, errors in sorted(found.items())
    }


def _write_student(folder: Path, tokenizer: Tokenizer) -> None:
    """Write a student folder without weights: config.json, tokenizer.json, tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads(student_config().to_json_string())
    config |= {"architectures": ["Qwen2ForCausalLM"], "dtype": "float32"}
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]  # transformers 4 looks for it there.
    write_json(folder / "config.json", config)
    write_atomic(folder / "tokenizer.json", tokenizer.to_str(pretty=True).encode())
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 512,
        },
    )


def _write_golden(path: Path, dequantised: Qwen2ForCausalLM, ids_T: npt.NDArray[np.int32]) -> None:
    """Write ids int32 [T] and logits float32 [T, vocab] of transformers in float64: no code of this package."""
    with torch.no_grad():
        logits = dequantised.double()(torch.from_numpy(ids_T).long()[None]).logits[0].float().numpy()
    buffer = io.BytesIO()
    np.savez_compressed(buffer, ids=ids_T.astype(np.int32), logits=logits)
    write_atomic(path, buffer.getvalue())


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line, train unless ``--stage package``, package, and print the held-out losses."""
    parser = argparse.ArgumentParser(prog="python -m q4kd.trainer.demo.make_teacher", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the shipped files")
    parser.add_argument("--checkpoint", type=Path, help="folder of the float32 checkpoint (default OUT/float)")
    parser.add_argument("--stage", choices=("all", "train", "package"), default="all")
    parser.add_argument("--corpus", type=Path, default=data_path())
    parser.add_argument("--minutes", type=float, default=40.0, help="train by the clock (default 40)")
    parser.add_argument("--steps", type=int, help="train by steps instead, reproducibly")
    parser.add_argument("--batch", type=int, default=8, help="windows of 256 tokens a step (default 8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--eval-windows", type=int, default=512, help="held-out windows evaluated (default 512)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    checkpoint = options.checkpoint or options.out / "float"
    if options.stage != "package":
        schedule = {name: getattr(options, name) for name in ("steps", "minutes", "batch", "seed")}
        train(checkpoint, options.corpus, **schedule)
    if options.stage != "train":
        card = package(checkpoint, options.out, options.corpus, eval_windows=options.eval_windows)
        for stage in ("float32", "q4_k_m"):
            loss = card["held_out"][stage]
            print(f"held out, {stage}: {loss['nats_per_token']:.4f} nats/token, {loss['bits_per_byte']:.4f} bits/byte")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
