"""Compiles CUDA C++ to cubins by NVRTC, which needs no GPU, and keeps the results in a private cache.

The cache is a folder that only its owner can enter. A file is named by the SHA-256 of everything that determines its
content (sources, headers, options, architecture, compiler version) and holds the SHA-256 of the cubin, then the cubin:
a damaged file is compiled again. CuPy's own cache does not serve here: its names leave out the headers' text, it
follows links, and it loads code from a folder of any owner and mode. Nothing but what NVRTC builds in is included, so
no CUDA toolkit is needed.
"""

import contextlib
import hashlib
import os
import stat
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from q4kd.trainer import wall
from q4kd.trainer.errors import InputError
from q4kd.trainer.files import write_atomic
from q4kd.trainer.kernels.grids_header import GRIDS_HEADER, grids_header

LOSS_MODULES = ("loss_ce", "loss_forward_kl", "loss_jsd", "loss_reverse_kl")
# A teacher by itself has no use for those of the loss, and few have types of decode_iq, experts, or states.
LAZY_MODULES = ("decode_iq", "experts", "experts_iq", "routing", "states", *LOSS_MODULES)
MODULES = ("decode", "elementwise", "matvec", *LAZY_MODULES)
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100", "sm_120", "sm_121")
OPTIONS = ("-std=c++17", "-fmad=false", "-ftz=false", "-prec-div=true", "-prec-sqrt=true")
_DIGEST_BYTES = 32
_MAX_CUBIN_BYTES = 64 << 20


class CompileError(Exception):
    """NVRTC refused a source; the message carries its log."""


@dataclass(frozen=True)
class Source:
    """A module's text, and the headers that it may include, by file name."""

    name: str
    text: str
    headers: tuple[tuple[str, str], ...]


def architecture(capability: tuple[int, int]) -> str:
    """Return the cubin architecture for a compute capability, such as ``(9, 0)`` to ``sm_90a``.

    Raises:
        InputError: below 8.0, which has no bf16 matrix instructions.
    """
    major, minor = capability
    if major < 8:
        subject, remedy = f"GPU of compute capability {major}.{minor}", "use --device cpu, or a newer GPU"
        raise InputError(subject, expected="8.0 or newer (bf16)", got=f"{major}.{minor}", remedy=remedy)
    # A cubin runs on later minor versions of its major version: sm_80 code runs on 8.6 and 8.9.
    return {8: "sm_80", 9: "sm_90a"}.get(major, f"sm_{major}{minor}")


@cache
def read_source(name: str) -> Source:
    """Read a kernel module and every header beside it from the package, and the one that is made."""
    folder = resources.files("q4kd.trainer.kernels.src")
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".cuh"))
    headers = [(header, folder.joinpath(header).read_text(encoding="utf-8")) for header in names]
    text = folder.joinpath(f"{name}.cu").read_text(encoding="utf-8")
    return Source(name, text, (*headers, (GRIDS_HEADER, grids_header())))


def nvrtc_version() -> tuple[int, int]:
    """Return NVRTC's version, such as ``(13, 0)``.

    Raises:
        InputError: when CuPy or NVRTC is not installed.
    """
    try:
        from cupy_backends.cuda.libs import nvrtc

        major, minor = nvrtc.getVersion()
    except (ImportError, OSError, RuntimeError) as error:
        got = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        remedy = "pip install 'q4kd[cuda13]' nvidia-cuda-nvrtc, or use --device cpu"
        raise InputError("CUDA kernels", expected="CuPy with NVRTC", got=got, remedy=remedy) from error
    return int(major), int(minor)


def compile_source(source: Source, arch: str) -> bytes:
    """Compile to a cubin for an architecture, such as ``sm_90a``.

    Raises:
        CompileError: with the compiler's log.
        InputError: when NVRTC is not installed.
    """
    nvrtc_version()
    from cupy_backends.cuda.libs import nvrtc

    names, texts = [name.encode() for name, _ in source.headers], [text.encode() for _, text in source.headers]
    program = nvrtc.createProgram(source.text, f"{source.name}.cu", texts, names)
    try:
        nvrtc.compileProgram(program, [*OPTIONS, f"-arch={arch}"])
        return bytes(nvrtc.getCUBIN(program))
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program)
        raise CompileError(f"{source.name}.cu for {arch}: {error}\n{log}") from error
    finally:
        nvrtc.destroyProgram(program)


def cache_key(source: Source, arch: str, version: tuple[int, int]) -> str:
    """Return the hexadecimal SHA-256 of everything a cubin depends on."""
    digest = hashlib.sha256()
    parts = [source.name, source.text, *(part for header in source.headers for part in header)]
    for part in (*parts, *OPTIONS, arch, f"{version[0]}.{version[1]}"):
        digest.update(hashlib.sha256(part.encode()).digest())
    return digest.hexdigest()


def cache_folder(name: str = "cubin") -> Path | None:
    """Return this user's private folder of compiled code, made if need be; ``None`` where it cannot be made.

    Args:
        name: what it holds: cubins, or what torch.compile makes.

    Raises:
        InputError: when the folder is there but a link, another user's, or open to others: code is loaded from it.
    """
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "q4kd" / name
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        got = f"mode {found.st_mode & 0o7777:04o}, owner {found.st_uid}"
        remedy = "remove it, or set XDG_CACHE_HOME to a folder of your own"
        raise InputError(str(folder), expected="a folder of mode 0700 owned by you", got=got, remedy=remedy)
    return folder


def read_cached(path: Path) -> bytes | None:
    """Return a cached cubin, or ``None`` when it is missing, damaged, a link or another user's."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.getuid() or found.st_size > _MAX_CUBIN_BYTES:
            return None
        data = file.read(_MAX_CUBIN_BYTES)
    digest, cubin = data[:_DIGEST_BYTES], data[_DIGEST_BYTES:]
    return cubin if cubin and hashlib.sha256(cubin).digest() == digest else None


def load_cubin(name: str, arch: str) -> bytes:
    """Return the cubin of one of ``MODULES`` for an architecture, from the cache or compiled now.

    Raises:
        CompileError: with the compiler's log.
        InputError: when NVRTC is missing or the cache folder is not private.
    """
    source = read_source(name)
    folder = cache_folder()
    path = None if folder is None else folder / f"{cache_key(source, arch, nvrtc_version())}.cubin"
    cached = None if path is None else read_cached(path)
    if cached is not None:
        return cached
    with wall.phase("compile", f"CUDA kernels {name}"):
        cubin = compile_source(source, arch)
    if path is not None:
        with contextlib.suppress(OSError):  # A full disk costs the next start a compilation and no more.
            write_atomic(path, hashlib.sha256(cubin).digest() + cubin)
    return cubin
