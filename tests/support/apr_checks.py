"""What the tests of .apr files share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from apr_files import AprImage

from q4kd.trainer.errors import InputError
from q4kd.trainer.formats.model_file import ModelFile
from q4kd.trainer.formats.open import open_model

EMBEDDING = "model.embed_tokens.weight"


Change = Callable[[AprImage], Any]


def opened(tmp_path: Path, image: AprImage) -> ModelFile:
    return open_model(image.write(tmp_path / "model.apr"))


def refusal(tmp_path: Path, content: bytes) -> str:
    path = tmp_path / "bad.apr"
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        open_model(path)
    text = str(caught.value)
    assert text.startswith(str(path))
    assert "\n" not in text and len(text) < len(str(path)) + 1000
    return text
