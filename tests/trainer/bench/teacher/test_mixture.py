"""The parts of the mixture's bench that need no GPU: its shapes, its count of work, its lines, its command."""

import dataclasses
import math

import pytest

from q4kd.trainer.bench.interleave import Shape
from q4kd.trainer.bench.synthetic_30b_a3b import make_tensors, qwen3_30b_a3b, tensor_types
from q4kd.trainer.bench.synthetic_35b_a3b import qwen36_35b_a3b
from q4kd.trainer.errors import InputError


def test_the_synthetic_file_is_as_large_as_the_real_one() -> None:
    from q4kd.trainer.formats.blocks.layout import block_format
    from q4kd.trainer.formats.tensor_shapes import expected_shapes

    config = qwen3_30b_a3b()
    shapes, total = expected_shapes(config), 0
    for name, type_name in tensor_types(config).items():
        rows = math.prod(shapes[name][:-1])
        total += rows * block_format(type_name).row_bytes(shapes[name][-1])
    # Qwen3-30B-A3B-Q4_K_M.gguf as people download it has 18.56 GB.
    assert 18.5e9 < total < 18.6e9


def test_the_synthetic_gpt_oss_is_as_large_as_the_real_one() -> None:
    from q4kd.trainer.bench.synthetic_gpt_oss import gpt_oss_20b, tensor_types
    from q4kd.trainer.formats.blocks.layout import block_format
    from q4kd.trainer.formats.tensor_shapes import expected_shapes

    config = gpt_oss_20b()
    shapes, types = expected_shapes(config), tensor_types(config)
    counts = {name: list(types.values()).count(name) for name in ("F32", "Q8_0", "MXFP4")}
    total = sum(
        math.prod(shape[:-1]) * block_format(types[name]).row_bytes(shape[-1]) for name, shape in shapes.items()
    )
    # What llama.cpp says of ggml-org's gpt-oss-20b-mxfp4.gguf: tensors by type, 20.91 B weights in 11.27 GiB.
    assert counts == {"F32": 289, "Q8_0": 98, "MXFP4": 72}
    assert abs(sum(math.prod(shape) for shape in shapes.values()) / 1e9 - 20.91) < 0.005
    assert abs(total / 2**30 - 11.27) < 0.02


def test_made_tensors_of_gpt_oss_have_the_scale_of_trained_ones() -> None:
    import torch

    from q4kd.trainer.bench.synthetic_gpt_oss import gpt_oss_20b, make_tensors
    from q4kd.trainer.formats.blocks.decode import decode_rows

    config = dataclasses.replace(gpt_oss_20b(1), hidden_size=320, vocab_size=300, num_experts=3, expert_ffn_size=320)
    tensors = make_tensors(config, torch.device("cpu"))
    for name in ("blk.0.ffn_down_exps.weight", "blk.0.attn_q.weight"):
        tensor = tensors[name]
        decoded = decode_rows(tensor.type, tensor.packed, torch.empty(len(tensor.packed), tensor.shape[-1]))
        assert 0.01 < float(decoded.std()) < 0.04 and abs(float(decoded.mean())) < 0.002, name


def test_the_hybrid_has_its_tensors_and_weights() -> None:
    from q4kd.trainer.formats.tensor_shapes import expected_shapes

    config = qwen36_35b_a3b()
    shapes = expected_shapes(config)
    types = tensor_types(config)
    assert set(shapes) == set(types)  # it has no biases of attention
    total = sum(math.prod(shape) for shape in shapes.values())
    idle = 40 * 248 * 3 * 512 * 2048
    # 34.7 G weights, of which a token is multiplied by 2.9 G and looks 0.5 G up: "35B-A3B".
    assert 34.5e9 < total < 35e9 and 3.2e9 < total - idle < 3.6e9
    assert types["blk.0.ssm_conv1d.weight"] == types["blk.0.ssm_a"] == "F32" and types["blk.0.ssm_out.weight"] == "Q4_K"


def test_made_tensors_have_their_types_sizes() -> None:
    import torch

    from q4kd.trainer.formats.blocks.layout import block_format

    config = dataclasses.replace(qwen3_30b_a3b(1), hidden_size=256, vocab_size=300, num_experts=3, expert_ffn_size=256)
    tensors = make_tensors(config, torch.device("cpu"))
    assert tensors["blk.0.ffn_down_exps.weight"].shape == (3, 256, 256)
    assert tensors["blk.0.ffn_gate_inp.weight"].type == "F32"
    for tensor in tensors.values():
        rows, cols = math.prod(tensor.shape[:-1]), tensor.shape[-1]
        assert tensor.packed.nbytes == rows * block_format(tensor.type).row_bytes(cols), tensor.name


def test_work_is_counted_from_the_shapes() -> None:
    pytest.importorskip("transformers")
    from q4kd.trainer.bench.teacher.mixture import parse_shapes, work_of

    found = work_of(qwen3_30b_a3b(), Shape(4, 2048))
    attention, experts = 2 * 2048 * 4096 + 2 * 2048 * 512, 3 * 8 * 768 * 2048
    weights = 48 * (attention + 128 * 2048 + experts) + 151936 * 2048
    assert found["flop"] == 2 * weights * 8192 + 2 * 48 * 4096 * 4 * 2048**2
    assert found["decoded_expert_bytes"] == 2 * 48 * 128 * 3 * 768 * 2048
    windowed = dataclasses.replace(qwen3_30b_a3b(), windows=(128, 0) * 24)
    assert found["flop"] - work_of(windowed, Shape(4, 2048))["flop"] == 2 * 24 * 4096 * 4 * 2048 * (2048 - 256)
    hybrid = work_of(qwen36_35b_a3b(4), Shape(1, 2048))
    rule, attention = 3 * 2048 * 32 * 163_840, 2 * 16 * 256 * 2048**2
    products = hybrid["flop"] - rule - attention
    per_token = 3 * (12288 + 64 + 2048 * 2) * 2048 + (8192 + 1024 + 4096) * 2048 + 3 * 8192 * 4
    per_token += 4 * (256 + 9 * 3 * 512) * 2048 + 248320 * 2048
    assert products == 2 * 2048 * per_token
    assert parse_shapes("4x2048,1x7") == [Shape(4, 2048), Shape(1, 7)]


@pytest.mark.parametrize("shape", ["qwen3-30b-a3b", "gpt-oss-20b"])
def test_a_mixture_is_timed_on_cuda_only(shape: str) -> None:
    import argparse

    from q4kd.trainer.cli.bench import add_commands

    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers())
    args = parser.parse_args(["bench", "teacher", "--shape", shape])
    with pytest.raises(InputError, match="expected --device cuda, got cpu"):
        args.run(args)
