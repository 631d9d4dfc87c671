"""NVRTC compiles every kernel for every architecture without a GPU; its results are cached privately and checked."""

import hashlib
import os
from pathlib import Path

import pytest

from q4kd.trainer.errors import InputError
from q4kd.trainer.kernels import compile as nvrtc_compile
from q4kd.trainer.kernels.compile import (
    ARCHITECTURES,
    MODULES,
    CompileError,
    Source,
    architecture,
    cache_folder,
    cache_key,
    compile_source,
    load_cubin,
    nvrtc_version,
    read_source,
)
from q4kd.trainer.kernels.launch import module_of

# Every architecture takes half a minute on two cores; the kernels session sets this.
EVERY = bool(os.environ.get("Q4KD_REQUIRE_KERNELS"))
TINY = Source(
    "tiny", '#include "one.cuh"\nextern "C" __global__ void fill(int* x) { *x = ONE; }', (("one.cuh", "#define ONE 1"),)
)


@pytest.fixture
def nvrtc() -> None:
    try:
        nvrtc_version()
    except InputError as error:
        assert not EVERY, f"the kernels session needs NVRTC: {error}"
        pytest.skip(str(error))


@pytest.fixture
def tiny(nvrtc: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A private cache, a source that compiles in a moment, and the list of what was compiled."""
    compiled: list[str] = []
    real = compile_source

    def counted(source: Source, arch: str) -> bytes:
        compiled.append(arch)
        return real(source, arch)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(nvrtc_compile, "read_source", lambda name: TINY)
    monkeypatch.setattr(nvrtc_compile, "compile_source", counted)
    return compiled


@pytest.mark.parametrize("arch", ARCHITECTURES if EVERY else ["sm_90a"])
@pytest.mark.parametrize("name", MODULES if EVERY else ["elementwise", "routing", "states", "loss_forward_kl"])
def test_kernels_compile(nvrtc: None, name: str, arch: str) -> None:
    cubin = compile_source(read_source(name), arch)
    assert cubin[:4] == b"\x7fELF"
    kernel = {
        "decode": "decode_q4_k_bf16",
        "decode_iq": "gather_iq3_s_f32",
        "elementwise": "rope_split_bf16_v8",
        "experts": "experts_iq4_xs_bf16",
        "experts_iq": "experts_mxfp4_f32",
        "routing": "place_slots",
        "states": "convolve_bf16",
        "matvec": "matvec_q4_k_r1_t1_f32",
        "loss_ce": "loss_fused_ce_f32_bf16_v8",
        "loss_forward_kl": "loss_grad_forward_kl_f32_f32_v1",
        "loss_jsd": "loss_jsd_bf16_v8",
        "loss_reverse_kl": "loss_stats_reverse_kl_f32_v8",
    }[name]
    assert kernel.encode() in cubin
    assert module_of(kernel) == name


def test_every_source_is_a_module() -> None:
    folder = Path(nvrtc_compile.__file__).parent / "src"
    assert {path.stem for path in folder.glob("*.cu")} == set(MODULES)
    assert [name for name, _ in read_source("decode").headers] == [
        "bits.cuh",
        "blocks.cuh",
        "blocks_iq.cuh",
        "blocks_low.cuh",
        "blocks_small.cuh",
        "decode.cuh",
        "experts.cuh",
        "kd_loss.cuh",
        "kd_rows.cuh",
        "reduce.cuh",
        "grids.cuh",
    ]


def test_compiler_log_is_quoted(nvrtc: None) -> None:
    broken = Source("broken", "__global__ void f() { undeclared_name = 1; }", ())
    with pytest.raises(CompileError, match=r"broken\.cu for sm_80(.|\n)*undeclared_name"):
        compile_source(broken, "sm_80")


@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        ((8, 0), "sm_80"),
        ((8, 9), "sm_80"),
        ((9, 0), "sm_90a"),
        ((10, 0), "sm_100"),
        ((12, 0), "sm_120"),
        ((12, 1), "sm_121"),
    ],
)
def test_architecture_of_a_capability(capability: tuple[int, int], arch: str) -> None:
    assert architecture(capability) == arch


def test_old_devices_are_refused() -> None:
    with pytest.raises(InputError, match=r"7\.5"):
        architecture((7, 5))


def test_second_load_reads_the_cache(tiny: list[str]) -> None:
    first = load_cubin("tiny", "sm_80")
    assert load_cubin("tiny", "sm_80") == first
    assert tiny == ["sm_80"]
    load_cubin("tiny", "sm_90a")
    assert tiny == ["sm_80", "sm_90a"]
    folder = cache_folder()
    assert folder is not None
    assert folder.stat().st_mode & 0o777 == 0o700
    stored = (folder / f"{cache_key(TINY, 'sm_80', nvrtc_version())}.cubin").read_bytes()
    assert stored == hashlib.sha256(first).digest() + first


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "link"])
def test_a_damaged_cubin_is_compiled_again(tiny: list[str], tmp_path: Path, damage: str) -> None:
    cubin = load_cubin("tiny", "sm_80")
    folder = cache_folder()
    assert folder is not None
    (path,) = folder.glob("*.cubin")
    stored = path.read_bytes()
    if damage == "link":
        (tmp_path / "elsewhere").write_bytes(stored)
        path.unlink()
        path.symlink_to(tmp_path / "elsewhere")
    else:
        path.write_bytes({"flip": stored[:-1] + bytes([stored[-1] ^ 1]), "cut": stored[:-7], "empty": b""}[damage])
    assert load_cubin("tiny", "sm_80") == cubin
    assert tiny == ["sm_80", "sm_80"]
    assert path.read_bytes() == stored
    assert not path.is_symlink()


def test_key_depends_on_everything() -> None:
    version = (13, 0)
    base = cache_key(TINY, "sm_80", version)
    others = [
        cache_key(TINY, "sm_90a", version),
        cache_key(TINY, "sm_80", (13, 1)),
        cache_key(Source("tiny", TINY.text + " ", TINY.headers), "sm_80", version),
        cache_key(Source("tiny", TINY.text, (("one.cuh", "#define ONE 2"),)), "sm_80", version),
    ]
    assert len({base, *others}) == 5


def test_a_cache_open_to_others_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = cache_folder()
    assert folder is not None
    folder.chmod(0o755)
    with pytest.raises(InputError, match="0700"):
        cache_folder()
    folder.rmdir()
    (tmp_path / "private").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "private")
    with pytest.raises(InputError, match="0700"):
        cache_folder()


def test_no_cache_where_none_can_be_made(tiny: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert cache_folder() is None
    assert load_cubin("tiny", "sm_80")[:4] == b"\x7fELF"
