import threading
import time

import pytest

from q4kd.harness.runs import cores as module
from q4kd.harness.runs.cores import Closed, Cores, default_workers, free_memory, usable_cores


class Worker(threading.Thread):
    """Takes cores, says so, and gives them back when told."""

    def __init__(self, cores, log, name, count=1, **how):
        super().__init__(daemon=True)
        self.cores, self.log, self.label, self.count, self.how = cores, log, name, count, how
        self.go = threading.Event()
        self.refused = False
        self.start()

    def run(self):
        try:
            with self.cores.taken(self.count, **self.how):
                self.log.append(self.label)
                self.go.wait(20)
        except Closed:
            self.refused = True

    def end(self):
        self.go.set()
        self.join(20)


def settled(log, *names):
    deadline = time.monotonic() + 10
    while len(log) < len(names) and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.05)
    return sorted(log) == sorted(names)


def test_no_more_cores_are_taken_than_there_are():
    cores, log = Cores(3), []
    two = Worker(cores, log, "two", 2)
    assert settled(log, "two")
    other = Worker(cores, log, "other", 2)
    one = Worker(cores, log, "one", 1)
    assert settled(log, "two", "one")  # what fits passes what does not
    one.end()
    assert settled(log, "two", "one")
    two.end()
    assert settled(log, "two", "one", "other")
    other.end()


def test_the_lowest_rank_is_served_first():
    cores, log = Cores(1), []
    first = Worker(cores, log, "first")
    assert settled(log, "first")
    waiting = [Worker(cores, log, f"rank {rank}", rank=rank) for rank in (3.0, 1.0, 2.0)]
    time.sleep(0.1)
    first.end()
    for number in (1, 2, 0):
        waiting[number].end()
    assert log == ["first", "rank 1.0", "rank 2.0", "rank 3.0"]


def test_what_must_be_alone_is_alone_and_nobody_passes_it():
    cores, log = Cores(4), []
    before, judging = Worker(cores, log, "before"), Worker(cores, log, "judging", 0)
    assert settled(log, "before", "judging")
    alone = Worker(cores, log, "alone", alone=True, rank=float("-inf"))
    time.sleep(0.05)
    after, later = Worker(cores, log, "after"), Worker(cores, log, "later judging", 0)
    before.end()
    assert settled(log, "before", "judging")
    judging.end()
    assert settled(log, "before", "judging", "alone")
    alone.end()
    assert settled(log, "before", "judging", "alone", "after", "later judging")
    after.end()
    later.end()


def test_a_request_for_more_than_there_are_gets_all():
    cores, log = Cores(2), []
    Worker(cores, log, "large", 99).end()
    assert log == ["large"]


def test_who_waits_when_the_session_ends_is_refused():
    cores, log = Cores(1), []
    holder, waiting = Worker(cores, log, "holder"), None
    assert settled(log, "holder")
    waiting = Worker(cores, log, "waiting")
    time.sleep(0.05)
    cores.close()
    waiting.join(10)
    assert waiting.refused
    holder.end()
    with pytest.raises(Closed), cores.taken():
        pass


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 8),
        ({"cpu.max": "max 100000\n"}, 8),
        ({"cpu.max": "150000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "nonsense"}, 8),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
    ],
)
def test_cores_are_those_of_the_mask_and_the_quota(tmp_path, monkeypatch, files, cores):
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda _pid: set(range(8)))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert usable_cores(tmp_path) == cores


def test_free_memory_is_no_more_than_the_container_may_have(tmp_path):
    assert free_memory(tmp_path) > 0
    for name, text in {"max": "1000000", "current": "900000", "stat": "inactive_file 50000\nother 1\n"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert free_memory(tmp_path) == 150_000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(tmp_path) > 1_000_000


@pytest.mark.parametrize(
    ("cores", "gigabytes", "workers"), [(1, 64, 1), (2, 64, 2), (16, 64, 14), (16, 6, 6), (16, 0, 1), (64, 1000, 56)]
)
def test_workers_go_by_cores_and_memory(monkeypatch, cores, gigabytes, workers):
    monkeypatch.setattr(module, "usable_cores", lambda: cores)
    monkeypatch.setattr(module, "free_memory", lambda: gigabytes << 30)
    assert default_workers() == workers
