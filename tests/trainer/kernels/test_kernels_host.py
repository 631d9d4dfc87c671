"""The CUDA kernels' own source against gguf and float64, run by the host compiler's build: no GPU needed.

Memory accesses are checked for alignment and bounds on the way. ``Q4KD_REQUIRE_KERNELS=1`` turns the skip without
a compiler into a failure.
"""

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import kernel_checks as checks
import numpy as np
import pytest
import torch
from host_kernels import KERNELS, HostLauncher, build, host_launcher

from q4kd.trainer.errors import InputError
from q4kd.trainer.formats.blocks.layout import FORMATS
from q4kd.trainer.kernels.launch import Argument, ArgumentBuffer
from q4kd.trainer.kernels.teacher_kernels import Kernels

BF16, F32 = torch.bfloat16, torch.float32


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> HostLauncher:
    return host_launcher(tmp_path_factory)


@pytest.fixture
def kernels(launcher: HostLauncher) -> Kernels:
    return Kernels("cpu", launcher)


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("name", checks.TYPES)
def test_decode_equals_gguf(kernels: Kernels, name: str, dtype: torch.dtype) -> None:
    checks.decode_rows_match(kernels, name, 7, 768, dtype, seed=1)
    if FORMATS[name].block_size <= 32:
        checks.decode_rows_match(kernels, name, 5, 96, dtype, seed=2)
    if name in checks.ELEMENT_TYPES:
        checks.decode_rows_match(kernels, name, 5, 13, dtype, seed=3)


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize(
    ("rows", "cols", "kernels_used"),
    [
        (1, 256, {"run"}),  # 8 blocks: a quarter of a warp's run
        (9, 1024, {"run"}),  # 288 blocks: into a second block of threads
        (11, 2816, {"run"}),  # 968 blocks: the last run is short
        (6, 896, {"run", "blocks"}),  # whole rows only from every second one: 28 blocks each
        (3, 32, {"blocks"}),
    ],
)
def test_q8_0_is_read_in_runs_where_they_are_aligned(
    kernels: Kernels, launcher: HostLauncher, rows: int, cols: int, kernels_used: set[str], dtype: torch.dtype
) -> None:
    launcher.launched.clear()
    checks.decode_rows_match(kernels, "Q8_0", rows, cols, dtype, seed=17)
    assert {"run" if "_run_" in name else "blocks" for name in launcher.launched} == kernels_used


def test_q8_0_at_an_odd_address_is_read_block_by_block(kernels: Kernels, launcher: HostLauncher) -> None:
    packed = checks.random_blocks("Q8_0", 4, 256, seed=18)
    shifted = torch.zeros(packed.size + 16, dtype=torch.uint8)[2 : 2 + packed.size].view(packed.shape)
    shifted.copy_(torch.from_numpy(packed))
    out, buffer = checks.poisoned((4, 256), BF16, kernels.device)
    launcher.launched.clear()
    kernels.decode("Q8_0", shifted, 0, 4, 256, out)
    checks.assert_same_bits(out, checks.expected("Q8_0", packed))
    checks.assert_guarded(buffer)
    assert launcher.launched == {"decode_q8_0_bf16"}


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_repacked_q6_k_equals_gguf(kernels: Kernels, dtype: torch.dtype) -> None:
    checks.decode_repacked_matches(kernels, 5, 768, dtype, seed=4)
    checks.decode_repacked_matches(kernels, 1, 256, dtype, seed=5)


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("name", checks.TYPES)
def test_gather_takes_rows_and_refuses_others(kernels: Kernels, name: str, dtype: torch.dtype) -> None:
    checks.gather_matches(kernels, name, 5, 512, dtype, seed=6)
    if name in checks.ELEMENT_TYPES:
        checks.gather_matches(kernels, name, 5, 13, dtype, seed=7)


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_nvfp4_takes_the_scale_of_its_tensor(kernels: Kernels, dtype: torch.dtype) -> None:
    packed = torch.from_numpy(checks.random_blocks("NVFP4", 3, 128, seed=19))
    out, buffer = checks.poisoned((3, 128), dtype, kernels.device)
    kernels.decode("NVFP4", packed, 0, 3, 128, out, scale=0.0123)
    checks.assert_same_bits(out, checks.expected("NVFP4", packed.numpy()) * np.float32(0.0123))
    checks.assert_guarded(buffer)
    with pytest.raises(ValueError, match="expected 1"):
        kernels.decode("MXFP4", torch.zeros(3, 68, dtype=torch.uint8), 0, 3, 128, out, scale=2.0)


def test_rounding_to_bfloat16(kernels: Kernels) -> None:
    checks.rounding_matches(kernels, step=0x3FFFF)


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("name", ["Q4_K", "Q6_K"])
@pytest.mark.parametrize(
    ("tokens", "rows", "cols"), [(1, 16, 256), (3, 21, 768), (8, 5, 2560), (9, 37, 512), (16, 32, 256)]
)
def test_matvec(kernels: Kernels, name: str, tokens: int, rows: int, cols: int, dtype: torch.dtype) -> None:
    checks.matvec_matches(kernels, name, tokens, rows, cols, dtype, seed=8)


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K"])
@pytest.mark.parametrize("tokens", [2, 11])
def test_matvec_of_many_rows(kernels: Kernels, monkeypatch: pytest.MonkeyPatch, name: str, tokens: int) -> None:
    monkeypatch.setattr("q4kd.trainer.kernels.teacher_kernels.MANY_ROWS", 64)
    checks.matvec_matches(kernels, name, tokens, 83, 768, F32, seed=9)


@pytest.mark.parametrize("out_type", checks.DTYPES)
@pytest.mark.parametrize("delta_type", checks.DTYPES)
@pytest.mark.parametrize("x_type", checks.DTYPES)
@pytest.mark.parametrize("hidden", [2056, 301])
def test_norms(
    kernels: Kernels, hidden: int, x_type: torch.dtype, delta_type: torch.dtype, out_type: torch.dtype
) -> None:
    checks.norms_match(kernels, 2, hidden, x_type, delta_type, out_type)


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize(("bias", "norm"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("head_dim", [16, 128, 80])
@pytest.mark.parametrize("layout", ["split", "interleaved"])
def test_rope(kernels: Kernels, layout: str, head_dim: int, bias: bool, norm: bool, dtype: torch.dtype) -> None:
    checks.rope_matches(kernels, layout, head_dim, dtype, bias=bias, norm=norm)


def test_rope_of_unaligned_rows(kernels: Kernels, launcher: HostLauncher) -> None:
    launcher.launched.clear()
    checks.rope_matches(kernels, "split", 64, BF16, bias=True, norm=True, pad=3)
    assert launcher.launched == {"rope_split_bf16_v1"}


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_swiglu_and_bias(kernels: Kernels, dtype: torch.dtype) -> None:
    for ffn in (8, 520, 37):
        checks.swiglu_matches(kernels, 3, ffn, dtype)
    for columns, offset in ((8, 8), (512, 16), (37, 5), (512, 3)):
        checks.bias_matches(kernels, 3, columns, offset, dtype)


def test_tensors_that_do_not_fit_are_refused_before_any_launch(kernels: Kernels, launcher: HostLauncher) -> None:
    packed, out = torch.zeros(4, 144, dtype=torch.uint8), torch.zeros(4, 256)
    x, vector = torch.zeros(2, 256, dtype=BF16), torch.zeros(256)
    launcher.launched.clear()
    refused = [
        lambda: kernels.decode("Q4_K", packed, 0, 5, 256, torch.zeros(5, 256)),
        lambda: kernels.decode("Q4_K", packed, -1, 3, 256, out),
        lambda: kernels.decode("Q4_K", packed, 0, 4, 512, torch.zeros(4, 512)),
        lambda: kernels.decode("Q4_K", packed, 0, 4, 256, torch.zeros(4, 512)[:, ::2]),
        lambda: kernels.decode("Q4_K", packed, 0, 4, 256, out.half()),
        lambda: kernels.decode("Q4_K", packed[:, ::2], 0, 4, 256, out),
        lambda: kernels.decode("Q4_K", packed.view(-1)[1:145].view(1, 144), 0, 1, 256, torch.zeros(1, 256)),
        lambda: kernels.gather("Q4_K", packed, 256, torch.zeros(4, dtype=torch.int32), out),
        lambda: kernels.repack_q6_k(torch.zeros(211, dtype=torch.uint8)),
        lambda: kernels.repack_q6_k(torch.zeros(210, dtype=torch.uint8), torch.zeros(420, dtype=torch.uint8), 2),
        lambda: kernels.matvec("Q4_K", packed, torch.zeros(17, 256, dtype=BF16), 4, torch.zeros(17, 4)),
        lambda: kernels.matvec("Q8_0", packed, x, 4, torch.zeros(2, 4)),
        lambda: kernels.matvec("Q4_K", packed, x, 5, torch.zeros(2, 5)),
        lambda: kernels.matvec("Q4_K", packed, x.float(), 4, torch.zeros(2, 4)),
        lambda: kernels.matvec("Q4_K", packed, x, 4, torch.zeros(4, 2).T),
        lambda: kernels.rms_norm(x, vector[:255], 1e-6, x),
        lambda: kernels.rms_norm(x, vector.double(), 1e-6, x),
        lambda: kernels.add_rms_norm(x, x[:1], vector, 1e-6, x),
        lambda: kernels.rope(x.view(2, 2, 128), x.view(2, 2, 128), torch.zeros(3, 64), torch.zeros(3, 64), "split"),
        lambda: kernels.rope(x.view(2, 2, 128), x.view(2, 2, 128), torch.zeros(2, 64), torch.zeros(2, 64), "neox"),
        lambda: kernels.swiglu(x, torch.zeros(2, 256, dtype=BF16)),
        lambda: kernels.add_bias(x, vector[:8]),
        lambda: Kernels("meta", launcher).add_bias(x, vector),
    ]
    for index, call in enumerate(refused):
        with pytest.raises(ValueError, match=r"expected|rows|superblocks"):
            call()
            pytest.fail(f"call {index} was accepted")
    with pytest.raises(InputError, match="multiple of 256"):
        kernels.decode("Q4_K", packed, 0, 4, 300, torch.zeros(4, 300))
    with pytest.raises(InputError, match="Q8_1"):
        kernels.decode("Q8_1", packed, 0, 4, 256, out)
    assert not launcher.launched


def test_nothing_to_do_launches_nothing(kernels: Kernels, launcher: HostLauncher) -> None:
    launcher.launched.clear()
    packed = torch.zeros(4, 144, dtype=torch.uint8)
    kernels.decode("Q4_K", packed, 2, 2, 256, torch.zeros(0, 256))
    kernels.gather("Q4_K", packed, 256, torch.zeros(0, dtype=torch.int64), torch.zeros(0, 256))
    kernels.rms_norm(torch.zeros(0, 8), torch.zeros(8), 1e-6, torch.zeros(0, 8))
    assert not launcher.launched


def test_calls_of_equal_facts_are_planned_once_and_get_their_own_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[str] = []
    prepare = Kernels._prepare

    def counted(self: Kernels, declared: Any, *call: Any) -> Any:
        planned.append(declared.__name__)
        return prepare(self, declared, *call)

    monkeypatch.setattr(Kernels, "_prepare", counted)
    launches: list[tuple[list[int], list[int]]] = []

    def record(kernel: str, grid: int, arguments: Sequence[Argument], writes: Sequence[torch.Tensor]) -> None:
        addresses = [value.data_ptr() for value in arguments if isinstance(value, torch.Tensor)]
        launches.append((addresses, [tensor.data_ptr() for tensor in writes]))

    kernels = Kernels("cpu", record)
    a, b, weight = torch.zeros(2, 256), torch.zeros(2, 256), torch.zeros(256)
    kernels.rms_norm(a, weight, 1e-6, a)  # in place first: x and out have equal facts, and may not be one in the plan
    kernels.rms_norm(a, weight, 1e-6, b)
    kernels.rms_norm(b, weight, 1e-6, a)
    assert planned == ["rms_norm"]
    x, y, w = a.data_ptr(), b.data_ptr(), weight.data_ptr()
    assert launches == [([x, w, x], [x]), ([x, w, y], [y]), ([y, w, x], [x])]
    kernels.rms_norm(a, weight, 1e-5, b)
    kernels.rms_norm(a[:1], weight, 1e-6, b[:1])
    odd = torch.zeros(513)[1:].view(2, 256)
    kernels.rms_norm(odd, weight, 1e-6, b)
    assert len(planned) == 4
    with pytest.raises(ValueError, match="weight"):
        kernels.rms_norm(a, weight[:128], 1e-6, b)


def test_prepared_launches_are_bounded(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("q4kd.trainer.kernels.plans._MAX_PREPARED", 3)
    x, bias = torch.ones(8, 16), torch.ones(16)
    for rows in range(1, 9):
        kernels.add_bias(x[:rows], bias)
        assert len(kernels._prepared) <= 3
    assert torch.equal(x[:, 0], torch.tensor([9.0, 8, 7, 6, 5, 4, 3, 2]))


def test_argument_buffer_holds_what_the_driver_reads() -> None:
    tensor = torch.zeros(3)
    arguments: list[Argument] = [tensor, 1 << 40, None, 1e-6, 7]
    buffer = ArgumentBuffer(arguments)
    for factor in (1, 2):
        arguments[1], arguments[3] = factor << 40, factor * 1e-6
        buffer.fill(arguments)
        pointers = (ctypes.c_void_p * 5).from_address(buffer.address)
        words = [ctypes.c_int64.from_address(address or 0).value for address in pointers]
        assert words[:3] == [tensor.data_ptr(), factor << 40, 0]
        assert ctypes.c_float.from_address(pointers[3] or 0).value == float(torch.tensor(factor * 1e-6))
        assert words[4] == 7


FAULTS = [
    ("blocks.cuh", "int chunk = task >> 2", "int chunk = task >> 1", "Q4_K"),
    ("bits.cuh", "bits + 0x7FFFu + ((bits >> 16) & 1u)", "bits + 0x8000u", "Q4_0"),
    ("decode.cuh", "if (block >= count) return;", "", "Q4_K"),
    ("decode.cu", "16 * odd), join", "0), join", "Q8_0"),
    ("decode.cu", "word < blocks * Q8_0::bytes / 16", "word < words", "Q8_0"),
    ("decode.cu", "__syncwarp();", "", "Q8_0"),
    ("decode.cuh", "__syncthreads();", "", "IQ3_S"),
    ("blocks_small.cuh", "if (byte == 0x7Fu) return 0.0f;", "", "NVFP4"),
]


@pytest.mark.parametrize(("file", "text", "fault", "name"), FAULTS)
def test_a_planted_fault_is_seen(
    launcher: HostLauncher, tmp_path: Path, file: str, text: str, fault: str, name: str
) -> None:
    for source in KERNELS.glob("*.cu*"):
        content = source.read_text()
        assert source.name != file or text in content
        (tmp_path / source.name).write_text(content.replace(text, fault) if source.name == file else content)
    broken = Kernels("cpu", HostLauncher(build(tmp_path, tmp_path, decoders_only=True)))
    with pytest.raises(AssertionError):
        checks.decode_rows_match(broken, name, 7, 768, BF16, seed=1)
