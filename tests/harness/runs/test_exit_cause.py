import os
import signal

import pytest

from q4kd.harness.runs.exit_cause import KernelLog, MemoryCgroup, OomCounter, classify, memory_cgroup, oom_pattern


@pytest.mark.parametrize(
    ("returncode", "before", "after", "line", "action", "cause"),
    [
        (0, 0, 0, None, None, "exited"),
        (3, None, None, None, None, "exited"),
        (-signal.SIGTERM, 0, 0, None, None, "signalled"),
        (-signal.SIGSEGV, 0, 0, None, None, "signalled"),
        # SIGKILL alone, or a shell's 137, says nothing about who sent it
        (-signal.SIGKILL, 4, 4, None, None, "killed_cause_unknown"),
        (-signal.SIGKILL, None, None, None, None, "killed_cause_unknown"),
        (137, 0, 0, None, None, "killed_cause_unknown"),
        (None, 0, 0, None, None, "killed_cause_unknown"),
        (-signal.SIGKILL, 4, 5, None, None, "oom_killed"),
        (137, 0, 1, None, None, "oom_killed"),
        (-signal.SIGKILL, None, None, "Killed process 7", None, "oom_killed"),
        # a counter that only one side could read is no evidence
        (-signal.SIGKILL, None, 5, None, None, "killed_cause_unknown"),
        (-signal.SIGKILL, 5, None, None, None, "killed_cause_unknown"),
        # a program that exits by itself was not killed, whatever happened to its neighbours
        (0, 4, 5, None, None, "exited"),
        (1, 4, 5, "Killed process 7", None, "exited"),
        (-signal.SIGKILL, 4, 5, None, "timeout", "timeout"),
        (-signal.SIGKILL, 0, 0, None, "stalled", "stalled"),
    ],
)
def test_classify(returncode, before, after, line, action, cause):
    assert classify(returncode, before, after, line, action) == cause


@pytest.mark.parametrize(
    ("version", "name", "text", "count"),
    [
        (2, "memory.events", "low 0\nhigh 0\nmax 3\noom 2\noom_kill 2\noom_group_kill 1\n", 2),
        (1, "memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 7\n", 7),
        (1, "memory.oom_control", "oom_kill_disable 0\nunder_oom 0\n", None),  # a kernel before 4.13
        (2, "memory.current", "12", None),
    ],
)
def test_oom_kills_reads_the_kernels_own_formats(tmp_path, version, name, text, count):
    (tmp_path / name).write_text(text)
    assert MemoryCgroup(version, tmp_path).oom_kills() == count


def test_the_cgroup_of_this_process_is_found_where_the_kernel_says():
    cgroup = memory_cgroup()
    if cgroup is None:
        pytest.skip("no memory controller is mounted here")
    counter = OomCounter(os.getpid()).record()
    if cgroup.oom_kills() is None:
        assert counter == {"source": None, "before": None, "after": None}
    else:
        assert counter["source"] == f"cgroup v{cgroup.version} oom_kill"
        assert counter["before"] == counter["after"] == cgroup.oom_kills()


def test_a_process_that_is_gone_has_no_cgroup():
    assert memory_cgroup(2**22 - 1) is None
    assert OomCounter(2**22 - 1).record() == {"source": None, "before": None, "after": None}


@pytest.mark.parametrize(
    ("seen", "record"),
    [
        ("aab", (1, 1)),  # one look at another group, as a dying process gives, is no move
        ("aabb", (10, 10)),
        ("aabab", (1, 1)),
        ("aabbx", (10, 10)),  # gone: the last group stands
    ],
)
def test_the_counter_follows_a_move_that_lasts(tmp_path, monkeypatch, seen, record):
    groups = {}
    for name, count in (("a", 1), ("b", 10)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "memory.oom_control").write_text(f"oom_kill {count}\n")
        groups[name] = MemoryCgroup(1, tmp_path / name)
    looks = iter(seen)
    monkeypatch.setattr("q4kd.harness.runs.exit_cause.memory_cgroup", lambda pid: groups.get(next(looks)))
    counter = OomCounter(os.getpid())
    for _ in seen[1:]:
        counter.poll()
    found = counter.record()
    assert (found["before"], found["after"]) == record


def test_the_kernel_line_must_name_the_process():
    v2 = "oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=/,task=python,pid=4242,uid=0"
    old = "Memory cgroup out of memory: Killed process 4242 (python) total-vm:1kB"
    for line in (v2, old):
        assert oom_pattern(4242).search(line)
        assert not oom_pattern(424).search(line)
        assert not oom_pattern(42421).search(line)
    assert not oom_pattern(4242).search("python invoked oom-killer: gfp_mask=0x140cca, pid=4242")


def test_kernel_log_says_nothing_about_the_living():
    log = KernelLog()
    assert log.oom_line(os.getpid()) is None
    log.close()
    assert not log.readable
