"""Where work is done beside this process: in processes on this machine, or on a Ray cluster.

``auto`` joins the cluster that runs here (or the one RAY_ADDRESS names) and starts local workers if there is none.
Every node needs this package in the same version: the digest of the sources is compared before work is sent.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from ipaddress import ip_address
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

from engine.errors import SlalomError
from env.measure.digest import code_sha256

_TRIES = 4  # of a job whose worker dies


def _quiet(niceness: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C and keeps what is finished
    if niceness:
        os.nice(niceness)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed cannot end its processes: they see to it themselves."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def processes(jobs: int, *, niceness: int = 0) -> ProcessPoolExecutor:
    """``jobs`` fresh processes on this machine; ``niceness``: how much they give way to what they run beside."""
    return ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=_quiet, initargs=(niceness,))


def finished(
    pool: Executor | None, work: Callable[..., Any], jobs: Sequence[tuple[Any, ...]]
) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """(job, ``work(*job)``) as they finish; without a pool here, one after the other.

    :raises SlalomError: a process of the pool was killed
    """
    if pool is None:
        for job in jobs:
            yield job, work(*job)
        return
    try:
        waiting = {pool.submit(work, *job): job for job in jobs}
    except BrokenExecutor as error:
        raise _ended(error) from error
    try:
        for future in as_completed(waiting):
            try:
                yield waiting[future], future.result()
            except BrokenExecutor as error:
                raise _ended(error) from error
    finally:
        for future in waiting:
            future.cancel()


def connect(address: str, *, cores: int | None = None) -> None:
    """Join a Ray cluster, once per process; a second call keeps the first connection.

    :param address: ``auto``, ``HOST:PORT`` of a head node, or ``ray://HOST:PORT``
    :param cores: workers to start where ``auto`` finds no cluster; None: one per core
    :raises SlalomError: Ray is not installed, or nobody answers at the address, or Ray would be open to other machines
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # a task without GPUs sees what it saw
    try:
        import ray
    except ImportError:
        raise SlalomError("--ray", address, "install it first: pip install 'slalom[ray]'") from None
    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    with _loopback() if address == "auto" else nullcontext():
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, ValueError, TimeoutError, RuntimeError) as error:
            if address != "auto":
                fix = "start the head node first (ray start --head), or use auto"
                raise SlalomError("--ray", address, f"{_first_line(error)}; {fix}") from error
            ray.init(num_cpus=cores or os.cpu_count(), include_dashboard=False, **quiet)
            _lock_up(ray)


@contextmanager
def _loopback() -> Iterator[None]:
    """Whatever Ray starts here listens on loopback, and is found there.

    It would listen on every interface, and who reaches it may run code. No option says "loopback": Ray turns 127.0.0.1
    into an address that others reach, but on systems where it makes no clusters. It is told that this is one.
    """
    from ray._private import ray_constants

    before, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


def _lock_up(ray: Any) -> None:
    """See that what was started here is this user's alone.

    :raises SlalomError: it listens where others reach it
    """
    token = Path.home() / ".ray" / "auth_token"
    if token.exists():
        token.chmod(0o600)  # Ray leaves it as the umask says, and it opens the ports to who can read it
    found = ray.util.get_node_ip_address()
    if not ip_address(found).is_loopback:
        ray.shutdown()
        fix = "this version of Ray cannot be kept on 127.0.0.1: start one yourself (ray start --head) and name it"
        raise SlalomError("--ray", found, fix)


def cores() -> int:
    """CPUs of the cluster that is connected, 1 or more."""
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1)))


def check_code(digest: str) -> None:
    """Runs on a worker: refuse to mix two versions of this package in one result.

    :raises SlalomError: the worker's sources differ from the driver's
    """
    if code_sha256() != digest:
        fix = "install the same version of slalom on every node"
        raise SlalomError("--ray", os.uname().nodename, f"its sources differ from the driver's; {fix}")


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def _job(digest: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    check_code(digest)
    return function(*arguments)


class RayExecutor(Executor):
    """``concurrent.futures.Executor`` over the connected cluster, one core a job.

    A job whose worker or node dies is started again elsewhere, a few times: one that takes its worker along each time
    (out of memory, a crash) is a :class:`SlalomError` where its result is asked for, as is an exception of its own.
    Cancelling a future ends its job also where it runs.
    """

    def __init__(self) -> None:
        import ray

        self._ray: Any = ray
        self._digest = code_sha256()
        self._remote: Any = ray.remote(num_cpus=1, max_retries=_TRIES - 1)(_job)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """See ``Executor.submit``; keyword arguments are not needed here."""
        assert not kwargs
        reference = self._remote.remote(self._digest, fn, args)
        outer = _Job(lambda: self._ray.cancel(reference, force=True))
        outer.set_running_or_notify_cancel()
        reference.future().add_done_callback(lambda done: _hand_over(done, outer, self._said))
        return outer

    def _said(self, error: BaseException) -> BaseException:
        """The job's own exception without Ray's wrapping; else that its worker died too often."""
        cause = getattr(error, "cause", None)
        if cause is not None or not isinstance(error, self._ray.exceptions.RayError):
            return cause or error
        fix = "look into the logs of Ray (/tmp/ray); it may be short of memory"
        return SlalomError("--ray", _first_line(error), f"a job ended its worker {_TRIES} times; {fix}")


class _Job(Future[Any]):
    """A future whose job can be ended while it runs."""

    def __init__(self, end: Callable[[], None]) -> None:
        super().__init__()
        self._end = end

    def cancel(self) -> bool:
        """End the job; what it would have given is not waited for."""
        if not self.done():
            self._end()
        return super().cancel()


def _hand_over(done: Future[Any], outer: Future[Any], said: Callable[[BaseException], BaseException]) -> None:
    """Copy a result; of an exception, what is to be ``said``."""
    error = done.exception()
    if error is None:
        outer.set_result(done.result())
    else:
        outer.set_exception(said(error))


def watched(future: Future[Any]) -> Future[Any]:
    """The future of a job in a process of :func:`processes`; that the process was killed is a :class:`SlalomError`."""
    outer: Future[Any] = Future()
    outer.set_running_or_notify_cancel()
    future.add_done_callback(lambda done: None if done.cancelled() else _hand_over(done, outer, _ended))
    return outer


def _ended(error: BaseException) -> BaseException:
    if not isinstance(error, BrokenExecutor):
        return error
    fix = "it may be short of memory: take fewer --jobs; with --out and --resume what is finished is kept"
    return SlalomError("--jobs", "a process that was killed", fix)
