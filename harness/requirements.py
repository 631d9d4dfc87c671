"""What q4kd declares that it needs, and the extra that brings each package. Imports the standard library only."""

import importlib.metadata
import re

_REQUIREMENT = re.compile(r"([\w.-]+)[^;]*(?:; extra == ['\"]([\w-]+)['\"])?")


def requirements() -> list[tuple[str, str | None]]:
    """Return (distribution, extra) of every requirement that q4kd declares, None for those of the base install."""
    try:
        declared = importlib.metadata.requires("q4kd") or []
    except importlib.metadata.PackageNotFoundError:
        return []
    return [(match[1], match[2]) for entry in declared if (match := _REQUIREMENT.fullmatch(entry))]


def extra_of(module: str) -> str | None:
    """Return the extra that brings a module, None when none does: ``cupy`` comes in a wheel for each CUDA version."""
    name = module.replace("_", "-")
    return next((extra for known, extra in requirements() if known == name or known.startswith(f"{name}-cuda")), None)
