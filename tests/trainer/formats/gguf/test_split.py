"""Split models are read as one, whichever shard is named, and what is not whole is refused by name."""

import json
import os
import shutil
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from model_files import write_model
from teachers import load_quietly

from q4kd.harness.__main__ import main
from q4kd.harness.inputs.models.split_models import BROKEN_SPLITS, shards, write_split
from q4kd.harness.inputs.models.synthetic_models import MODELS, write_small_model
from q4kd.trainer.errors import FileChangedError, InputError
from q4kd.trainer.files import sha256_file
from q4kd.trainer.formats.gguf import split
from q4kd.trainer.formats.open import open_model
from q4kd.trainer.teacher.cuda.load import arena_layout, file_chunks, fill_arena


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, three shards of it, as many of another split, and four whose first has no tensors."""
    folder = tmp_path_factory.mktemp("split")
    write_small_model(folder / "whole.gguf", MODELS["llama3"])
    write_split(folder / "three", folder / "whole.gguf", tensors=12)
    write_split(folder / "other", folder / "whole.gguf", tensors=14)
    write_split(folder / "four", folder / "whole.gguf", tensors=14, empty_first=True)
    return folder


@pytest.mark.parametrize(("name", "count"), [("three", 3), ("four", 4)])
def test_any_shard_stands_for_the_whole_model(made: Path, name: str, count: int) -> None:
    whole, paths = open_model(made / "whole.gguf"), shards(made / name)
    assert len(paths) == count
    for named in paths:
        model = open_model(named)
        assert (model.config, dict(model.metadata)) == (whole.config, dict(whole.metadata))
        assert list(model.tensors) == list(whole.tensors)
        for tensor, same in zip(model.tensors.values(), whole.tensors.values(), strict=True):
            assert np.array_equal(tensor.data, same.data) and (tensor.type, tensor.shape) == (same.type, same.shape)
        assert model.path == paths[0] and [file.path for file in model.files] == paths
        assert model.file_bytes == sum(path.stat().st_size for path in paths)
        assert model.tensor_bytes == whole.tensor_bytes


def test_commands_take_a_shard_for_the_model(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(made / "three")  # a bare name has no folder
    named, whole = shards(made / "three")[2].name, made / "whole.gguf"
    said = []
    for path in (named, whole):
        assert main(["inspect", str(path), "--json"]) == 0
        said.append(json.loads(capsys.readouterr().out))
    assert said[0].pop("file_bytes") > said[1].pop("file_bytes")
    assert {**said[0], "file": ""} == {**said[1], "file": ""}
    np.save(tmp_path / "ids.npy", np.arange(9))
    for path, out in ((named, "split"), (whole, "whole")):
        words = ["--ids", str(tmp_path / "ids.npy"), "--out", str(tmp_path / f"{out}.npy"), "--dtype", "float32"]
        assert main(["logits", str(path), *words]) == 0
    assert (tmp_path / "split.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()


def test_links_are_followed_by_their_own_names(made: Path, tmp_path: Path) -> None:
    """The cache of huggingface_hub links such names to files that are named by digest."""
    for path in shards(made / "three"):
        (tmp_path / path.name).symlink_to(shutil.copyfile(path, tmp_path / sha256_file(path)))
    assert len(open_model(shards(tmp_path)[1]).files) == 3


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("missing shard", "expected all 3 shards beside it, got 2 of them: model-00002-of-00003.gguf missing"),
        (
            "copied shard",
            r"00002-of-00003.gguf: expected (shard 2 of 3 \(split.no 1\), got shard 3|the name .*)",
        ),
        ("swapped shards", r"0000[23]-of-00003.gguf: expected (shard 2 of 3 \(split.no 1\), got shard 3|the name .*)"),
        ("renamed shards", "expected the name model-0000.-of-00003.gguf for shard . of 3, which it says it is, got"),
        ("foreign shard", r"tensor blk.*: expected each tensor once, got one in model-00002-of-00003.gguf as well"),
        ("wrong total", r"expected 32 tensors in its 3 shards \(split.tensors.count\), got 31"),
        ("another total", "00002-of-00003.gguf: split.tensors.count: expected a shard of the model of .*is 31, got 1"),
        ("truncated shard", r"model-00003-of-00003.gguf: tensor .* truncated"),
    ],
)
def test_what_is_not_whole_is_refused_by_name(made: Path, tmp_path: Path, case: str, words: str) -> None:
    shutil.copytree(made / "three", tmp_path / "bad")
    BROKEN_SPLITS[case](shards(tmp_path / "bad"), shards(made / "other"))
    assert len(BROKEN_SPLITS) == 8
    for named in shards(tmp_path / "bad"):
        with pytest.raises(InputError, match=words) as caught:
            open_model(named)
        assert "\n" not in str(caught.value) and "; " in str(caught.value)


def _part(path: Path, number: object, count: object, total: object = 11, **more: str) -> Path:
    def add(writer: gguf.GGUFWriter) -> None:
        kinds = {int: gguf.GGUFValueType.INT64, str: gguf.GGUFValueType.STRING, float: gguf.GGUFValueType.FLOAT32}
        for key, value in (("split.no", number), ("split.count", count), ("split.tensors.count", total)):
            writer.add_key_value(key, value, kinds[type(value)])
        for key, value in more.items():
            writer.add_string(key.replace("__", "."), value)

    return write_model(path, add)


@pytest.mark.parametrize(
    ("number", "count", "words"),
    [
        (0, 513, "split.count: expected a whole number up to 512, got 513"),
        (0, -3, "split.count: .* got -3"),
        (0, "3", "split.count: .* got '3'"),
        (0, 3.5, "split.count: .* got 3.5"),
        (3, 3, "split.no: expected a whole number up to 2, got 3"),
        ("first", 3, "split.no: .* got 'first'"),
        (1, 3, "expected the name NAME-00002-of-00003.gguf for shard 2 of 3, which it says it is, got m.gguf"),
    ],
)
def test_hostile_numbers_are_refused(tmp_path: Path, number: object, count: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        open_model(_part(tmp_path / "m.gguf", number, count))


def test_the_name_of_a_shard_names_the_others() -> None:
    wanted = [f"q4/big-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    assert split.shard_names("q4/big-00002-of-00003.gguf") == wanted
    for name in ("m.gguf", "m-00004-of-00003.gguf", "m-00000-of-00003.gguf", "m-00001-of-99999.gguf", "m-1-of-3.gguf"):
        assert split.shard_names(name) == [name]


def test_one_of_one_is_no_split(tmp_path: Path) -> None:
    for count in (0, 1):
        assert len(open_model(_part(tmp_path / f"m-{count}.gguf", 0, count)).files) == 1


def test_a_shard_that_says_something_else_of_the_model_is_foreign(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "four", tmp_path / "bad")
    paths = shards(tmp_path / "bad")
    for key in ("general.architecture", "tokenizer.ggml.model"):
        writer = gguf.GGUFWriter(paths[1], "qwen2" if "arch" in key else "llama")
        writer.add_tokenizer_model("gpt2")
        for name, value, kind in zip(
            ("split.no", "split.count", "split.tensors.count"), (1, 4, 31), ("UINT16", "UINT16", "INT32"), strict=True
        ):
            writer.add_key_value(name, value, gguf.GGUFValueType[kind])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(InputError, match=rf"00002-of-00004.gguf: {key}: expected a shard of the model of"):
            open_model(paths[0])


def test_a_pipe_with_a_shards_name_is_not_waited_for(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "three", tmp_path / "bad")
    paths = shards(tmp_path / "bad")
    paths[2].unlink()
    os.mkfifo(paths[2])
    with pytest.raises(InputError, match=r"model-00003-of-00003.gguf missing"):
        open_model(paths[0])


def test_all_headers_share_one_bound(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = shards(made / "three")
    needed = sum(shard.header.data_start for shard in split.open_shards(paths[0]))
    monkeypatch.setattr(split, "MAX_HEADER_BYTES", needed)
    assert len(split.open_shards(paths[1])) == 3
    monkeypatch.setattr(split, "MAX_HEADER_BYTES", needed - 64)
    with pytest.raises(InputError, match=r"00003-of-00003.gguf at byte .* bytes left in the header"):
        split.open_shards(paths[1])


def test_the_identity_is_that_of_all_shards_whatever_they_are_called(made: Path, tmp_path: Path) -> None:
    found = {open_model(path).sha256() for path in shards(made / "three")}
    shutil.copytree(made / "three", tmp_path / "renamed")
    for path in shards(tmp_path / "renamed"):
        path.rename(path.with_name(path.name.replace("model", "other-name")))
    paths = shards(tmp_path / "renamed")
    assert found == {open_model(paths[0]).sha256()} and open_model(made / "whole.gguf").sha256() not in found
    # The last bytes are of an F32 tensor or of a block: another finite value, so another model.
    data = bytearray(paths[2].read_bytes())
    data[-64] ^= 1
    paths[2].write_bytes(data)
    assert open_model(paths[0]).sha256() not in found


@pytest.mark.parametrize("number", [0, 2])
def test_a_shard_that_is_changed_in_use_is_named(made: Path, tmp_path: Path, number: int) -> None:
    shutil.copytree(made / "three", tmp_path / "used")
    paths = shards(tmp_path / "used")
    teacher = load_quietly(paths[1], dtype="float32")
    teacher.model.check_unchanged()
    os.truncate(paths[number], paths[number].stat().st_size - 32)
    with pytest.raises(FileChangedError, match=f"model-0000{number + 1}-of-00003.gguf: expected .* were opened"):
        teacher.model.check_unchanged()


def test_every_shard_reaches_the_device(made: Path) -> None:
    import torch

    class HostCopier:
        def __init__(self) -> None:
            self._buffer = torch.empty(1 << 20, dtype=torch.uint8)

        def buffer(self) -> torch.Tensor:
            return self._buffer

        def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
            target.copy_(source)

        def finish(self) -> None:
            pass

    arenas = []
    for path in (made / "whole.gguf", shards(made / "four")[0]):
        model = open_model(path)
        offsets, size = arena_layout(model.tensors)
        arenas.append(torch.zeros(size, dtype=torch.uint8))
        fill_arena(model.files, file_chunks(model, offsets, 1 << 20), arenas[-1], HostCopier)
    assert arenas[0].any() and torch.equal(*arenas)


def test_an_array_is_compared_as_it_is_stored(tmp_path: Path) -> None:
    def add(entries: list[str]) -> Path:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.gguf"
        return write_model(path, lambda writer: writer.add_token_list(entries))

    one, same, other = (open_model(add(list(text))).metadata["tokenizer.ggml.tokens"] for text in ("ab", "ab", "ac"))
    assert one.is_same(same) and not one.is_same(other)
    assert struct.pack("<Q", 1) + b"a" == one._stored[:9].tobytes()
