"""A teacher and students of 20,000 weights that read letters, and short documents of a prompt and a completion.

They are so small that the harness can train the student itself in float64. The teacher has more rows than the student,
as padded vocabularies do.
"""

import argparse
import functools
import itertools
import json
import shutil
from pathlib import Path

from q4kd.harness.inputs.demo import demo_student
from q4kd.harness.inputs.models.synthetic_models import MODELS, write_small_model
from q4kd.harness.inputs.models.synthetic_models import VOCAB as TEACHER_ROWS
from q4kd.harness.inputs.synthetic_students import (
    student_shape,
    write_live_student,
    write_padded_teacher,
    write_student,
)
from q4kd.harness.oracles.windows import Document
from q4kd.harness.runs.experiment import Inputs

END = "<|endoftext|>"
# The end-of-text token is the first id; these letters follow it, and then rows that no token has. There are few, so
# that a student soon prefers the teacher's token here and there.
LETTERS = "abcdefghijklmnopqrstuvwxyz_().,:=\"'# \n"
ROWS = 48
SHAPE = {**student_shape(hidden=32, ffn=64, layers=2, heads=4, kv_heads=2), "vocab_size": ROWS}


def _write_letter_student(folder: Path, source: Path) -> None:
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    names = [END, *(spell.pre_tokenize_str(letter)[0][0] for letter in LETTERS)]
    tokenizer = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = spell
    tokenizer.add_special_tokens([AddedToken(END, special=True)])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    words = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END}
    (folder / "tokenizer_config.json").write_text(json.dumps(words))
    shutil.copyfile(source / "config.json", folder / "config.json")


def _letter_student(inputs: Inputs) -> Path:
    return inputs.file("letters-student", functools.partial(_write_letter_student, source=demo_student(inputs)))


def fresh_small_student(inputs: Inputs) -> Path:
    """Return the small student without weights, which a run draws from its seed."""
    make = functools.partial(write_student, source=_letter_student(inputs), changes=SHAPE)
    return inputs.file("small-fresh-student", make)


def small_student(inputs: Inputs, dropout: float = 0.0) -> Path:
    """Return the small student with float32 weights of which each matters, and that dropout of its attention."""
    changes = {**SHAPE, "attention_dropout": dropout}
    make = functools.partial(write_live_student, source=_letter_student(inputs), changes=changes, template="")
    return inputs.file(f"small-student-{dropout:g}", make)


def _token_ids(inputs: Inputs) -> dict[str, int]:
    from tokenizers import Tokenizer

    ids: dict[str, int] = Tokenizer.from_file(str(_letter_student(inputs) / "tokenizer.json")).get_vocab()
    return ids


def small_teacher(inputs: Inputs) -> Path:
    """Return a random K-quant teacher of the student's tokens, with rows past the student's."""
    plain = inputs.file("small-qwen2.gguf", functools.partial(write_small_model, model=MODELS["qwen2"]))
    ids = _token_ids(inputs)
    names = sorted(ids, key=lambda name: ids[name])
    make = functools.partial(write_padded_teacher, source=plain, rows=TEACHER_ROWS, tokens=names)
    return inputs.file("small-teacher.gguf", make)


def _pairs(first: int, count: int) -> list[tuple[str, str]]:
    """Return prompts and completions of 3 to 30 characters, pieces of a library file, different in length."""
    text = Path(argparse.__file__).read_text(encoding="utf-8").lower()
    source = "".join(letter for letter in text if letter in LETTERS).replace("  ", "")
    pairs, start = [], 3000 + 100 * first
    for number in range(first, first + count):
        sizes = 4 + number * 37 % 23, 3 + number * 29 % 17
        begin, middle, end = itertools.accumulate((start, *sizes))
        pairs.append((source[begin:middle], source[middle:end]))
        start = end
    return pairs


def completions(inputs: Inputs, name: str, first: int, count: int) -> Path:
    """Return a JSONL file ``name`` of ``count`` prompts and completions, from the ``first`` one on."""

    def make(path: Path) -> None:
        records = [{"prompt": prompt, "completion": completion} for prompt, completion in _pairs(first, count)]
        path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")

    return inputs.file(name, make)


def completion_documents(first: int, count: int, *, only_completions: bool) -> list[Document]:
    """Return the tokens of the same documents, and which are learnt, worked out letter by letter."""
    ids = {letter: number for number, letter in enumerate(LETTERS, start=1)}
    documents = []
    for prompt, completion in _pairs(first, count):
        asked, said = [ids[letter] for letter in prompt], [*(ids[letter] for letter in completion), 0]
        learnt = [not only_completions] * len(asked) + [True] * len(said)
        documents.append(Document((*asked, *said), tuple(learnt)))
    return documents
