"""transformers' list of models is taken from its own cache, and is the one that it would read again."""

import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
import transformers.models
from transformers.utils import import_utils

from q4kd.trainer.student.imports import import_transformers, list_models

FOLDER = Path(transformers.__path__[0]) / "models"


def test_the_list_is_the_one_that_is_read_again() -> None:
    define: Any = import_utils.define_import_structure
    found = list_models(define, FOLDER)
    assert found == define(str(FOLDER / "__init__.py"))
    assert sum(map(len, found.values())) > 100


def test_models_are_imported_without_reading_them_again(monkeypatch: pytest.MonkeyPatch) -> None:
    before, asked = transformers.models, list[tuple[Any, ...]]()
    define: Any = import_utils.define_import_structure

    def counted(module_path: Any, prefix: str | None = None) -> Any:
        asked.append((module_path, prefix))
        return define(module_path, prefix=prefix)

    counted.cache_info = define.cache_info  # type: ignore[attr-defined]
    monkeypatch.setattr(import_utils, "define_import_structure", counted)
    monkeypatch.delitem(sys.modules, "transformers.models")
    monkeypatch.setattr(transformers, "models", before)
    import_transformers()
    again = sys.modules["transformers.models"]
    assert again is not before and dir(again) == dir(before)
    assert (FOLDER, "models") in asked
    assert FOLDER / "__init__.py" not in [Path(module_path) for module_path, _ in asked]
    assert import_utils.define_import_structure is counted


def test_a_release_without_such_a_list_is_imported_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(import_utils, "define_import_structure")
    import_transformers()
    assert not hasattr(import_utils, "define_import_structure")
