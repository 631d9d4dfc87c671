"""``pytest --as-if amx_bf16``: the automatic dtype is bfloat16 at every size, here and in child processes.

A test that compares numbers and leaves the dtype to the processor fails then, whatever processor runs it.
"""

import os
from pathlib import Path

_STARTUP = """import sys

sys.path.append({support!r})
import as_if

as_if.pretend({flag!r})
"""


def pretend(flag: str) -> None:
    """Have this process's automatic choice see a processor with ``flag``, for which bfloat16 pays at every size."""
    from q4kd.trainer.device import dtypes

    read = dtypes.usable_flags
    dtypes.usable_flags = lambda *variables: read(*variables) if variables else frozenset({flag})
    dtypes.PAYS_FROM[flag] = 1


def children_environment(flag: str, folder: Path) -> dict[str, str]:
    """Return the variable by which every Python started with it does the same: ``folder`` gets a ``sitecustomize``."""
    startup = _STARTUP.format(support=str(Path(__file__).parent), flag=flag)
    (folder / "sitecustomize.py").write_text(startup, encoding="utf-8")
    before = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": str(folder) if not before else os.pathsep.join([str(folder), before])}
