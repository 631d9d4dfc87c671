"""Imports what every student needs of transformers, without its second look at 2,000 files.

Most of a start is such imports. sympy and torch._dynamo, a third of them, are imported by torch's distributed tensors
and by a decorator; a student's forward pass on the meta device needs both anyway.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast


def import_transformers() -> None:
    """Import the base of transformers' models and tokenizers.

    A thread that reads a tokenizer later then shares no import with the loading of the student's weights.
    """
    _import_list_of_models()
    import transformers.modeling_utils  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401


def _import_list_of_models() -> None:
    """Import ``transformers.models`` by the list of names that importing ``transformers`` has made.

    Each reads every file of every model for what it defines, which takes 0.3 to 0.6 s of processor time.
    """
    import transformers
    from transformers.utils import import_utils

    folder, utils = Path(transformers.__path__[0]) / "models", cast("Any", import_utils)
    original: Any = getattr(utils, "define_import_structure", None)
    if not hasattr(original, "cache_info"):  # a release that keeps no list
        return

    def listed(module_path: Any, prefix: str | None = None) -> Any:
        is_asked_again = prefix is None and Path(module_path) == folder / "__init__.py"
        return list_models(original, folder) if is_asked_again else original(module_path, prefix)

    utils.define_import_structure = listed
    try:
        import transformers.models
    finally:
        utils.define_import_structure = original


def list_models(define: Callable[..., Any], folder: Path) -> dict[Any, dict[str, Any]]:
    """Return what a release's ``define_import_structure`` says of its folder of models.

    It has been asked for them with the prefix ``models``, and has kept the answer, to which names of the package itself
    were added since.
    """
    prefix = "models."
    return {
        needs: {name.removeprefix(prefix): what for name, what in names.items() if name.startswith(prefix)}
        for needs, names in define(folder, prefix="models").items()
    }
