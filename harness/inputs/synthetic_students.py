"""Teachers and students that differ in one stated way: padded or exchanged vocabularies, students that are teachers.

All are made from the demo teacher and the demo student, so that what a run does with them is known beforehand.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import gguf
import numpy as np
from numpy.typing import NDArray

from q4kd.harness.inputs.models.apr_write import huggingface_name
from q4kd.trainer.files import read_json

TOKENS_KEY = "tokenizer.ggml.tokens"
_TOKEN_KEYS = {TOKENS_KEY: "[PAD {}]", "tokenizer.ggml.token_type": 5, "tokenizer.ggml.scores": 0.0}
# In these weights the first axis runs over the hidden units, in the others the last one.
_HIDDEN_IS_ROW = ("attn_output", "ffn_down", "attn_norm", "ffn_norm", "output_norm")
Twin = Literal["exact", "permuted", "noisy"]
# Share of a weight's own spread. K-quants lose as much, so that the two are the same model to any user.
NOISE = 0.1


def read_tokens(path: Path) -> list[str]:
    """Return the token strings of a GGUF by id."""
    return [str(token) for token in gguf.GGUFReader(path).fields[TOKENS_KEY].contents()]


def write_padded_teacher(
    path: Path,
    source: Path,
    rows: int,
    *,
    exchanged: tuple[int, int] | None = None,
    tokens: Sequence[str] | None = None,
) -> None:
    """Write a GGUF with the same weights and ``rows`` rows of embedding and tied head; the new ones repeat the old.

    A repeated row has the logit of a real token, so a softmax that takes padding in is visibly another.

    Args:
        path: file to write.
        source: GGUF with a tied head and at most ``rows`` tokens.
        rows: tokens and rows of the new file.
        exchanged: two ids whose token strings change places.
        tokens: the first token strings, for a source that has none.
    """
    reader = gguf.GGUFReader(source)
    architecture = str(reader.fields["general.architecture"].contents())
    writer = gguf.GGUFWriter(path, architecture)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value: Any = field.contents()
        if name in _TOKEN_KEYS:
            filler = _TOKEN_KEYS[name]
            missing = range(len(value), rows)
            value = [*value, *(filler.format(index) if isinstance(filler, str) else filler for index in missing)]
        if name == TOKENS_KEY and exchanged is not None:
            first, second = exchanged
            value[first], value[second] = value[second], value[first]
        writer.add_key_value(name, value, field.types[0], field.types[-1] if len(field.types) > 1 else None)
    if tokens is not None:
        filler = str(_TOKEN_KEYS[TOKENS_KEY])
        writer.add_token_list([*tokens, *(filler.format(index) for index in range(len(tokens), rows))])
    for tensor in reader.tensors:
        data = tensor.data
        if tensor.name == "token_embd.weight" and len(data) != rows:
            data = data[np.arange(rows) % len(data)]
        writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def student_shape(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int) -> dict[str, object]:
    """Return what the config of a qwen2 student of that shape says of it."""
    sizes = {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers}
    attention = {"num_attention_heads": heads, "num_key_value_heads": kv_heads}
    return {**sizes, **attention, "layer_types": ["full_attention"] * layers}


def write_student(folder: Path, source: Path, changes: Mapping[str, object]) -> None:
    """Copy a student's tokenizer and config, without weights, with other values in the config."""
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)
    config = read_json(source / "config.json") | dict(changes)
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def write_teacher_as_student(folder: Path, teacher: Path, student: Path, twin: Twin) -> None:
    """Write the teacher's decoded weights as a Hugging Face student.

    Args:
        folder: the folder to write.
        teacher: qwen2 GGUF with a tied head.
        student: where tokenizer and the rest of the config come from.
        twin: ``exact``; ``permuted``, the same function with its hidden units in another order, so that no weight is
            where it was; or ``noisy``, the same weights with noise of ``NOISE`` times their spread.
    """
    from safetensors.numpy import save_file

    reader = gguf.GGUFReader(teacher)

    def size(name: str) -> int:
        return int(reader.fields[f"qwen2.{name}"].contents())

    rng = np.random.default_rng(8)
    order = rng.permutation(size("embedding_length"))
    tensors: dict[str, NDArray[Any]] = {}
    for tensor in reader.tensors:
        weight = np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type), np.float32)
        part = tensor.name.split(".")[-2]
        if twin == "permuted" and not tensor.name.endswith(".bias"):
            weight = weight[order] if part in _HIDDEN_IS_ROW else weight[:, order]
        elif twin == "noisy" and weight.ndim == 2:
            weight += rng.normal(0, NOISE * weight.std(), weight.shape).astype(np.float32)
        tensors[huggingface_name(tensor.name)] = np.ascontiguousarray(weight)
    heads, kv_heads = size("attention.head_count"), size("attention.head_count_kv")
    hidden, ffn, layers = size("embedding_length"), size("feed_forward_length"), size("block_count")
    write_student(folder, student, student_shape(hidden, ffn, layers, heads, kv_heads))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def write_live_student(
    folder: Path, source: Path, changes: Mapping[str, object], *, template: str, seed: int = 11
) -> None:
    """Write a student with float32 weights of which each changes the logits, and a chat template.

    Scales are those of a trained residual stream: embeddings of standard deviation 1, matrices ``1/sqrt(columns)``,
    norm weights around 1. The final norm is small and of random signs, since the head is the embedding: otherwise each
    token would be its own successor.

    Args:
        folder: the folder to write.
        source: the qwen2 student with a tied head that config and tokenizer come from.
        changes: other values in the config.
        template: Jinja source of the chat template.
        seed: seed of the weights.
    """
    from safetensors.numpy import save_file

    write_student(folder, source, changes)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    config = read_json(folder / "config.json")
    hidden, ffn, layers = (int(config[name]) for name in ("hidden_size", "intermediate_size", "num_hidden_layers"))
    kv_size = hidden // int(config["num_attention_heads"]) * int(config["num_key_value_heads"])
    rng = np.random.default_rng(seed)

    def normal(*shape: int, scale: float = 1.0) -> NDArray[np.float32]:
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    signs = rng.choice([-1.0, 1.0], hidden)
    tensors = {
        "model.embed_tokens.weight": normal(int(config["vocab_size"]), hidden),
        "model.norm.weight": ((1 + 0.3 * normal(hidden)) * signs / np.sqrt(hidden)).astype(np.float32),
    }
    rows_cols = {"q": (hidden, hidden), "k": (kv_size, hidden), "v": (kv_size, hidden), "o": (hidden, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        for name, (rows, cols) in rows_cols.items():
            gain = (2 * layers) ** -0.5 if name == "o" else 1.0
            tensors[f"{prefix}self_attn.{name}_proj.weight"] = normal(rows, cols, scale=gain / cols**0.5)
            if name != "o":
                tensors[f"{prefix}self_attn.{name}_proj.bias"] = normal(rows, scale=0.3)
        for name, rows, cols in (("gate", ffn, hidden), ("up", ffn, hidden), ("down", hidden, ffn)):
            gain = (2 * layers) ** -0.5 if name == "down" else 1.0
            tensors[f"{prefix}mlp.{name}_proj.weight"] = normal(rows, cols, scale=gain / cols**0.5)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = 1 + normal(hidden, scale=0.3)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
