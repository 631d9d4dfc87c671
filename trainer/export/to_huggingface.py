"""``q4kd export --format hf``: a folder that transformers loads, with a model card, whole or not at all."""

import os
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from q4kd.trainer.errors import InputError
from q4kd.trainer.export.model_card import Evidence, write_card
from q4kd.trainer.export.run_record import ExportSource
from q4kd.trainer.export.source_model import build_model, equal_states, read_state
from q4kd.trainer.files import apply_umask, sha256_file, sync_folder, write_atomic
from q4kd.trainer.formats.huggingface.reader import read_weights
from q4kd.trainer.student.model import load_tokenizer

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
CARD = "README.md"


@dataclass
class FolderReport:
    """What was written: the weights' dtype, and each weight file's bytes and SHA-256."""

    dtype: str
    files: dict[str, tuple[int, str]]


def export_hf(
    source: ExportSource, out: Path, *, dtype: str | None = None, evidence: Evidence | None = None
) -> FolderReport:
    """Write a model, its tokenizer, its generation config and a model card into a new folder; nothing may be there.

    ``dtype`` is a key of ``DTYPES``; None keeps what is stored.

    Raises:
        InputError: when the model cannot be read, does not fit the dtype, or reads back as another.
        OSError: when the folder cannot be written; nothing is left behind then.
    """
    model = build_model(source, read_state(source))
    tokenizer = load_tokenizer(source.folder)
    if dtype is not None:
        _convert(model, DTYPES[dtype])
    draft = out.with_name(f".{out.name}.{secrets.token_hex(6)}.tmp")
    draft.mkdir()
    try:
        model.save_pretrained(draft, safe_serialization=True)
        tokenizer.save_pretrained(draft)
        _check_folder(draft, model)
        weights = sorted(draft.glob("*.safetensors"))
        files = {path.name: (path.stat().st_size, sha256_file(path)) for path in weights}
        card = write_card(source.title, source.record, files=files, evidence=evidence)
        write_atomic(draft / CARD, card.encode())
        _sync(draft)
        draft.rename(out)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    sync_folder(out.parent)
    return FolderReport(str(model.dtype).removeprefix("torch."), files)


def _convert(model: Any, dtype: torch.dtype) -> None:
    """Round the weights to another dtype; a finite weight that becomes infinite is refused."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter.detach().to(dtype)).all():
            expected, remedy = f"values that {dtype} holds", "use --quantize bf16 or f32"
            raise InputError(name, expected=expected, got="NaN or infinity", remedy=remedy)
    model.to(dtype)


def _check_folder(folder: Path, model: Any) -> None:
    """Compare the weights on disk with those in memory, bit by bit."""
    written = read_weights(folder)
    held = {name: tensor for name, tensor in model.state_dict().items() if name in written}
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    if set(model.state_dict()) - set(written) - tied or not equal_states(written, held):
        expected = "those of the model, bit by bit"
        remedy = "nothing was kept; please report this: the export is at fault"
        raise InputError("the written weights", expected=expected, got="others", remedy=remedy)


def _sync(folder: Path) -> None:
    """Make every byte durable, and every file as readable for others as the umask says."""
    apply_umask(folder)
    for path in folder.iterdir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
    sync_folder(folder)
