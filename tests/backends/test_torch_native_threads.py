"""Compiled kernels in torch's threads: each sample once, in any number of threads, and errors reach the caller."""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("numba")

from deqcore_torch.native import openmp, pool  # noqa: E402
from deqcore_torch.native.kernels import compiled  # noqa: E402

in_torch_threads = pytest.mark.skipif(openmp.parallel() == 0, reason="torch's threads are not those of GNU OpenMP")


@compiled
def count(counts, wrong, start, stop):
    for b in range(start, stop):
        counts[b] += 1
        if wrong[b]:
            raise MemoryError


def counted(batch=8, wrong=()):
    """Run the kernel; return how often it worked on each sample."""
    counts, faulty = np.zeros(batch, np.int8), np.zeros(batch, np.bool_)
    faulty[list(wrong)] = True
    pool.run(count, batch, 100, counts, faulty)
    return counts.tolist()


@pytest.fixture(autouse=True)
def _split(monkeypatch):
    """Split what can be split, into as many pieces as torch has threads."""
    monkeypatch.setattr(pool, "WORTH", 1)
    monkeypatch.setattr(pool, "WORTH_APART", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["torch's threads", "own threads"])
def _both(request, monkeypatch):
    if request.param == "own threads":
        monkeypatch.setattr(openmp, "parallel", lambda: 0)


def library():
    """Return the library that was found, by the file that contains it."""
    return next(
        path
        for path in {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
        if Path(path).resolve().name == openmp._file(openmp.parallel())
    )


@pytest.mark.usefixtures("_both")
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_each_sample_is_worked_on_once(threads):
    torch.set_num_threads(threads)
    for batch in (1, 2, 3, 8):
        assert counted(batch) == [1] * batch


@pytest.mark.usefixtures("_both")
@pytest.mark.parametrize("wrong", [(0,), (7,), (0, 7)])
def test_an_error_in_a_piece_is_raised(wrong):
    with pytest.raises(MemoryError, match="no memory"):
        counted(wrong=wrong)
    assert counted() == [1] * 8


@in_torch_threads
def test_the_library_is_the_one_that_torch_runs_its_threads_with():
    threads = ctypes.CDLL(library()).omp_get_max_threads
    for number in (3, 2):
        torch.set_num_threads(number)
        assert threads() == number


@in_torch_threads
def test_threads_of_an_unknown_library_are_left_alone(monkeypatch):
    monkeypatch.setattr(openmp, "_file", lambda address: "libiomp5.so")
    assert openmp._found.__wrapped__() == 0


@in_torch_threads
def test_threads_are_left_alone_if_another_library_was_loaded_in_advance(monkeypatch):
    found = openmp._address
    monkeypatch.setattr(openmp, "_address", lambda library: found(library) if library._name else 1)
    assert openmp._found.__wrapped__() == 0


@in_torch_threads
def test_threads_are_left_alone_if_torch_has_none(monkeypatch):
    monkeypatch.setattr(openmp, "_address", lambda library: 0)
    assert openmp._found.__wrapped__() == 0


@pytest.mark.parametrize("threads", [1, 2])
def test_one_thread_works_alone_where_torch_uses_one(monkeypatch, threads):
    found = []
    monkeypatch.setattr(pool, "entry", lambda kernel: lambda parallel, *rest: found.append(parallel))
    torch.set_num_threads(threads)
    counted()
    assert found[-1] == (0 if threads == 1 else openmp.parallel())


@in_torch_threads
def test_all_pieces_are_done_within_a_parallel_region():
    """A region within a region has one thread, however many are asked for."""
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)(openmp.parallel())
    work, found = ctypes.CFUNCTYPE(None, ctypes.c_void_p), []
    torch.set_num_threads(3)
    counted()
    call(work(lambda _: found.append(counted())), None, 2, 0)
    assert found == [[1] * 8] * 2


@in_torch_threads
def test_all_pieces_are_done_where_openmp_chooses_the_number_of_threads():
    openmp_library = ctypes.CDLL(library())
    before = openmp_library.omp_get_dynamic()
    openmp_library.omp_set_dynamic(1)
    try:
        torch.set_num_threads(64)
        assert counted(100) == [1] * 100
    finally:
        openmp_library.omp_set_dynamic(before)


def test_python_threads_run_kernels_at_once():
    start, found = threading.Barrier(3), []

    def work():
        torch.set_num_threads(2)
        start.wait()
        found.extend(counted() for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert found == [[1] * 8] * 60


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning")  # JAX warns, if another test has imported it
def test_a_child_of_a_process_that_used_threads_does_not_wait_for_them():
    counted()
    child = os.fork()
    if child == 0:
        os._exit(0 if counted() == [1] * 8 and openmp.parallel() == 0 else 1)
    end, done = time.monotonic() + 8, 0  # it has to count to eight
    while not done and time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        time.sleep(0.01)
    if not done:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert done, "the child waits for threads that do not exist"
    assert status == 0


def test_pools_do_not_outlive_a_fork():
    assert pool._pool(2, 1) is not pool._pool(2, 2)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="needs signals to a thread")
def test_an_interrupt_leaves_no_piece_undone():
    counted()
    counts, main = np.zeros(2**24, np.int8), threading.get_ident()

    def interrupt():
        while not counts[0]:
            pass
        signal.pthread_kill(main, signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    other = threading.Thread(target=interrupt)
    try:
        other.start()
        with pytest.raises(KeyboardInterrupt):
            pool.run(count, len(counts), len(counts), counts, np.zeros(len(counts), np.bool_))
            other.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert (counts == 1).all()
    assert counted() == [1] * 8
