"""Whether a student's folder holds a head of its own, whatever its config says: the plan counts what will be loaded.

transformers ties head and embedding where the config says so, but not where the weights hold both and they differ
(``tie_weights`` of its modeling_utils.py). A merge of adapters into one of the two leaves such a folder.
"""

from pathlib import Path
from typing import Any

import torch

from q4kd.trainer.files import read_json
from q4kd.trainer.student.folder import WEIGHT_FILES, has_weights

_ROWS = 4096


def unties_head(folder: Path, model: Any, dtype: torch.dtype) -> bool:
    """Return whether a model whose config ties head and embedding will have two of them once it is loaded in ``dtype``.

    Args:
        folder: the student, checked; without weights nothing speaks against its config.
        model: the causal LM of its config, on any device.
        dtype: of the loaded weights. Two that differ in the file may be one in it.
    """
    weight = model.get_output_embeddings().weight
    names = [name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter is weight]
    if len(names) < 2 or not has_weights(folder):
        return False
    files = _files(folder)
    stored = [name for name in names if name in files]
    if len(stored) < 2:
        return False
    with torch.device("cpu"):  # whatever device a caller makes models on
        first, *others = (_Rows(folder / files[name], name) for name in stored)
        return any(first.differs(other, dtype) for other in others)


class _Rows:
    """A matrix of a safetensors file, read some rows at a time."""

    def __init__(self, path: Path, name: str) -> None:
        from safetensors import safe_open

        file: Any = safe_open(path, framework="pt")
        self._slice = file.get_slice(name)
        self.shape = tuple(self._slice.get_shape())

    def differs(self, other: "_Rows", dtype: torch.dtype) -> bool:
        """Return whether two matrices are not the same in ``dtype``."""
        return self.shape != other.shape or any(
            not torch.equal(self._slice[start : start + _ROWS].to(dtype), other._slice[start : start + _ROWS].to(dtype))
            for start in range(0, self.shape[0], _ROWS)
        )


def _files(folder: Path) -> dict[str, str]:
    """Return the file of each tensor."""
    from safetensors import safe_open

    whole, index = WEIGHT_FILES
    if not (folder / whole).is_file():
        return dict(read_json(folder / index)["weight_map"])
    file: Any = safe_open(folder / whole, framework="pt")
    return dict.fromkeys(file.keys(), whole)
