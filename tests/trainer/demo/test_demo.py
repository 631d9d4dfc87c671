"""The shipped demo: its files agree with one another, with its card, and with the code that makes it."""

import hashlib
import importlib.metadata
import json
import math
import platform

import gguf
import numpy as np
import pytest

from q4kd.harness.oracles.reference import read_gguf, reference_logits
from q4kd.trainer import demo
from q4kd.trainer.data.documents import is_held_out
from q4kd.trainer.errors import InputError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from q4kd.trainer.demo import make_teacher  # noqa: E402
from q4kd.trainer.demo.corpus import read_texts, source_files, token_bytes, token_stream, windows  # noqa: E402
from q4kd.trainer.demo.train import held_out_loss, student_config, teacher_config  # noqa: E402


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def dequantised():
    model = transformers.Qwen2ForCausalLM(teacher_config()).eval()
    make_teacher._load_dequantised(model, demo.teacher_path())
    return model


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.Tokenizer.from_file(str(demo.student_path() / "tokenizer.json"))


def test_split_is_by_path_and_fixed():
    assert not is_held_out("json/decoder.py")
    names = [f"folder/file{number}.py" for number in range(5000)]
    held = [name for name in names if is_held_out(name)]
    assert held == [name for name in names if hashlib.sha256(name.encode()).digest()[0] % 10 == 0]
    assert 0.08 < len(held) / len(names) < 0.125
    assert is_held_out("bad\udcff") in (True, False)  # a file name that is not UTF-8


def test_source_files(tmp_path):
    for name in (
        "b.py",
        "a/c.py",
        "test/t.py",
        "a/__pycache__/x.py",
        "site-packages/y.py",
        "_sysconfigdata_x.py",
        "n.txt",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x = '\xff'\n")
    assert source_files(tmp_path) == ["a/c.py", "b.py"]
    assert sorted(read_texts(tmp_path, held_out=False) + read_texts(tmp_path, held_out=True)) == ["x = '\ufffd'\n"] * 2
    with pytest.raises(InputError, match="Python source files"):
        source_files(tmp_path / "test" / "none")


def test_windows_are_disjoint_and_spread():
    stream = np.arange(103, dtype=np.int32)
    cut = windows(stream, 9)
    np.testing.assert_array_equal(cut.ravel(), np.arange(100))
    np.testing.assert_array_equal(windows(stream, 9, 3)[:, 0], [0, 40, 90])
    np.testing.assert_array_equal(windows(stream, 9, 99), cut)


def test_shipped_size():
    folder = demo.teacher_path().parent
    shipped = [demo.teacher_path(), demo.golden_path(), folder / "demo.json", *demo.student_path().iterdir()]
    assert sum(path.stat().st_size for path in shipped) <= 4_000_000
    assert sorted(path.name for path in demo.student_path().iterdir()) == [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]


def test_teacher_is_what_the_card_says():
    card, reader = demo.card(), gguf.GGUFReader(demo.teacher_path())
    assert hashlib.sha256(demo.teacher_path().read_bytes()).hexdigest() == card["teacher_sha256"]
    assert card["teacher_bytes"] == demo.teacher_path().stat().st_size
    assert sum(tensor.n_elements for tensor in reader.tensors) == card["training"]["parameters"]
    kinds = {}
    for tensor in reader.tensors:
        kinds[tensor.tensor_type.name] = kinds.get(tensor.tensor_type.name, 0) + 1
    assert kinds == {kind: entry["tensors"] for kind, entry in card["round_trip_error"].items()}
    assert card["round_trip_error"]["Q4_K"]["worst"] < 0.08
    assert card["round_trip_error"]["Q6_K"]["worst"] < 0.02
    assert card["round_trip_error"]["F32"]["worst"] == 0
    assert card["training"]["finished"]


def test_quantising_cost_the_teacher_next_to_nothing_and_it_knows_something():
    held_out = demo.card()["held_out"]
    before, after = held_out["float32"], held_out["q4_k_m"]
    assert before["tokens"] == after["tokens"] >= 100_000
    assert abs(after["nats_per_token"] - before["nats_per_token"]) < 0.02
    assert after["nats_per_token"] < 0.5 * math.log(2048)  # half of what guessing costs


def test_card_loss_is_reproduced(dequantised, tokenizer):
    """A few of the card's windows, on this interpreter's library: near the card's loss, far from chance."""
    held_out = token_stream(tokenizer, read_texts(demo.data_path(), held_out=True))
    loss = held_out_loss(dequantised, windows(held_out, 256, 24), token_bytes(tokenizer))
    expected = demo.card()["held_out"]["q4_k_m"]
    assert loss["tokens"] == 24 * 256
    assert loss["nats_per_token"] == pytest.approx(expected["nats_per_token"], abs=0.4)
    assert loss["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], abs=0.3)


def test_golden_logits_are_those_of_transformers(dequantised):
    with np.load(demo.golden_path(), allow_pickle=False) as golden:
        ids, logits = golden["ids"], golden["logits"]
    assert (ids.dtype, ids.shape, logits.dtype, logits.shape) == (np.int32, (64,), np.float32, (64, 2048))
    with torch.no_grad():
        other = dequantised(input_ids=torch.from_numpy(ids.astype(np.int64))[None]).logits[0].numpy()
    assert np.linalg.norm(other - logits) < 1e-5 * np.linalg.norm(logits)
    assert logits.std(axis=-1).min() > 0.1  # not constant


def test_golden_logits_are_reproduced_by_the_harness_reference():
    with np.load(demo.golden_path(), allow_pickle=False) as golden:
        again = reference_logits(read_gguf(demo.teacher_path()), golden["ids"][:16])
        np.testing.assert_allclose(again, golden["logits"][:16], rtol=1e-5, atol=1e-5)


def test_golden_text_is_held_out(tokenizer):
    with np.load(demo.golden_path(), allow_pickle=False) as golden:
        text = tokenizer.decode(golden["ids"].tolist(), skip_special_tokens=False)
    assert len(set(text)) > 10
    # The card's interpreter had this text; another version of the library may not.
    if demo.card()["training"]["python"] == platform.python_version():
        assert any(text[:60] in held for held in read_texts(demo.data_path(), held_out=True))


def test_student_and_teacher_share_the_vocabulary(tokenizer):
    fields = gguf.GGUFReader(demo.teacher_path()).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert {token: index for index, token in enumerate(tokens)} == tokenizer.get_vocab()
    assert len(tokens) == 2048
    assert fields["tokenizer.ggml.pre"].contents() == "qwen2"


def test_auto_tokenizer_encodes_as_tokenizer_json_does(tokenizer):
    """transformers replaces a qwen2 folder's pre-tokenizer by Qwen2's own; ours must therefore be that one."""
    auto = transformers.AutoTokenizer.from_pretrained(demo.student_path(), local_files_only=True)
    text = "def f(x):\n\n    return x  +  12345 # it's ünïcode\n\t\tself.__init__()\r\n"
    assert auto(text)["input_ids"] == tokenizer.encode(text).ids
    assert auto.decode(tokenizer.encode(text).ids) == text
    assert auto.eos_token_id == 0


def test_student_config_loads_and_is_smaller():
    config = transformers.AutoConfig.from_pretrained(demo.student_path(), local_files_only=True)
    model = transformers.AutoModelForCausalLM.from_config(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert config.model_type == "qwen2"
    assert config.tie_word_embeddings
    assert config.hidden_size == student_config().hidden_size == 128
    assert json.loads((demo.student_path() / "config.json").read_text())["rope_theta"] == 10000.0
    assert parameters * 5 < demo.card()["training"]["parameters"]


def test_making_a_teacher_end_to_end(tmp_path):
    """Two steps on a small corpus: every shipped file is written, whole and consistent."""
    corpus, out = tmp_path / "corpus", tmp_path / "out"
    corpus.mkdir()
    for name in ["argparse.py", "ast.py", "inspect.py", "typing.py", "pydoc.py"]:
        (corpus / name).write_text((demo.data_path() / name).read_text(encoding="utf-8"), encoding="utf-8")
    for number in range(60):  # some of these names are held out
        (corpus / f"copy{number}.py").write_text((demo.data_path() / "ast.py").read_text(encoding="utf-8")[:4000])
    arguments = ["--out", str(out), "--steps", "2", "--batch", "2", "--eval-windows", "4", "--corpus", str(corpus)]
    assert make_teacher.main(arguments) == 0
    card = json.loads((out / "demo.json").read_text())
    assert card["training"]["steps"] == 2
    assert card["training"]["tokens"] == 2 * 2 * 256
    assert card["versions"]["gguf"] == importlib.metadata.version("gguf")
    with np.load(out / "golden.npz", allow_pickle=False) as golden:
        assert golden["logits"].shape == (64, 2048)
    assert (out / "student" / "tokenizer.json").read_bytes() == (out / "float" / "tokenizer.json").read_bytes()
