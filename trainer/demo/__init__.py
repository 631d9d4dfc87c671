"""The demo: a small teacher trained on this interpreter's standard library, its student, and golden logits.

Made by ``python -m q4kd.trainer.demo.make_teacher``; ``card()`` says how, and how good it is.
"""

import sysconfig
from pathlib import Path
from typing import Any

from q4kd.trainer.files import read_json

_FOLDER = Path(__file__).parent


def teacher_path() -> Path:
    """Return the path of the teacher: a qwen2 GGUF, Q4_K_M, 5.2 M parameters, 2048 tokens."""
    return _FOLDER / "teacher-q4_k_m.gguf"


def student_path() -> Path:
    """Return a Hugging Face folder with the student's config and the shared tokenizer, without weights."""
    return _FOLDER / "student"


def golden_path() -> Path:
    """Return an npz: ``ids`` int32 [64] of held-out text, ``logits`` float32 [64, 2048] of transformers in float64."""
    return _FOLDER / "golden.npz"


def data_path() -> Path:
    """Return the folder of this interpreter's standard library, the text; ``is_held_out`` says what is held out."""
    return Path(sysconfig.get_paths()["stdlib"])


def card() -> dict[str, Any]:
    """Return demo.json: steps, tokens, seed, versions, held-out losses before and after quantising, rounding errors."""
    content: dict[str, Any] = read_json(_FOLDER / "demo.json")
    return content
