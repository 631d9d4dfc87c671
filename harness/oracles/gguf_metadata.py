"""The metadata of a GGUF, read from its bytes as the format's document says; it shares no code with any other reader.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import struct
from pathlib import Path

Value = int | float | bool | str | list["Value"]
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
# Kinds of token, which llama.cpp calls llama_token_type.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def read_metadata(path: Path) -> dict[str, Value]:
    """Return every key-value pair of a GGUF of version 3 (ValueError for another file, or a key that comes twice)."""
    return _Reader(path.read_bytes()).metadata()


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def metadata(self) -> dict[str, Value]:
        magic, version, _tensors, pairs = self._take("<4sIQQ")
        if magic != b"GGUF" or version != 3:
            raise ValueError(f"no GGUF of version 3: {magic!r}, {version}")
        found: dict[str, Value] = {}
        for _ in range(pairs):
            key = self._string()
            if key in found:
                raise ValueError(f"{key} comes twice")
            found[key] = self._value(self._take("<I")[0])
        return found

    def _take(self, layout: str) -> tuple:  # type: ignore[type-arg]
        values = struct.unpack_from(layout, self._data, self._at)
        self._at += struct.calcsize(layout)
        return values

    def _string(self) -> str:
        (length,) = self._take("<Q")
        text = self._data[self._at : self._at + length].decode()
        self._at += length
        return text

    def _value(self, kind: int) -> Value:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            inner, count = self._take("<IQ")
            return [self._value(inner) for _ in range(count)]
        value: Value = self._take(_SCALARS[kind])[0]
        return value
