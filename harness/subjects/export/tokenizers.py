"""The experiment on tokenizers in GGUF files: written by the exporter, read back, and asked for ids of hard text."""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from q4kd.harness.inputs.arrays import Array, read_arrays
from q4kd.harness.inputs.command_lines import probe_words
from q4kd.harness.inputs.published.hard_text import hard_lines
from q4kd.harness.inputs.published.tokenizers import BYTE_LEVEL, PIECES, byte_level, pieces
from q4kd.harness.runs.experiment import ONE_THREAD, Arm, Facts, Inputs, experiment
from q4kd.trainer.files import read_json, write_json

LINES = 1000
_SEED = 11


def tokenizer_lines(number: int) -> list[str]:
    """Return the lines of a tokenizer: other ones for each."""
    return hard_lines(LINES, _SEED + number)


def id_digests(tokens: Sequence[Sequence[int]]) -> Array:
    """Return a checksum of the ids of each line, uint32 ``[lines]``."""
    return np.array([zlib.crc32(np.array(ids, "<i4").tobytes()) for ids in tokens], np.uint32)


def _tokenizers(inputs: Inputs) -> Path:
    def make(path: Path) -> None:
        write_json(path, {**{name: byte_level(name) for name in BYTE_LEVEL}, **{name: pieces(name) for name in PIECES}})

    return inputs.file("published-tokenizers.json", make)


@experiment(
    "tokenizer-files",
    "tokenizers that cut text in eleven ways, written into GGUF files and read back",
    Arm(
        None,
        lambda inputs: probe_words("tokenizer-files", contents=_tokenizers(inputs), out="ids.npz", facts="facts.json"),
        60,
        env=ONE_THREAD,
    ),
)
def _collect_tokenizers(run_dir: Path, inputs: Inputs) -> Facts:
    """Count, for each tokenizer, the lines whose ids are not those of the tokenizer itself."""
    from tokenizers import Tokenizer

    if not (found := read_arrays(run_dir / "ids.npz")):
        return {}
    table: dict[str, int | str] = {"lines": LINES}
    contents = read_json(_tokenizers(inputs))
    for number, (name, content) in enumerate(contents.items()):
        own = Tokenizer.from_str(json.dumps(content)).encode_batch(tokenizer_lines(number), add_special_tokens=False)
        table[f"{name}: lines that differ"] = int((found[name] != id_digests([one.ids for one in own])).sum())
    names = read_json(run_dir / "facts.json")["names"]
    return {"tables": {"ids": table, "names": names}}
