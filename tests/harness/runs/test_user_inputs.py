"""Real files in the place of made ones: what is accepted, what the 7B experiments then run on, what is recorded."""

import json
import shutil
from pathlib import Path

import pytest

from q4kd.harness.bundle.recheck import given_differences
from q4kd.harness.claims.plan import Plan, make_plan
from q4kd.harness.claims.profile import load_profile
from q4kd.harness.inputs.models.split_models import shards, write_split
from q4kd.harness.records.redact import redact
from q4kd.harness.runs import user_inputs as module
from q4kd.harness.runs.experiment import Inputs, get_experiment
from q4kd.harness.runs.runner import ExperimentRunner
from q4kd.harness.runs.user_inputs import REPLACES, GivenFiles, choose_gguf, resolve_given
from q4kd.trainer.demo import student_path, teacher_path
from q4kd.trainer.errors import InputError
from q4kd.trainer.files import sha256_file


def refuse(path: Path) -> None:
    raise AssertionError(f"{path} was made although it was given")


@pytest.fixture
def given(tmp_path: Path) -> GivenFiles:
    (tmp_path / "words.txt").write_text("some words")
    return resolve_given(str(teacher_path()), str(student_path()), str(tmp_path / "words.txt"))


@pytest.mark.parametrize("name", ["load-teacher-7b", "teacher-busy-7b", "distill-7b", "distill-7b-long"])
def test_the_7b_experiments_run_on_the_given_files(tmp_path: Path, given: GivenFiles, name: str) -> None:
    inputs = Inputs(tmp_path / "inputs", "h200", given)
    words = get_experiment(name).arms[0].argv(inputs)
    assert str(teacher_path()) in words
    if name.startswith("distill"):
        assert words[words.index("--student") + 1] == str(student_path())
        assert words[words.index("--data") + 1] == str(tmp_path / "words.txt")
    assert not list((tmp_path / "inputs").glob("teacher-7b*"))


def test_a_given_name_is_never_made_and_others_still_are(tmp_path: Path, given: GivenFiles) -> None:
    inputs = Inputs(tmp_path / "inputs", "cpu", given)
    for name, role in REPLACES.items():
        assert inputs.file(name, refuse) == getattr(given, role)
    assert inputs.file("other.txt", lambda path: path.write_text("x")).read_text() == "x"
    digests = inputs.digests()
    assert digests["given/teacher/teacher-q4_k_m.gguf"]["sha256"] == sha256_file(teacher_path())
    assert digests["given/data/words.txt"]["bytes"] == 10
    assert "given/student/student/config.json" in digests
    assert "other.txt" in digests
    assert Inputs(tmp_path / "inputs", "cpu").file("argparse.txt", lambda path: path.write_text("y")).is_file()


def test_no_path_of_a_given_file_gets_into_a_record(tmp_path: Path, given: GivenFiles) -> None:
    runner = ExperimentRunner(tmp_path / "bundle", Inputs(tmp_path / "inputs", "cpu", given), "cpu")
    places = runner._placeholders(tmp_path / "bundle" / "runs" / "x")
    told = f"teacher {teacher_path()}, student {student_path()}/config.json, data {tmp_path / 'words.txt'}"
    assert redact(told, places) == "teacher {teacher}, student {student}/config.json, data {data}"


def test_the_plan_and_the_digests_must_name_the_same_files(given: GivenFiles, tmp_path: Path) -> None:
    plan = make_plan([], load_profile("cpu"), given=given.names())
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    digests = given.digests()
    assert given_differences(plan, digests) == []
    (lost,) = given_differences(plan, {name: entry for name, entry in digests.items() if "/data/" not in name})
    (secret,) = given_differences(make_plan([], load_profile("cpu")), {"given/teacher/x.gguf": {}})
    assert "no digest of given/data/words.txt" in lost
    assert "given/teacher/x.gguf is not named" in secret
    with pytest.raises(InputError):
        Plan.from_json({**plan.to_json(), "given": {"optimiser": "x"}})
    with pytest.raises(InputError):
        Plan.from_json({**plan.to_json(), "given": ["x"]})


@pytest.mark.parametrize(
    ("role", "text", "said"),
    [
        ("teacher", "no/such/file.gguf", "org/name"),
        ("teacher", "folder", "a folder"),
        ("teacher", "words.txt", "a GGUF file"),
        ("teacher", "cut.gguf", "cut.gguf"),
        ("student", "empty", "config.json"),
        ("student", "../../etc:passwd", "org/name"),
        ("data", "org/name", "existing path"),
    ],
)
def test_what_is_not_what_its_role_needs_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, role: str, text: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "words.txt").write_text("some words")
    (tmp_path / "cut.gguf").write_bytes(teacher_path().read_bytes()[:100_000])
    with pytest.raises(InputError, match=said):
        resolve_given(**{"teacher": None, "student": None, "data": None, role: text})


def hub_cache(root: Path, repository: str, files: dict[str, Path]) -> None:
    """Lay files out as the hub client's cache does: snapshots of one commit, named by a ref."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    folder = root / f"models--{repository.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(commit)
    (folder / "snapshots" / commit).mkdir(parents=True)
    for name, source in files.items():
        shutil.copyfile(source, folder / "snapshots" / commit / name)


def test_a_hub_id_is_found_in_the_local_cache_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    for function in ("hf_hub_download", "snapshot_download"):
        real = getattr(huggingface_hub, function)
        monkeypatch.setattr(
            huggingface_hub, function, lambda *args, real=real, **kw: real(*args, **kw, cache_dir=tmp_path)
        )
    hub_cache(tmp_path, "acme/big-gguf", {"big-q4_k_m.gguf": teacher_path(), "big-q8_0.gguf": teacher_path()})
    hub_cache(tmp_path, "acme/small", {path.name: path for path in student_path().iterdir()})
    found = resolve_given("acme/big-gguf", "acme/small", None)
    assert found.names()["teacher"] == "big-q4_k_m.gguf"
    assert found.student is not None and (found.student / "tokenizer.json").is_file()
    assert resolve_given("acme/big-gguf:big-q8_0.gguf", None, None).names() == {"teacher": "big-q8_0.gguf"}
    write_split(tmp_path / "split", teacher_path(), tensors=40)
    hub_cache(tmp_path, "acme/split-gguf", {path.name: path for path in shards(tmp_path / "split")})
    given = resolve_given("acme/split-gguf:model-00002-of-00002.gguf", None, None)
    assert given.names() == {"teacher": "model-00002-of-00002.gguf"}
    assert list(given.digests()) == [f"given/teacher/model-0000{number}-of-00002.gguf" for number in (1, 2)]
    assert given.size() == sum(path.stat().st_size for path in shards(tmp_path / "split"))


class ConnectError(Exception):
    """As httpx's, which is no OSError."""


@pytest.mark.parametrize("error", [OSError, ConnectError])
def test_a_hub_that_cannot_be_reached_is_one_error(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(*_args: object, local_files_only: bool = False, **_options: object) -> str:
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not cached")
        raise error("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", unreachable)
    for teacher, student in (("acme/x:y.gguf", None), (None, "acme/x")):
        with pytest.raises(InputError, match="no network"):
            resolve_given(teacher, student, None)


def test_the_one_whole_q4_k_m_file_is_chosen() -> None:
    parts = ["m-q4_k_m-00001-of-00002.gguf", "m-q4_k_m-00002-of-00002.gguf"]
    assert choose_gguf("a/b", ["m-Q4_K_M.gguf", "m-q8_0.gguf", *parts]) == "m-Q4_K_M.gguf"
    for names in ([], parts, ["a-q4_k_m.gguf", "b-q4_k_m.gguf"]):
        with pytest.raises(InputError, match=r"FILE\.gguf"):
            choose_gguf("a/b", names)


def test_a_folder_of_too_many_files_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MAX_FILES", 3)
    for number in range(5):
        (tmp_path / str(number)).touch()
    with pytest.raises(InputError, match="at most 3 files"):
        GivenFiles(data=tmp_path).digests()
