"""Experiments on what leaves a run: exported models, and how far a quantised one is from its original."""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from q4kd.harness.inputs.arrays import random_ids, read_array, read_arrays, seeded_columns
from q4kd.harness.inputs.collect import collect_probe, reference_student, save_pairs
from q4kd.harness.inputs.command_lines import distill_words, probe_words, run_program
from q4kd.harness.inputs.demo import VOCAB, demo_student, demo_teacher
from q4kd.harness.inputs.sentencepiece import write_sentencepiece_llama
from q4kd.harness.inputs.synthetic_students import write_live_student
from q4kd.harness.oracles.reference import read_gguf, reference_logits
from q4kd.harness.runs.experiment import ONE_THREAD, Arm, Facts, Inputs, experiment
from q4kd.harness.subjects.export.files import FILE_TYPES, file_table, folder_table
from q4kd.harness.subjects.export.probes import FORMS
from q4kd.trainer.files import read_json

POSITIONS, COLUMNS = 64, 64
# These tokens of the demo's vocabulary are added ones here, so that no merge makes or takes them, and one is special.
ADDED_TOKENS = {"self": False, "class": True}
CHAT_TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|endoftext|>{% endfor %}"
# Rows of 256 and 768 weights hold superblocks; 768 superblocks are quantised in two pieces. The head is the embedding.
SIZES = {"hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 2}


def live_student(inputs: Inputs) -> Path:
    """Return a student whose every weight matters, with a chat template and two added tokens, one of them special."""

    def make(folder: Path) -> None:
        write_live_student(folder, source=demo_student(inputs), changes=SIZES, template=CHAT_TEMPLATE)
        content = read_json(folder / "tokenizer.json")
        (first,) = content["added_tokens"]
        for token, is_special in ADDED_TOKENS.items():
            added = {**first, "id": content["model"]["vocab"][token], "content": token, "special": is_special}
            content["added_tokens"].append(added)
        (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")

    return inputs.file("live-student", make)


def _text_folder(inputs: Inputs) -> Path:
    """Return a folder of two texts; the split by name holds out the second."""

    def make(folder: Path) -> None:
        folder.mkdir()
        for name, module in (("train.py", functools), ("held-2.py", shutil)):
            shutil.copyfile(str(module.__file__), folder / name)

    return inputs.file("export-texts", make)


_FEW = ("--set", "eval_tokens=1024")


def _run(inputs: Inputs, name: str, *words: str) -> Path:
    """Return the folder of a short run from the live student."""

    def make(folder: Path) -> None:
        settings = ("--set", "steps=4", "--set", "checkpoint_every=2", "--set", "eval_every=2", *_FEW, *words)
        argv = distill_words(demo_teacher(inputs), live_student(inputs), _text_folder(inputs), *settings)
        at = argv.index("--events")
        del argv[at : at + 2]
        argv[argv.index("--out") + 1] = str(folder)
        run_program(argv, folder.parent)

    return inputs.file(name, make)


def finished_run(inputs: Inputs) -> Path:
    """Return a run with its final model, two checkpoints and held-out evaluations."""
    return _run(inputs, "finished-run")


def smoke_run(inputs: Inputs) -> Path:
    """Return a run that --max-steps cut short, so that it has no model."""
    return _run(inputs, "smoke-run", "--max-steps", "2")


def _ids(inputs: Inputs) -> Path:
    return random_ids(inputs, "export-ids.npy", VOCAB, POSITIONS, seed=12, low=1)


def _own_head(inputs: Inputs) -> Path:
    """Return a small student whose config ties its head, and whose weights hold another one."""

    def make(folder: Path) -> None:
        from safetensors.numpy import load_file, save_file

        write_live_student(folder, source=demo_student(inputs), changes={}, template="", seed=13)
        tensors = load_file(folder / "model.safetensors")
        tensors["lm_head.weight"] = np.ascontiguousarray(tensors["model.embed_tokens.weight"][::-1])
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return inputs.file("own-head-student", make)


# --- exported-models: a run in every form, each run by the programs it is for ---


def _export_argv(inputs: Inputs) -> list[str]:
    options = {"run": finished_run(inputs), "ids": _ids(inputs), "text": _text_folder(inputs) / "train.py"}
    options["pieces"] = inputs.file("sentencepiece-llama", write_sentencepiece_llama)
    options["own_head"] = _own_head(inputs)
    return probe_words("exported-models", **options, out="exported.npz", facts="probe.json")


@experiment(
    "exported-models",
    "a run exported as a Hugging Face folder and as GGUF in three types, each run and read again",
    Arm(None, _export_argv, timeout_s=240, env=ONE_THREAD),
)
def _collect_export(run_dir: Path, inputs: Inputs) -> Facts:
    facts, found = collect_probe(run_dir, inputs), read_arrays(run_dir / "exported.npz")
    if not found:
        return facts | {"comparators": {}}
    from tokenizers import Tokenizer

    model, ids = finished_run(inputs) / "model", read_array(_ids(inputs))
    exact = reference_logits(reference_student(model), ids)
    columns = seeded_columns(VOCAB, COLUMNS)
    sources = ("transformers, exported folder", "transformers, the run's own model")
    comparators = save_pairs(run_dir, {"hf-logits": (found["hf"][:, columns], found["run"][:, columns])}, sources)
    by_reference = reference_logits(read_gguf(run_dir / "head.gguf"), ids)
    pair = {"own-head": (by_reference[:, columns], found["own head"][:, columns].astype(np.float64))}
    comparators |= save_pairs(run_dir, pair, ("f32 export, reference forward", "transformers, the folder"))
    for form in FORMS:
        # An export's error is 1e-4 and more: float32 adds 6e-8 to it.
        by_reference = reference_logits(read_gguf(run_dir / f"{form}.gguf"), ids).astype(np.float32)
        for suffix, subject in (("teacher", found[form]), ("reference", by_reference)):
            pair = {f"{form.replace('_', '')}-{suffix}": (subject[:, columns], exact[:, columns])}
            sources = (f"{form} export, {suffix} forward", "float64 forward over the run's model")
            comparators |= save_pairs(run_dir, pair, sources)
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    expected = np.array(tokenizer.encode((_text_folder(inputs) / "train.py").read_text(encoding="utf-8")).ids)
    sources = ("the GGUF's tokenizer", "the run's tokenizer")
    comparators |= save_pairs(run_dir, {"token-ids": (found["ids"][None], expected[None])}, sources)
    made = facts.get("tables")
    tables: dict[str, object] = dict(made) if isinstance(made, dict) else {}
    tables |= {"inspect": _inspect_table(run_dir)}
    tables |= {"gguf": _gguf_table(run_dir / "f16.gguf", model), "folder": _folder_table(run_dir / "hf", inputs)}
    for form, number in FILE_TYPES.items():
        tables[form] = dict(file_table(run_dir / f"{form}.gguf", live_student(inputs), number, CHAT_TEMPLATE))
    pieces = inputs.file("sentencepiece-llama", write_sentencepiece_llama)
    tables["pieces"] = dict(file_table(run_dir / "pieces.gguf", pieces, FILE_TYPES["f16"], None))
    tables["folder-files"] = dict(folder_table(run_dir / "hf", live_student(inputs)))
    return facts | {"comparators": comparators, "tables": tables}


def _inspect_table(run_dir: Path) -> dict[str, object]:
    """Return what ``q4kd inspect --json`` said of a file that is not what the gguf package reads in it."""
    path, said = run_dir / "q4_k_m.gguf", read_json(run_dir / "inspect.json")
    types: dict[str, dict[str, int]] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        entry = types.setdefault(tensor.tensor_type.name, {"tensors": 0, "weights": 0, "bytes": 0})
        for key, more in (("tensors", 1), ("weights", int(tensor.n_elements)), ("bytes", int(tensor.n_bytes))):
            entry[key] += more
    size, tensors = path.stat().st_size, sum(entry["bytes"] for entry in types.values())
    return {
        "types": said["types"] == types,
        "bytes": (said["file_bytes"], said["tensor_bytes"]) == (size, tensors),
        "layers": said["config"]["num_layers"],
        "backend": said["backend"]["name"],
    }


def _gguf_table(path: Path, model: Path) -> dict[str, object]:
    """Return what a GGUF says of its tokenizer, beside the tokenizer.json of the run's model."""
    fields = gguf.GGUFReader(path).fields

    def value(key: str) -> Any:
        return fields[key].contents() if key in fields else "absent"

    content = read_json(model / "tokenizer.json")
    by_id = {index: token for token, index in content["model"]["vocab"].items()}
    by_id |= {added["id"]: added["content"] for added in content["added_tokens"]}
    tokens = value("tokenizer.ggml.tokens")
    control = {added["id"] for added in content["added_tokens"] if added["special"]}
    kinds = value("tokenizer.ggml.token_type")
    return {
        "tokens that differ": sum(tokens[index] != token for index, token in by_id.items()),
        "merges that differ": sum(
            ours != (other if isinstance(other, str) else " ".join(other))
            for ours, other in zip(value("tokenizer.ggml.merges"), content["model"]["merges"], strict=True)
        ),
        "special tokens marked": all(kinds[index] == gguf.TokenType.CONTROL for index in control),
        "split": value("tokenizer.ggml.pre"),
        "begin token": value("tokenizer.ggml.bos_token_id"),
        "end token": value("tokenizer.ggml.eos_token_id"),
        "begins every text": value("tokenizer.ggml.add_bos_token"),
        "chat template kept": value("tokenizer.chat_template") == CHAT_TEMPLATE,
    }


def _folder_table(folder: Path, inputs: Inputs) -> dict[str, object]:
    """Return what an exported folder says of itself, beside the run and its teacher."""
    from tokenizers import Tokenizer

    run, card = finished_run(inputs), (folder / "README.md").read_text(encoding="utf-8")
    record, text = read_json(run / "run.json"), (_text_folder(inputs) / "train.py").read_text(encoding="utf-8")
    ours, theirs = (Tokenizer.from_file(str(at / "tokenizer.json")) for at in (folder, run / "model"))
    template = folder / "chat_template.jinja"
    return {
        "same ids": ours.encode(text).ids == theirs.encode(text).ids,
        "chat template kept": template.is_file() and template.read_text(encoding="utf-8") == CHAT_TEMPLATE,
        "card begins with metadata": card.startswith("---\nlibrary_name: transformers\n"),
        "card names the teacher's digest": record["teacher"]["sha256"] in card,
        "card names the data's digest": record["data_sha256"] in card,
        "card has the last evaluation": "| 4 |" in card,
        "card names a path of this machine": str(run.parent) in card,
    }
