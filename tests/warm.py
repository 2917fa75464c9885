"""Processes that start at once: forks of a server that has imported the heavy libraries, which takes 5 s.

``serve`` makes Dask start its workers there, and ``Popen`` starts Python commands there. Such a process takes over
environment, signal mask, folder and output of its starter, as a new interpreter does. It does not import anew: what a
library reads when it is imported (``OMP_NUM_THREADS``, ``HF_HOME``, ``DASK_…``) needs a new interpreter.
"""

from __future__ import annotations

import atexit
import functools
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import context, forkserver, reduction, spawn, util
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

# The setting of how Dask starts workers.
METHOD = "distributed.worker.multiprocessing-method"
_PRELOAD = [
    "warm",
    "dask.cli",
    "dask_logits.cli",
    "dask_logits.job.run",
    "dask_logits.observe.status",
    "dask_logits.worker.calibrate",
    "datasets",
    "distributed.cli.dask_scheduler",
    "distributed.cli.dask_worker",
    "transformers.models.llama.modeling_llama",
]


class _Surroundings:
    """What a process has in common with its starter. It is read when pickled, and set when unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        starting = context.get_spawning_popen()
        if starting is None or starting.method != "forkserver":
            return dict, ()
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
        return _take_over, (dict(os.environ), mask, reduction.DupFd(1), reduction.DupFd(2))


def _take_over(environment: Mapping[str, str], mask: set[int], *outputs: Any) -> None:
    os.environ.clear()
    os.environ.update(environment)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for number, output in enumerate(outputs, 1):
        os.dup2(output.detach(), number)


_SURROUNDINGS = _Surroundings()
_plain_data = spawn.get_preparation_data


def _data(name: str) -> dict[str, Any]:
    return {**_plain_data(name), "surroundings": _SURROUNDINGS}


# At import, because dask_logits.job.processes keeps what it finds when it is imported.
spawn.get_preparation_data = _data


def _start_server(preload: Sequence[str]) -> None:
    """Start a fork server, and have Dask start the workers of this process there."""
    import dask

    forkserver.set_forkserver_preload(list(preload))
    forkserver.ensure_running()
    dask.config.set({METHOD: "forkserver"})


@functools.cache
def serve() -> None:
    """Start the server of the test session, once."""
    # Python 3.11 does not give its path to the server.
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        _start_server(_PRELOAD)


class Popen:
    """``subprocess.Popen`` of a Python module, script or code in a fork, for the arguments that tests use."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        stdout: Any = None,
        stderr: Any = None,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        text: bool = True,
        start_new_session: bool = False,
        stdin: int | None = None,
        process_group: int | None = None,
    ) -> None:
        assert (command[0], text) == (sys.executable, True)
        assert stdin in (None, subprocess.DEVNULL)
        serve()
        self.args = command
        # What goes to a pipe is kept in memory, where it takes no reader.
        self._kept = [os.memfd_create("output") if each == subprocess.PIPE else None for each in (stdout, stderr)]
        self._output: list[str | None] = [None, None]
        ends = [
            _as_connection(own if file is None else file if kept is None else kept)
            for own, (kept, file) in enumerate(zip(self._kept, (stdout, stderr), strict=True), 1)
        ]
        group = "session" if start_new_session else process_group
        given = (command[1:], dict(env or os.environ), cwd or Path.cwd(), group)
        self._process = multiprocessing.get_context("forkserver").Process(target=_python, args=(*given, *ends))
        self._process.start()
        self.pid = self._process.pid
        for end in ends:
            end.close()

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if (code := self.poll()) is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return code

    def communicate(self, timeout: float | None = None) -> list[str | None]:
        self.wait(timeout)
        for number, kept in enumerate(self._kept):
            if kept is not None:
                self._output[number] = os.pread(kept, os.fstat(kept).st_size, 0).decode()
        return self._output

    def __del__(self) -> None:
        for kept in self._kept:
            if kept is not None:
                os.close(kept)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def run(
    command: Sequence[str], *, timeout: float = 300, check: bool = False, **settings: Any
) -> subprocess.CompletedProcess[str]:
    """``subprocess.run`` of a Python module, script or code in a fork, with its output as text."""
    assert not check
    process = Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **settings)
    try:
        return subprocess.CompletedProcess(command, process.wait(timeout), *process.communicate())
    finally:
        process.kill()


def _as_connection(file: Any) -> Connection:
    """Return what carries a file descriptor to another process."""
    if file == subprocess.DEVNULL:
        return Connection(os.open(os.devnull, os.O_WRONLY), readable=False)
    return Connection(os.dup(file if isinstance(file, int) else file.fileno()), readable=False)


def _python(
    arguments: Sequence[str], environment: Mapping[str, str], cwd: Path, group: int | str | None, *outputs: Connection
) -> None:
    """Do in this process what a new interpreter does with its arguments."""
    if group == "session":
        os.setsid()
    elif group is not None:
        os.setpgid(0, group)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for number, output in enumerate(outputs, 1):
        os.dup2(output.fileno(), number)
        output.close()
    # The workers of its jobs are its descendants. They are forks, too.
    start = util.spawnv_passfds
    util.spawnv_passfds = _fork
    _start_server(())
    util.spawnv_passfds = start
    try:
        if arguments[0] == "-m":
            sys.argv = list(arguments[1:])
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        elif arguments[0] == "-c":
            sys.argv = ["-c", *arguments[2:]]
            exec(arguments[1], {"__name__": "__main__"})
        else:
            sys.argv = list(arguments)
            runpy.run_path(arguments[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()


def _fork(path: bytes, arguments: Sequence[str], kept: Sequence[int]) -> int:
    """Fork this process where ``multiprocessing`` would start ``python -c CODE``, with these open files."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        first = 3
        for last in (*sorted(kept), os.sysconf("SC_OPEN_MAX")):
            os.closerange(first, last)
            first = last + 1
        exec(arguments[-1], {})
    except SystemExit:
        code = 0
    finally:
        os._exit(code)
