"""Experiments on what leaves a run: exported models, and how far a quantised one is from its original."""

import functools
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from q4kd.harness.experiment import Arm, Experiment, Inputs, register
from q4kd.harness.experiments_loss import demo_student
from q4kd.harness.experiments_runs import distill_words
from q4kd.harness.experiments_teacher import collect_probe, demo_teacher, save_pairs
from q4kd.harness.probes_export import FORMS
from q4kd.harness.reference import from_hugging_face, read_gguf, reference_logits
from q4kd.harness.synthetic_models import seeded_columns
from q4kd.harness.synthetic_students import write_live_student
from q4kd.trainer.files import read_json

POSITIONS, COLUMNS, VOCAB = 64, 64, 2048
CHAT_TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|endoftext|>{% endfor %}"
# Rows of 256 and 512 weights hold superblocks; the head is one matrix with the embedding.
SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
_ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def live_student(inputs: Inputs) -> Path:
    """Return a student whose every weight matters, with a chat template."""
    make = functools.partial(write_live_student, source=demo_student(inputs), changes=SIZES, template=CHAT_TEMPLATE)
    return inputs.file("live-student", make)


def run_program(words: list[str], folder: Path) -> None:
    """Run the program as it is, to make an input: faults are planted in what is measured, not here."""
    command = [sys.executable, "-m", "q4kd.harness", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise RuntimeError(f"q4kd {words[0]} ended with {done.returncode}: {done.stderr[-500:]}")


def _text_folder(inputs: Inputs) -> Path:
    """Return a folder of two texts, of which the split by name holds out the second."""

    def make(folder: Path) -> None:
        folder.mkdir()
        for name, module in (("train.py", functools), ("held-2.py", shutil)):
            shutil.copyfile(str(module.__file__), folder / name)

    return inputs.file("export-texts", make)


def _run(inputs: Inputs, name: str, *words: str) -> Path:
    """Return the folder of a short run from the live student."""

    def make(folder: Path) -> None:
        settings = ("--set", "steps=4", "--set", "checkpoint_every=2", "--set", "eval_every=2", *words)
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
    """Return a run cut short by --max-steps, so without a model."""
    return _run(inputs, "smoke-run", "--max-steps", "2")


def _ids(inputs: Inputs) -> Path:
    def make(path: Path) -> None:
        with path.open("wb") as file:
            np.save(file, np.random.default_rng(12).integers(1, VOCAB, POSITIONS))

    return inputs.file("export-ids.npy", make)


# --- exported-models: a run in every form, each run by the programs it is for ---


def _export_argv(inputs: Inputs) -> list[str]:
    run, text = str(finished_run(inputs)), str(_text_folder(inputs) / "train.py")
    options = ["--run", run, "--ids", str(_ids(inputs)), "--text", text]
    return ["probe", "exported-models", *options, "--out", "exported.npz", "--facts", "probe.json"]


def _collect_export(run_dir: Path, inputs: Inputs) -> dict[str, Any]:
    facts = collect_probe(run_dir, inputs)
    if not (run_dir / "exported.npz").is_file():
        return facts | {"comparators": {}}
    from safetensors.numpy import load_file
    from tokenizers import Tokenizer

    with np.load(run_dir / "exported.npz", allow_pickle=False) as arrays:
        found = dict(arrays)
    model, ids = finished_run(inputs) / "model", np.load(_ids(inputs), allow_pickle=False)
    original = from_hugging_face(load_file(model / "model.safetensors"), read_json(model / "config.json"))
    exact = reference_logits(original, ids)
    columns = seeded_columns(VOCAB, COLUMNS)
    comparators = save_pairs(
        run_dir,
        {"hf-logits": (found["hf"][:, columns], found["run"][:, columns])},
        ("transformers, exported folder", "transformers, the run's own model"),
    )
    for form in FORMS:
        by_reference = reference_logits(read_gguf(run_dir / f"{form}.gguf"), ids)
        for suffix, subject in (("teacher", found[form]), ("reference", by_reference)):
            pair = {f"{form.replace('_', '')}-{suffix}": (subject[:, columns], exact[:, columns])}
            comparators |= save_pairs(
                run_dir, pair, (f"{form} export, {suffix} forward", "float64 forward over the run's model")
            )
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    expected = np.array(tokenizer.encode((_text_folder(inputs) / "train.py").read_text(encoding="utf-8")).ids)
    comparators |= save_pairs(
        run_dir, {"token-ids": (found["ids"][None], expected[None])}, ("the GGUF's tokenizer", "the run's tokenizer")
    )
    tables = {"gguf": _gguf_table(run_dir / "f16.gguf", model), "folder": _folder_table(run_dir / "hf", inputs)}
    return facts | {"comparators": comparators, "tables": tables}


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


register(
    Experiment(
        name="exported-models",
        title="a run exported as a Hugging Face folder and as GGUF in three types, each run and read again",
        needs=(),
        arms=(Arm(None, _export_argv, timeout_s=240, env=_ONE_THREAD),),
        prepare=_export_argv,
        collect=_collect_export,
    )
)
