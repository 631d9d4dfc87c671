"""Locks lie where nobody else can prepare them."""

import os
from pathlib import Path

import pytest

from q4kd.harness.runs.user_folder import lock_folder
from q4kd.trainer.errors import InputError


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)


def _own(tmp_path: Path) -> Path:
    return tmp_path / "tmp" / f"q4kd-{os.getuid()}"


def test_the_runtime_folder_is_taken_when_it_is_the_users_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    assert lock_folder() == runtime
    runtime.chmod(0o777)
    assert lock_folder() != runtime


@pytest.mark.skipif(Path(f"/run/user/{os.getuid()}").exists(), reason="there is a runtime folder, which is taken")
def test_without_one_a_private_folder_is_made_or_refused(tmp_path: Path) -> None:
    assert lock_folder() == lock_folder() == _own(tmp_path)
    assert _own(tmp_path).stat().st_mode & 0o777 == 0o700
    _own(tmp_path).chmod(0o777)
    with pytest.raises(InputError, match="nobody else may write to"):
        lock_folder()
    _own(tmp_path).rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    _own(tmp_path).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="remove it, or set XDG_RUNTIME_DIR or TMPDIR"):
        lock_folder()
    _own(tmp_path).unlink()
    _own(tmp_path).write_text("a file of somebody")
    with pytest.raises(InputError, match="nobody else may write to"):
        lock_folder()
