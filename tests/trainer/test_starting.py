"""A program that begins sooner is the same one: garbage is collected afterwards, a GPU is woken only where one is."""

import gc
import shutil
import subprocess
from pathlib import Path

import pytest

from q4kd.trainer.starting import wake_gpu, without_collection

# Says what it was asked for, as the CUDA driver's functions are declared in cuda.h.
_DRIVER = """
#include <stdio.h>
#include <stdlib.h>
static int device_of_call = -1, is_on = 0;
static void say(const char *what, int number) {
  FILE *file = fopen(getenv("Q4KD_TEST_DRIVER"), "a");
  fprintf(file, "%s %d\\n", what, number);
  fclose(file);
}
int cuInit(unsigned flags) { is_on = 1; say("init", (int)flags); return 0; }
int cuDeviceGet(int *device, int ordinal) {
  device_of_call = ordinal;
  if (!is_on || ordinal > 1) return 101;
  *device = 10 + ordinal;
  return 0;
}
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = 0; say("retain", device); return 0; }
"""


def test_collection_is_as_before_afterwards() -> None:
    assert gc.isenabled()
    with pytest.raises(ZeroDivisionError), without_collection():
        assert not gc.isenabled()
        with without_collection():
            pass
        assert not gc.isenabled()
        raise ZeroDivisionError
    assert gc.isenabled()


def test_the_gpu_of_this_process_is_woken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    (tmp_path / "driver.c").write_text(_DRIVER)
    library, said = tmp_path / "driver.so", tmp_path / "said"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, tmp_path / "driver.c"], check=True)
    monkeypatch.setenv("Q4KD_TEST_DRIVER", str(said))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    wake_gpu(driver=str(library)).join()
    monkeypatch.setenv("LOCAL_RANK", "1")
    wake_gpu(driver=str(library)).join()
    wake_gpu(7, driver=str(library)).join()  # There is no such GPU.
    assert said.read_text().split("\n") == ["init 0", "retain 10", "init 0", "retain 11", "init 0", ""]


@pytest.mark.parametrize("rank", ["0", "two"])
def test_without_a_driver_nothing_happens(
    rank: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LOCAL_RANK", rank)
    for driver in ("libq4kd-has-no-such-driver.so", "libm.so.6"):
        wake_gpu(driver=driver).join()
    assert capfd.readouterr() == ("", "")
