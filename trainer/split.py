"""Which files of a text corpus are held out. The rule depends on the path alone, so every program agrees on it."""

import hashlib


def is_held_out(relative_path: str) -> bool:
    """Return whether a file is evaluation data: the first byte of SHA-256 of its path, modulo 10, is zero (26 of 256).

    Args:
        relative_path: the path below the corpus folder, with forward slashes (``Path.as_posix()``).
    """
    return hashlib.sha256(relative_path.encode("utf-8", "surrogateescape")).digest()[0] % 10 == 0
