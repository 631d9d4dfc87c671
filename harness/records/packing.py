"""Archives that depend on the names and contents of files only, so that the same bundle is always packed alike."""

import gzip
import io
import tarfile
from pathlib import Path

from q4kd.harness.records.store import Store
from q4kd.trainer.errors import InputError

SUFFIXES = (".tar.xz", ".tar.gz", ".tgz")
# Arrays that a clean and a sabotaged run share lie megabytes apart, and xz finds again what its dictionary reaches.
# It must stay below what `tar_archive.MAX_XZ_MEMORY` lets a reader spend.
_MAX_DICTIONARY = 64 << 20
_MIN_DICTIONARY = 1 << 20


def tar_bytes(store: Store) -> bytes:
    """Return the files of a store as an uncompressed tar archive, without times, owners or modes of their own."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in store.names():
            data = store.read(name)
            member = tarfile.TarInfo(name)
            member.size, member.mode, member.mtime = len(data), 0o644, 0
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def gzip_bytes(data: bytes) -> bytes:
    """Return ``data`` compressed by gzip, without the time of packing in its header."""
    return gzip.compress(data, compresslevel=6, mtime=0)


def xz_bytes(data: bytes) -> bytes:
    """Return ``data`` compressed by xz, with a dictionary as large as the data but of at most 64 MiB.

    Most of a bundle are float32 arrays, whose literals are coded by their place among four bytes.

    Raises:
        InputError: this Python was built without liblzma.
    """
    try:
        import lzma
    except ImportError as error:
        remedy = "pack as .tar.gz, or use a Python that has the module lzma"
        raise InputError("xz", expected="Python's lzma module", got="none", remedy=remedy) from error
    dictionary = max(_MIN_DICTIONARY, min(_MAX_DICTIONARY, 1 << len(data).bit_length()))
    best: dict[str, int] = {"preset": 9 | lzma.PRESET_EXTREME, "nice_len": 273, "lc": 2, "lp": 2}
    filters = [{"id": lzma.FILTER_LZMA2, "dict_size": dictionary, **best}]
    return lzma.compress(data, lzma.FORMAT_XZ, lzma.CHECK_CRC64, filters=filters)


def packed_as(name: str, store: Store) -> bytes:
    """Return the files of a store as an archive of the kind that ``name`` ends in.

    Raises:
        InputError: ``name`` ends in none of ``SUFFIXES``, or xz is not to be had.
    """
    if not name.endswith(SUFFIXES):
        expected = f"a name that ends in {', '.join(SUFFIXES)}"
        raise InputError(name, expected=expected, got="another", remedy="name it so, .tar.xz for the smallest file")
    return (xz_bytes if name.endswith(".tar.xz") else gzip_bytes)(tar_bytes(store))


def stem_of(path: Path) -> str:
    """Return the name of a bundle without the suffix of its archive."""
    suffix = next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), "")
    return path.name.removesuffix(suffix)
