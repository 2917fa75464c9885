"""Reads a folder of caches, or a run, as their readers do, each time in a process of its own with bounds.

Run as a program it takes a folder a line, and answers with a line of JSON: "" or what went wrong.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import sys
import sysconfig
import traceback
from pathlib import Path
from typing import Any

from dask_logits.cache.reader import CacheReader
from dask_logits.errors import DaskLogitsError
from dask_logits.observe.status import read_status
from dask_logits.ops.check import check_files
from dask_logits.ops.show import card

# Beyond what the process has when it begins.
MOST_BYTES = 512 << 20
MOST_SECONDS = 20
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


def read(folder: Path) -> None:
    """Read all there is; only the errors of this package may come of it, and are expected."""
    if (folder / "receipts").exists():
        for look in (check_files, read_status, card):
            with contextlib.suppress(DaskLogitsError):
                look(folder)
        return
    for path in sorted(folder.glob("*.h5")):
        with contextlib.suppress(DaskLogitsError):
            # What training does, which compares no checksums of what is not compressed.
            reader = CacheReader(path)
            for index in range(min(reader.n_items, 1000)):
                reader.item(index)
        for look in (check_files, card):
            with contextlib.suppress(DaskLogitsError):
                look(path)


def _guard(folder: Path) -> None:
    """Let the process open no file but those of the folder and of Python, and write none."""
    inside = str(folder.resolve())
    allowed = [inside, str(Path(__file__).parents[2]), sys.prefix, sys.base_prefix, *sysconfig.get_paths().values()]
    allowed += ["/proc/", "/sys/", "/dev/null", "/dev/urandom", "/etc/", "/usr/"]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event != "open" or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        path, _, flags = arguments
        real = os.path.realpath(os.fsdecode(path))
        if not real.startswith(tuple(allowed)) or (real.startswith(inside) and int(flags or 0) & _WRITING):
            raise AssertionError(f"opened {real} with {flags}")

    sys.addaudithook(hook)


def _bound() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MOST_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    signal.alarm(MOST_SECONDS)


def _child(folder: Path, pipe: int) -> int:
    try:
        _bound()
        _guard(folder)
        read(folder)
    except Exception:  # noqa: BLE001
        # Whatever it is, it is what is looked for.
        os.write(pipe, traceback.format_exc()[-4000:].encode())
        return 1
    return 0


def serve() -> None:
    """Answer one folder after the other."""
    for line in sys.stdin:
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            os._exit(_child(Path(line.strip()), theirs))
        os.close(theirs)
        with os.fdopen(ours, errors="replace") as pipe:
            said = pipe.read()
        _, status = os.waitpid(child, 0)
        if status:
            said += f" (ended by signal {os.WTERMSIG(status)})" if os.WIFSIGNALED(status) else ""
        print(json.dumps(said), flush=True)


if __name__ == "__main__":
    serve()
