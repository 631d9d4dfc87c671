"""The demo's text: the Python standard library's own source, its tokenizer, and token windows cut from it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from q4kd.trainer.data.documents import is_held_out
from q4kd.trainer.errors import InputError
from q4kd.trainer.formats.gguf.pre_tokenizers import QWEN2_SPLIT

END_OF_TEXT = "<|endoftext|>"
SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__", "lib-dynload"}
)


def source_files(root: Path) -> list[str]:
    """Return the ``.py`` files below ``root``, as sorted relative posix paths.

    ``SKIPPED_FOLDERS`` and ``_sysconfigdata*``, which describe the machine that built this interpreter, are skipped.

    Raises:
        InputError: when there is none.
    """
    found = [path.relative_to(root) for path in root.rglob("*.py")]
    names = sorted(
        path.as_posix()
        for path in found
        if not SKIPPED_FOLDERS.intersection(path.parts) and not path.name.startswith("_sysconfigdata")
    )
    if not names:
        raise InputError(str(root), expected="Python source files", got="none", remedy="name a folder of .py files")
    return names


def read_texts(root: Path, *, held_out: bool) -> list[str]:
    """Read the held-out files, or all others. Bytes that are not UTF-8 become U+FFFD."""
    names = [name for name in source_files(root) if is_held_out(name) == held_out]
    return [(root / name).read_text(encoding="utf-8", errors="replace") for name in names]


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE that splits text as Qwen2 does; id 0 is ``<|endoftext|>``.

    The splitting is not free to choose: transformers' AutoTokenizer gives every qwen2 folder Qwen2's own, whatever
    tokenizer.json says. The result has exactly ``vocab_size`` entries, so that no embedding row is without a token.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        expected, got = f"{vocab_size} tokens", f"{tokenizer.get_vocab_size()}"
        remedy = "give more text or ask for a smaller vocabulary"
        raise InputError("tokenizer", expected=expected, got=got, remedy=remedy)
    return tokenizer


def token_stream(tokenizer: Tokenizer, texts: Sequence[str]) -> npt.NDArray[np.int32]:
    """Encode the texts one after another, each closed by ``<|endoftext|>``: int32 ``[tokens]``."""
    end = tokenizer.token_to_id(END_OF_TEXT)
    pieces = [np.asarray([*encoding.ids, end], dtype=np.int32) for encoding in tokenizer.encode_batch(list(texts))]
    return np.concatenate(pieces)


def windows(stream: npt.NDArray[np.int32], length: int, limit: int | None = None) -> npt.NDArray[np.int32]:
    """Cut disjoint windows of ``length + 1`` tokens (inputs and shifted labels): int32 ``[n, length + 1]``.

    With ``limit``, that many are kept, spread evenly over the stream, so that no single file decides a loss.
    """
    count = len(stream) // (length + 1)
    cut = stream[: count * (length + 1)].reshape(count, length + 1)
    if limit is None or limit >= count:
        return cut
    return cut[np.linspace(0, count - 1, limit).astype(np.int64)]


def token_bytes(tokenizer: Tokenizer) -> npt.NDArray[np.int64]:
    """Bytes of text behind each token id, int64 ``[vocab]``: byte-level BPE spells a byte as one character."""
    content: dict[str, Any] = json.loads(tokenizer.to_str())
    sizes = np.zeros(tokenizer.get_vocab_size(), dtype=np.int64)
    for token, index in content["model"]["vocab"].items():
        sizes[index] = 0 if token == END_OF_TEXT else len(token)
    return sizes
