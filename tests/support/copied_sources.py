"""A checkout's sources in another place, without what a build, a run or a tool has left there."""

import shutil
from pathlib import Path

_LEFT_ANYWHERE = (".*", "*.egg-info", "__pycache__")
_LEFT_AT_THE_TOP = ("build", "dist", "bundles", "runs", "tests")


def copy_sources(checkout: Path, target: Path) -> None:
    anywhere = shutil.ignore_patterns(*_LEFT_ANYWHERE)
    at_the_top = shutil.ignore_patterns(*_LEFT_ANYWHERE, *_LEFT_AT_THE_TOP)
    shutil.copytree(
        checkout,
        target,
        ignore=lambda folder, names: (at_the_top if folder == str(checkout) else anywhere)(folder, names),
    )
