"""Mutated model files against the reader: run a few thousand by the test suite, any number by hand.

``python tests/support/fuzz_models.py --cases 100000 --out fuzz.json``

Every case is a valid small file, or the shards of one, with something wrong. It must either be refused with an
InputError, or be a model that computes (an importance matrix: that quantises); within five seconds, without growing the
process by more than 500 MB and without a warning of NumPy's. What is refused must be explained as ``q4kd inspect``
does, within the same bounds.
"""

import argparse
import collections
import dataclasses
import json
import random
import resource
import shutil
import struct
import sys
import tempfile
import time
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import gguf
import numpy as np
import torch
from model_mutations import MUTATIONS, SHARD_MUTATIONS, mutate
from teachers import load_quietly

from q4kd.harness.inputs.models.apr_write import convert_gguf
from q4kd.harness.inputs.models.split_models import shards, write_split
from q4kd.harness.inputs.models.synthetic_families import FAMILIES, write_family_model
from q4kd.harness.inputs.models.synthetic_gpt_oss import write_gpt_oss
from q4kd.harness.inputs.models.synthetic_hybrids import HYBRIDS, write_hybrid_model
from q4kd.harness.inputs.models.synthetic_mixtures import write_mixture
from q4kd.harness.inputs.models.synthetic_models import MODELS, SmallModel, write_small_model
from q4kd.trainer.errors import InputError
from q4kd.trainer.formats.blocks.quantize import quantize
from q4kd.trainer.formats.gguf.importance import read_importance
from q4kd.trainer.formats.gguf.split import open_shards
from q4kd.trainer.formats.open import explain_refusal

MAX_SECONDS = 5.0
MAX_GROWTH = 500_000_000
IMPORTANCE = "imatrix.gguf"


def seal_apr(data: bytearray) -> bytearray:
    """Make both checksums of a mutated .apr right again, so that what lies behind them is reached."""
    if len(data) >= 68:
        struct.pack_into("<I", data, 40, zlib.crc32(data[:40] + data[44:64]))
        struct.pack_into("<I", data, len(data) - 4, zlib.crc32(data[:-4]))
    return data


@dataclasses.dataclass(frozen=True)
class Case:
    """Files of a mutated model, by name, and the one that is named to the reader."""

    what: str
    files: Mapping[str, bytes]
    named: str

    def write(self, folder: Path) -> Path:
        """Make ``folder`` hold nothing but these files; return the path of the named one."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, data in self.files.items():
            (folder / name).write_bytes(data)
        return folder / self.named


class Corpus:
    """Valid small files of both containers, a split one, and mutated copies of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sources: list[tuple[str, bytes, int]] = []
        tiny = SmallModel("qwen2", ("Q4_K", "Q6_K"), tied=True, biases=True)
        codes = SmallModel("qwen2", ("NVFP4", "IQ3_S", "MXFP4", "IQ1_M"))
        for name, model in {"tiny": tiny, "llama3": MODELS["llama3"], "codes": codes}.items():
            path = folder / f"{name}.gguf"
            write_small_model(path, model)
            self._add(path)
            if name == "tiny":
                convert_gguf(path, folder / "tiny.apr")
                self._add(folder / "tiny.apr")
        write_split(folder / "split", folder / "llama3.gguf", tensors=12)
        opened = open_shards(shards(folder / "split")[0])
        self.shards = [(one.path.name, one.path.read_bytes(), one.header.data_start) for one in opened]

        for name, family in FAMILIES.items():
            path = folder / f"{name}.gguf"
            write_family_model(path, family)
            self._add(path)
        write_mixture(folder / "mixture.gguf")
        self._add(folder / "mixture.gguf")
        write_gpt_oss(folder / "gpt-oss.gguf")
        self._add(folder / "gpt-oss.gguf")
        for name in HYBRIDS:
            write_hybrid_model(folder / f"{name}.gguf", name)
            self._add(folder / f"{name}.gguf")
        self._add(write_importance(folder / IMPORTANCE))

    def _add(self, path: Path) -> None:
        data = path.read_bytes()
        # The header is what lies before the first weights: a few KB of a file of some hundred KB.
        header = 4096 if path.suffix == ".apr" else 3500
        self.sources.append((path.name, data, min(header, len(data) - 8)))

    def valid(self) -> Iterator[Case]:
        """Give every model as it is."""
        for name, data, _header in self.sources:
            yield Case(name, {name: data}, name)
        files = {name: data for name, data, _header in self.shards}
        yield from (Case(name, files, name) for name in files)

    def mutated(self, rng: random.Random) -> Case:
        """Return one case."""
        if rng.random() < 0.3:
            return self._mutated_split(rng)
        name, data, header = rng.choice(self.sources)
        changed, words = mutate(bytearray(data), rng, header, MUTATIONS)
        if name.endswith(".apr") and rng.random() < 0.7:
            changed = seal_apr(changed)
            words.append("sealed")
        named = name if name == IMPORTANCE else "case.model"
        return Case(f"{name}: {', '.join(words)}", {named: bytes(changed)}, named)

    def _mutated_split(self, rng: random.Random) -> Case:
        """Mutate one shard, lose one, or give two of them the content of one or of each other."""
        files = {name: data for name, data, _header in self.shards}
        name, data, header = rng.choice(self.shards)
        other = rng.choice(self.shards)[0]
        kind = rng.choice(("mutated",) * 8 + ("lost", "copied", "swapped"))
        words = [kind]
        if kind == "mutated":
            changed, words = mutate(bytearray(data), rng, header, SHARD_MUTATIONS)
            files[name] = bytes(changed)
        elif kind == "lost":
            del files[name]
        else:
            files[name], files[other] = files[other], files[name if kind == "swapped" else other]
        return Case(f"{name}: {', '.join(words)}", files, rng.choice(list(files)))


def run_case(path: Path) -> str:
    """Load and use one file; return ``refused`` or ``computed``. Whatever else comes out is a defect."""
    if path.name == IMPORTANCE:
        return _run_importance(path)
    try:
        teacher = load_quietly(path, dtype="float32")
        teacher.logits(torch.tensor([[0, 1, 2]]))
    except InputError as error:
        line = str(error)
        assert "\n" not in line and "expected" in line, line
        for part in explain_refusal(path):
            assert part.part and part.found and part.supported, part
        return "refused"
    return "computed"


def write_importance(path: Path) -> Path:
    """Write an importance matrix of three matrices as llama-imatrix does."""
    writer = gguf.GGUFWriter(path, "")
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", ["text.txt"])
    writer.add_uint32("imatrix.chunk_count", 1)
    for name, cols in (("blk.0.attn_q", 256), ("blk.0.attn_v", 256), ("blk.0.ffn_down", 512)):
        values = np.random.default_rng(cols).chisquare(1, (1, cols)).astype(np.float32)
        writer.add_tensor(f"{name}.weight.in_sum2", values)
        writer.add_tensor(f"{name}.weight.counts", np.full((1, 1), 8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _run_importance(path: Path) -> str:
    """Read importances and quantise by them: what is not refused gives finite weights, near those that were given."""
    try:
        found = read_importance(path)
    except InputError as error:
        line = str(error)
        assert "\n" not in line and "expected" in line, line
        return "refused"
    for values in list(found.values())[:2]:
        if values.size % 256 == 0 and values.size <= 4096:
            weights = np.random.default_rng(0).standard_normal((1, values.size)).astype(np.float32)
            for name in ("Q4_K", "Q3_K", "IQ4_XS"):
                stored = quantize(weights, name, values)
                decoded = gguf.quants.dequantize(stored, gguf.GGMLQuantizationType[name])
                assert np.abs(decoded - weights).max() < 4, name
    return "computed"


def fuzz(cases: int, seed: int, folder: Path) -> dict[str, object]:
    """Run ``cases`` mutated files; return counts, the slowest case and the memory growth in bytes.

    Raises:
        AssertionError: naming the case's seed, for anything but a refusal or a computed model, or a bound that broke.
    """
    corpus = Corpus(folder)
    target = folder / "case"
    for valid in corpus.valid():
        assert run_case(valid.write(target)) == "computed", valid.what
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    counts: collections.Counter[str] = collections.Counter()
    slowest = (0.0, "none")
    for case in range(cases):
        mutated = corpus.mutated(random.Random(seed * 1_000_003 + case))
        path, what = mutated.write(target), mutated.what
        started = time.monotonic()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", RuntimeWarning)
                outcome = run_case(path)
        except Exception as error:
            kept = shutil.copytree(target, folder / f"failed-{seed}-{case}")
            raise AssertionError(f"seed {seed}, case {case} ({what}), kept in {kept}: {error!r}") from error
        seconds = time.monotonic() - started
        counts[outcome] += 1
        slowest = max(slowest, (seconds, what))
        assert seconds < MAX_SECONDS, f"seed {seed}, case {case} ({what}) took {seconds:.1f} s"
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    assert growth < MAX_GROWTH + max(len(data) for _, data, _ in corpus.sources), f"grew by {growth} bytes"
    return {
        "cases": cases,
        "seed": seed,
        **counts,
        "slowest_s": round(slowest[0], 3),
        "slowest": slowest[1],
        "growth_bytes": growth,
    }


def main() -> int:
    """Fuzz from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        result = fuzz(args.cases, args.seed, Path(folder)) | {"seconds": round(time.monotonic() - started)}
    text = json.dumps(result, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
