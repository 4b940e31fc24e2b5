"""How many cores a process may use, and who is told."""

import os
import statistics
from types import SimpleNamespace

import pytest

from mlx_pararnn.compute import cpu_cores, openblas


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 0),
        ({"cpu.max": "max 100000"}, 0),
        ({"cpu.max": "200000 100000"}, 2),  # docker run --cpus=2
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 1),
        ({"a/b/cpu.max": "300000 100000", "cpu.max": "max 100000"}, 3),
        ({"a/b/cpu.max": "max 100000", "a/cpu.max": "400000 100000"}, 4),
        ({"a/b/cpu.max": "800000 100000", "a/cpu.max": "400000 100000"}, 4),
        ({"cpu.max": "nonsense"}, 0),
    ],
)
def test_a_containers_quota_of_cores(files, cores, tmp_path):
    (tmp_path / "own").write_text("0::/a/b\n")
    for name, content in files.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    assert cpu_cores._quota.__wrapped__(tmp_path / "groups", tmp_path / "own") == cores
    assert cpu_cores._quota.__wrapped__(tmp_path / "groups", tmp_path / "missing") == 0


def test_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(cpu_cores.os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    for quota, wanted in ((0, 16), (2, 2), (40, 16)):
        monkeypatch.setattr(cpu_cores, "_quota", lambda quota=quota: quota)
        assert cpu_cores.threads() == wanted
    monkeypatch.delattr(cpu_cores.os, "sched_getaffinity")  # a Mac
    monkeypatch.setattr(cpu_cores, "_quota", lambda: 0)
    monkeypatch.setattr(cpu_cores, "_performance_cores", lambda: 6)
    assert cpu_cores.threads() == 6
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert cpu_cores.threads() == 3


def usual(team, most, seconds, calls):
    """How many threads most of the last 300 of so many calls had, and all their time over the shortest."""
    sizes = []
    for number in range(calls):
        sizes.append(team.size(most))
        team.took(seconds(sizes[-1], number))
    time = sum(seconds(size, number) for number, size in enumerate(sizes))
    shortest = min(sum(seconds(size, number) for number in range(calls)) for size in range(1, most + 1))
    return statistics.mode(sizes[-300:]), time / shortest


def test_a_team_is_as_large_as_is_fast():
    def idle(threads, number):
        return 1 / threads + 0.005 * threads

    def busy(threads, number):
        return 1 / threads + 10 * (threads > 2)  # two cores are free

    def now_and_then(threads, number):
        return 1 + 40 * (threads > 1 and number % 5 == 0)  # slower on average

    def crowded(threads, number):
        return 5 + threads

    def slower(threads, number):
        return 1 / threads + 1.1 * (threads > 2)

    assert usual(cpu_cores.Team(), 1, idle, 300) == (1, 1)
    assert usual(cpu_cores.Team(), 2, idle, 300) == (2, pytest.approx(1, abs=0.05))
    assert usual(cpu_cores.Team(), 8, busy, 2000) == (2, pytest.approx(1, abs=0.4))
    team = cpu_cores.Team()
    assert usual(team, 8, idle, 2000) == (8, pytest.approx(1, abs=0.05))
    assert usual(team, 8, busy, 2000) == (2, pytest.approx(1, abs=0.4))
    assert usual(team, 8, idle, 2000)[0] == 8  # found by a trial: the calls themselves are no slower
    assert usual(team, 8, now_and_then, 2000)[0] == 1
    team = cpu_cores.Team()
    assert usual(team, 8, crowded, 5000)[0] == 1
    assert usual(team, 8, idle, 1200)[0] == 8
    # At once: eight are slower than eight were, if not than one alone was.
    assert usual(team, 8, slower, 300)[0] == 2
    assert usual(team, 3, busy, 2000)[0] == 2  # halves are rounded up


@pytest.mark.parametrize(("answer", "cores"), [("echo 6", 6), ("exit 1", 0), ("echo", 0), (None, 0)], ids=str)
def test_a_macs_performance_cores(answer, cores, monkeypatch, tmp_path):
    if answer is not None:
        sysctl = tmp_path / "sysctl"
        sysctl.write_text(f'#!/bin/sh\n[ "$*" = "-n hw.perflevel0.physicalcpu" ] || exit 3\n{answer}\n')
        sysctl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin" if answer else str(tmp_path))
    assert cpu_cores._performance_cores.__wrapped__() == cores


@pytest.mark.parametrize(
    ("allowed", "environment", "told"),
    [
        (2, {}, [2]),
        (16, {}, []),
        (2, {"OPENBLAS_NUM_THREADS": "8"}, []),
        (2, {"OMP_NUM_THREADS": "8"}, []),
    ],
)
def test_openblas_takes_no_more_threads_than_the_process_may_use(allowed, environment, told, monkeypatch):
    for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setattr(cpu_cores, "_quota", lambda: allowed)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    given = []
    library = SimpleNamespace(openblas_get_num_threads=lambda: 16, openblas_set_num_threads=given.append)
    openblas.limit_threads(library)
    assert given == told


def test_openblas_without_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(cpu_cores, "_quota", lambda: 1)
    openblas.limit_threads(SimpleNamespace())
