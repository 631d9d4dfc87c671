"""``q4kd export --format gguf``: write the file, read it back with the teacher's own reader, then give it its name."""

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from q4kd.trainer.errors import InputError
from q4kd.trainer.export.llama_cpp import differences
from q4kd.trainer.export.run_record import ExportSource
from q4kd.trainer.export.source_model import read_model, read_vocabulary
from q4kd.trainer.files import sha256_file
from q4kd.trainer.formats.blocks.decode import decode_rows
from q4kd.trainer.formats.gguf.importance import Importance
from q4kd.trainer.formats.gguf.vocabulary import Vocabulary, added_tokens
from q4kd.trainer.formats.gguf.writer import file_rows, plan_tensors, with_rope_factors, write_gguf
from q4kd.trainer.formats.huggingface.reader import read_huggingface_config
from q4kd.trainer.formats.model_file import PackedTensor
from q4kd.trainer.formats.open import open_model

# These bound the relative Frobenius error of one tensor after a round trip. Normal weights lose 27 % as Q2_K, 14 % as
# Q3_K, 7 % as Q4_K, 1.7 % as Q6_K and 0.5 % as Q8_0; weights in another place or order lose 100 % and more.
ROUND_TRIP = {"F32": 0.0, "F16": 0.01, "BF16": 0.01, "Q8_0": 0.05, "Q6_K": 0.1, "Q4_K": 0.3}
ROUND_TRIP |= {"Q5_K": 0.2, "Q5_0": 0.2, "Q5_1": 0.2, "Q4_0": 0.3, "Q4_1": 0.3, "IQ4_NL": 0.3, "IQ4_XS": 0.3}
ROUND_TRIP |= {"Q3_K": 0.5, "Q2_K": 0.7}
_PIECE_WEIGHTS = 1 << 22
_FLOAT32 = 2.0**-22  # relative; four roundings


@dataclass
class GgufReport:
    """What was written.

    Attributes:
        num_bytes: size of the file.
        sha256: digest of the file.
        tensors: number of tensors of each type.
        round_trip: each type's worst relative error ``‖decoded - w‖ / ‖w‖`` of a tensor, and that tensor's name.
        differences: what llama.cpp computes otherwise, a sentence each.
    """

    num_bytes: int = 0
    sha256: str = ""
    tensors: Mapping[str, int] = field(default_factory=dict)
    round_trip: Mapping[str, tuple[float, str]] = field(default_factory=dict)
    differences: Sequence[str] = ()


def export_gguf(
    source: ExportSource,
    out: Path,
    *,
    recipe: str,
    notes: Mapping[str, str | int],
    importance: Importance | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> GgufReport:
    """Write a model as one new GGUF file with its tokenizer and chat template; arguments as for ``write_gguf``.

    Raises:
        InputError: when the model or its tokenizer cannot be written truthfully, or the file read back is another.
        OSError: when it cannot be written.
    """
    config, state = read_model(source)
    settings, vocabulary = config.to_dict(), read_vocabulary(source, config)
    report = GgufReport()
    check = functools.partial(check_file, report, settings=settings, state=state, vocabulary=vocabulary)
    write_gguf(
        out,
        config=settings,
        state=state,
        tokenizer=vocabulary,
        recipe=recipe,
        name=source.title,
        notes=notes,
        importance=importance,
        check=check,
        progress=progress,
    )
    return report


def check_file(
    report: GgufReport,
    path: Path,
    *,
    settings: Mapping[str, object],
    state: Mapping[str, Tensor],
    vocabulary: Vocabulary,
) -> None:
    """Read a written file as a teacher is read, compare it with what it was made from, and fill in the report.

    Raises:
        InputError: when dimensions, tokens, special ids or template differ, or a tensor is further from its weights
            than its type explains.
    """
    model, wanted = open_model(path), read_huggingface_config(settings)
    stated, found = (dict(_flat(dataclasses.asdict(config))) for config in (wanted, model.config))
    for name in {**stated, **found}:
        _demand(name, stated.get(name), found.get(name))
    for role, index in vocabulary.special_ids.items():
        key = {"unk": "unknown", "pad": "padding"}.get(role, role)
        _demand(f"{role} token", index, model.metadata.get(f"tokenizer.ggml.{key}_token_id"))
    _demand("chat template", vocabulary.chat_templates.get("default"), model.metadata.get("tokenizer.chat_template"))
    by_id = {index: token for token, index in vocabulary.content["model"]["vocab"].items()}
    by_id |= {added["id"]: added["content"] for added in added_tokens(vocabulary.content, len(model.tokens))}
    for index, token in by_id.items():
        _demand(f"token {index}", token, model.tokens[index])

    worst: dict[str, tuple[float, str]] = {}
    tensors = with_rope_factors(settings, state)
    for target, name in plan_tensors(wanted, tensors).items():
        tensor = model.tensors[target]
        error = _round_trip(tensor, file_rows(wanted, target, tensors[name]))
        if not error <= ROUND_TRIP[tensor.type]:
            raise _other_file(f"{target} ({tensor.type})", f"within {ROUND_TRIP[tensor.type]:.1%}", f"{error:.1%}")
        worst[tensor.type] = max(worst.get(tensor.type, (-1.0, "")), (error, target))
    report.differences = differences(wanted, vocabulary.content)
    report.num_bytes, report.sha256 = model.file_bytes, sha256_file(path)
    report.tensors = Counter(tensor.type for tensor in model.tensors.values())
    report.round_trip = worst


def _round_trip(tensor: PackedTensor, weights: Tensor) -> float:
    """Return the relative Frobenius error of a stored tensor, a bounded piece of rows at a time."""
    flat = weights.reshape(-1, weights.shape[-1])
    packed = torch.from_numpy(tensor.data).reshape(len(flat), -1)
    squares = total = 0.0
    step = max(1, _PIECE_WEIGHTS // flat.shape[1])
    for part, exact in zip(torch.split(packed, step), torch.split(flat, step), strict=True):
        exact = exact.float()
        decoded = decode_rows(tensor.type, part, torch.empty_like(exact))
        squares += float((decoded - exact).square().sum(dtype=torch.float64))
        total += float(exact.square().sum(dtype=torch.float64))
    return math.sqrt(squares / total) if total else math.sqrt(squares)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield every setting of a config by name, those within others (a rotary scaling's) too."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _demand(what: str, expected: object, got: object) -> None:
    """Refuse another value. A GGUF holds float32, and some settings are reciprocals of what it holds."""
    if isinstance(expected, float) and isinstance(got, float) and math.isclose(expected, got, rel_tol=_FLOAT32):
        return
    if expected != got:
        raise _other_file(what, repr(expected)[:80], repr(got)[:80])


def _other_file(what: str, expected: str, got: str) -> InputError:
    remedy = "nothing was kept; please report this: the export is at fault"
    return InputError(f"the written file's {what}", expected=expected, got=got, remedy=remedy)
