"""A client in forked children: each child and the parent read their own answers, whatever was under way at the fork."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import pytest

from motet import Client
from motet.job import Job
from tests.integration.api_house import House, house

__all__ = ["house"]

# Since Python 3.12 a fork of a process with threads warns; that is what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")

CHILDREN = 8
#: Requests of each process: many, so that answers meet where they can.
REQUESTS = 40
#: A child that has not ended by then never will.
PATIENCE_S = 30.0
FORK = multiprocessing.get_context("fork")


@pytest.fixture
def client(house: House) -> Iterator[Client]:
    with Client(house.url, house.tokens["user"], timeout=10) as client:
        yield client


@pytest.fixture
def jobs(house: House) -> list[str]:
    """A finished job for each child and one for the parent, each with another number of rows."""
    made = []
    for n in range(1, CHILDREN + 2):
        made.append(str(house.submit([f"text {i}" for i in range(n)])["id"]))
        house.answer(made[-1], 0)
    return made


def rows_seen(client: Client, job: str) -> set[tuple[str, int, int]]:
    """What this process reads of its job, again and again: id, rows as they are told, rows as they come."""
    seen = set()
    for _ in range(REQUESTS):
        found = client.job(job)
        seen.add((found.id, found.rows, sum(1 for _ in found.results())))
    return seen


def in_a_child(work: Callable[[], Any]) -> Callable[[], Any]:
    """Start the work in a forked child; what is returned waits for what it found, or what went wrong."""
    ours, theirs = FORK.Pipe(duplex=False)
    child = FORK.Process(target=_tell, args=(work, theirs))
    child.start()
    theirs.close()

    def found() -> Any:
        try:
            return ours.recv() if ours.poll(PATIENCE_S) else "nothing: it hangs"
        except EOFError:
            return "nothing: it died"
        finally:
            child.kill()
            child.join()

    return found


def _tell(work: Callable[[], Any], to: Connection) -> None:
    try:
        to.send(work())
    except Exception as error:  # noqa: BLE001 - whatever it is, the test shows it
        to.send(repr(error))


def test_many_children_and_their_parent_read_their_own_answers(client: Client, jobs: list[str]) -> None:
    assert client.job(jobs[0]).rows == 1, "a connection is open before the forks"
    children = [in_a_child(lambda job=job: rows_seen(client, job)) for job in jobs[1:]]
    found = [rows_seen(client, jobs[0]), *(child() for child in children)]
    assert found == [{(job, n, n)} for n, job in enumerate(jobs, 1)]


def test_a_lock_that_another_thread_holds_at_the_fork_keeps_no_child_waiting(
    client: Client, jobs: list[str]
) -> None:
    assert client.job(jobs[0]).rows == 1
    line = client._http._line
    assert line is not None
    pool = line._transport._pool  # type: ignore[attr-defined]
    held, enough = threading.Event(), threading.Event()

    def hold() -> None:
        with client._http._connecting, pool._optional_thread_lock:
            held.set()
            enough.wait(PATIENCE_S)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait()
    try:
        assert in_a_child(lambda: client.job(jobs[1]).rows)() == 2
    finally:
        enough.set()
        holder.join()
    assert client.job(jobs[0]).rows == 1


def test_a_reader_that_is_half_through_goes_on_in_the_child_and_in_the_parent(
    house: House, client: Client
) -> None:
    job = house.submit([f"text {i}" for i in range(3000)])["id"]
    house.answer(job, 0)
    rows = client.job(job).results()
    first = [next(rows).index for _ in range(10)]
    child = in_a_child(lambda: [row.index for row in rows])
    house.answer(job, 1)
    house.answer(job, 2)
    assert first + [row.index for row in rows] == list(range(3000))
    assert first + child() == list(range(3000))


def test_a_child_that_closes_the_client_leaves_its_parents_connection_open(
    client: Client, jobs: list[str]
) -> None:
    assert client.job(jobs[0]).rows == 1
    assert in_a_child(client.close)() is None
    line = client._http._line
    assert line is not None
    connections = line._transport._pool.connections  # type: ignore[attr-defined]
    assert [c.is_idle() for c in connections] == [True]
    assert client.job(jobs[1]).rows == 2


def test_a_childs_child_has_a_line_of_its_own_too(client: Client, jobs: list[str]) -> None:
    assert client.job(jobs[0]).rows == 1

    def child() -> tuple[int, set[Any]]:
        mine = client.job(jobs[1]).rows
        its = in_a_child(lambda: rows_seen(client, jobs[2]))
        seen = rows_seen(client, jobs[3])
        return mine, seen | its()

    assert in_a_child(child)() == (2, {(jobs[2], 3, 3), (jobs[3], 4, 4)})


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")
def test_a_loader_of_torch_reads_with_the_client_of_its_parent(client: Client, jobs: list[str]) -> None:
    data = pytest.importorskip("torch.utils.data")

    class Rows(data.Dataset):  # type: ignore[misc, name-defined]
        def __len__(self) -> int:
            return 4 * CHILDREN

        def __getitem__(self, index: int) -> int:
            return client.job(jobs[index % len(jobs)]).rows

    assert client.job(jobs[0]).rows == 1
    # More workers than cores is a warning of torch, and no matter here.
    loader = data.DataLoader(Rows(), num_workers=4, multiprocessing_context="fork", timeout=PATIENCE_S)
    assert [int(n) for n in loader] == [1 + i % len(jobs) for i in range(4 * CHILDREN)]


def test_a_client_and_its_jobs_go_to_a_child_that_is_spawned(client: Client, jobs: list[str]) -> None:
    """Pickled by address, token and time limit: connections do not travel."""
    spawn = multiprocessing.get_context("spawn")
    job = client.job(jobs[2])
    with spawn.Pool(1) as pool:
        assert pool.apply(count_rows, (client, job)) == (3, 3)
    again = pickle.loads(pickle.dumps(client))
    assert (again.url, again._http.timeout_s) == (client.url, 10)
    assert again.job(jobs[3]).rows == 4
    again.close()


def count_rows(client: Client, job: Job) -> tuple[int, int]:
    return client.job(job.id).rows, sum(1 for _ in job.results())


def test_a_fork_in_a_source_of_rows_does_not_end_the_upload(house: House, client: Client) -> None:
    """A child that leaves through the frames of ``submit`` must not remove the job that its parent fills."""

    def source() -> Iterator[str]:
        for i in range(3000):
            if i == 2500:
                child = os.fork()
                if not child:
                    raise SystemExit
                os.waitpid(child, 0)
            yield f"text {i}"

    parent = os.getpid()
    try:
        job = client.submit(source(), {"topic": {"kind": "classify", "model": "topics"}})
    finally:
        if os.getpid() != parent:
            os._exit(0)
    assert (job.state, job.rows) == ("running", 3000)
