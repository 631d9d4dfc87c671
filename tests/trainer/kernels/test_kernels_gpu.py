"""The CUDA kernels on a GPU: the checks of test_kernels_host.py at real sizes, on the instructions themselves.

``-k sanitizer`` selects small sizes that touch every kernel, for compute-sanitizer.
"""

import time
from concurrent.futures import ThreadPoolExecutor

import kernel_checks as checks
import pytest
import torch

from q4kd.trainer.formats.blocks.layout import FORMATS
from q4kd.trainer.kernels.teacher_kernels import Kernels

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
BF16, F32 = torch.bfloat16, torch.float32


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    return Kernels("cuda")


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("name", checks.TYPES)
def test_decode_equals_gguf(kernels: Kernels, name: str, dtype: torch.dtype) -> None:
    checks.decode_rows_match(kernels, name, 301, 3584, dtype, seed=1)
    if FORMATS[name].block_size <= 32:
        checks.decode_rows_match(kernels, name, 97, 896, dtype, seed=2)
    if name in checks.ELEMENT_TYPES:
        checks.decode_rows_match(kernels, name, 97, 1013, dtype, seed=3)


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_repacked_q6_k_equals_gguf(kernels: Kernels, dtype: torch.dtype) -> None:
    checks.decode_repacked_matches(kernels, 301, 3584, dtype, seed=4)
    checks.decode_repacked_matches(kernels, 1, 256, dtype, seed=5)


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("name", checks.TYPES)
def test_gather_takes_rows_and_refuses_others(kernels: Kernels, name: str, dtype: torch.dtype) -> None:
    checks.gather_matches(kernels, name, 301, 3584, dtype, seed=6)
    if name in checks.ELEMENT_TYPES:
        checks.gather_matches(kernels, name, 31, 1013, dtype, seed=7)


def test_rounding_to_bfloat16(kernels: Kernels) -> None:
    checks.rounding_matches(kernels, step=0x3FF)  # 4.2 million patterns and the ties around them


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 8, 9, 15, 16])
@pytest.mark.parametrize("name", ["Q4_K", "Q6_K"])
def test_matvec(kernels: Kernels, name: str, tokens: int, dtype: torch.dtype) -> None:
    for rows, cols in ((1, 256), (517, 3584), (16, 18944), (8209, 512)):
        checks.matvec_matches(kernels, name, tokens, rows, cols, dtype, seed=8)


def test_matvec_repeats_to_the_bit(kernels: Kernels) -> None:
    packed = torch.from_numpy(checks.random_blocks("Q4_K", 512, 3584, 9, extreme=False)).cuda()
    x = torch.randn(5, 3584, device="cuda").bfloat16()
    results = []
    for _ in range(20):
        out = torch.full((5, 512), torch.nan, device="cuda")
        kernels.matvec("Q4_K", packed, x, 512, out)
        results.append(out)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("out_type", checks.DTYPES)
@pytest.mark.parametrize("delta_type", checks.DTYPES)
@pytest.mark.parametrize("x_type", checks.DTYPES)
@pytest.mark.parametrize("hidden", [8, 2050, 3584, 8192])
def test_norms(
    kernels: Kernels, hidden: int, x_type: torch.dtype, delta_type: torch.dtype, out_type: torch.dtype
) -> None:
    checks.norms_match(kernels, 67, hidden, x_type, delta_type, out_type)


@pytest.mark.parametrize("dtype", checks.DTYPES)
@pytest.mark.parametrize(("bias", "norm"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("head_dim", [16, 64, 128, 256, 512, 80, 6])
@pytest.mark.parametrize("layout", ["split", "interleaved"])
def test_rope(kernels: Kernels, layout: str, head_dim: int, bias: bool, norm: bool, dtype: torch.dtype) -> None:
    checks.rope_matches(kernels, layout, head_dim, dtype, bias=bias, norm=norm, heads=(28, 4), positions=37, batch=3)


def test_rope_of_unaligned_rows(kernels: Kernels) -> None:
    checks.rope_matches(kernels, "split", 128, BF16, bias=True, norm=True, positions=37, pad=3)


@pytest.mark.parametrize("dtype", checks.DTYPES)
def test_swiglu_and_bias(kernels: Kernels, dtype: torch.dtype) -> None:
    for ffn in (8, 18944, 1021):
        checks.swiglu_matches(kernels, 67, ffn, dtype)
    for columns, offset in ((512, 4096), (3584, 0), (37, 5), (512, 3)):
        checks.bias_matches(kernels, 67, columns, offset, dtype)


def test_launches_follow_torch_streams(kernels: Kernels) -> None:
    # A launch on another stream than torch's current one would read the input before the slow kernel has written it.
    packed = torch.from_numpy(checks.random_blocks("F32", 64, 4096, 10)).cuda()
    side = torch.cuda.Stream()
    out = torch.full((64, 4096), torch.nan, device="cuda")
    staging = torch.zeros_like(packed)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        staging.copy_(packed)
        kernels.decode("F32", staging, 0, 64, 4096, out)
    side.synchronize()
    assert torch.equal(out.view(torch.int32), packed.view(torch.int32))


def test_launches_from_several_threads(kernels: Kernels) -> None:
    packed = checks.random_blocks("Q4_K", 64, 4096, 19)
    on_device, want = torch.from_numpy(packed).cuda(), checks.expected("Q4_K", packed)
    torch.cuda.synchronize()
    outs = torch.full((8, 16, 4096), torch.nan, device="cuda")

    def decode(worker: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for turn in range(200):
                row = (worker * 7 + turn) % 48
                kernels.decode("Q4_K", on_device, row, row + 16, 4096, outs[worker])
            torch.cuda.current_stream().synchronize()

    torch.cuda.synchronize()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(decode, range(8)))
    for worker in range(8):
        row = (worker * 7 + 199) % 48
        checks.assert_same_bits(outs[worker], want[row : row + 16])


def test_kernels_allocate_nothing(kernels: Kernels) -> None:
    packed = torch.zeros(512, 2016, dtype=torch.uint8, device="cuda")
    out = torch.empty(512, 3584, dtype=BF16, device="cuda")
    kernels.decode("Q4_K", packed, 0, 512, 3584, out)
    torch.cuda.synchronize()
    before, free = torch.cuda.memory_stats()["allocation.all.allocated"], torch.cuda.mem_get_info()[0]
    for _ in range(50):
        kernels.decode("Q4_K", packed, 0, 512, 3584, out)
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert torch.cuda.mem_get_info()[0] == free


def test_a_launch_is_cheap(kernels: Kernels) -> None:
    # 28 layers of about ten launches: at 20 microseconds each they would cost a small batch more than its arithmetic.
    x = torch.zeros(1, 512, dtype=BF16, device="cuda")
    bias = torch.zeros(512, device="cuda")
    for _ in range(100):
        kernels.add_bias(x, bias)
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(1000):
        kernels.add_bias(x, bias)
    torch.cuda.synchronize()
    each = (time.perf_counter() - started) / 1000
    print(f"{each * 1e6:.1f} us a launch, from Python")
    assert each < 100e-6


def test_sanitizer_decode(kernels: Kernels) -> None:
    for name in checks.TYPES:
        for dtype in checks.DTYPES:
            checks.decode_rows_match(kernels, name, 7, 768, dtype, seed=11)
            checks.gather_matches(kernels, name, 7, 768, dtype, seed=12)
    for rows, cols in ((11, 2816), (6, 896), (3, 32)):  # Q8_0 in runs, in both ways, block by block
        checks.decode_rows_match(kernels, "Q8_0", rows, cols, BF16, seed=17)
    for name in checks.ELEMENT_TYPES:
        checks.decode_rows_match(kernels, name, 7, 13, BF16, seed=13)
        checks.gather_matches(kernels, name, 7, 13, BF16, seed=14)
    checks.decode_repacked_matches(kernels, 7, 768, BF16, seed=15)


def test_sanitizer_products(monkeypatch: pytest.MonkeyPatch) -> None:
    for many_rows in (8192, 16):
        fresh = Kernels("cuda")  # plans made for the other value hold no more
        monkeypatch.setattr("q4kd.trainer.kernels.teacher_kernels.MANY_ROWS", many_rows)
        for name in ("Q4_K", "Q6_K"):
            for tokens in (3, 11):
                for dtype in checks.DTYPES:
                    checks.matvec_matches(fresh, name, tokens, 83, 2560, dtype, seed=16)


def test_sanitizer_elementwise(kernels: Kernels) -> None:
    for hidden in (2056, 301):
        for x_type, delta_type, out_type in ((BF16, BF16, BF16), (F32, BF16, BF16), (F32, F32, F32)):
            checks.norms_match(kernels, 3, hidden, x_type, delta_type, out_type)
    for layout in ("split", "interleaved"):
        for head_dim in (128, 80):
            for dtype in checks.DTYPES:
                checks.rope_matches(kernels, layout, head_dim, dtype, bias=True, norm=True)
    for dtype in checks.DTYPES:
        for size in (520, 37):
            checks.swiglu_matches(kernels, 3, size, dtype)
            checks.bias_matches(kernels, 3, size, 8, dtype)
