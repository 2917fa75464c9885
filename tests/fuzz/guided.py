"""Looks for damage that a reader does not survive, led by the lines of the package that it reaches.

    pip install atheris
    python tests/fuzz/guided.py --seconds 600

What reaches new lines is kept in ``tests/fuzz/corpus.txt``, a line of hexadecimal digits each; ``test_fuzz.py`` tries
them all.
"""

from __future__ import annotations

import argparse
import faulthandler
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

HERE = Path(__file__).parent
CORPUS = HERE / "corpus.txt"
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "chaos")]


def bases(folder: Path, run: Path) -> list[Path]:
    """Return the folders that are damaged: of one cache each, of a run, and of one whose cache is not written."""
    made = []
    for golden in sorted((HERE.parent / "cache" / "golden").glob("*.h5")):
        made.append(folder / golden.stem)
        made[-1].mkdir(parents=True)
        shutil.copy(golden, made[-1])
    for name, absent in (("run", ()), ("scored", ("teacher_logits*",))):
        made.append(folder / name)
        shutil.copytree(run, made[-1], ignore=shutil.ignore_patterns(*absent))
    return made


def job(folder: Path) -> list[str]:
    """Make a tiny teacher and a corpus; return the overrides of a run that keeps its partitions in several files."""
    from chaos import make_job

    folder.mkdir()
    more = ["job.keep_partitions=true", "cache.max_file_size=1KB", "cache.profile=compact"]
    more += [f"teacher.cache_dir={folder / 'run'}"]
    return [*make_job(folder, 3), *(f"distillation.{setting}" for setting in more)]


def picker(data: bytes) -> Iterator[int]:
    """Turn bytes into numbers: send a bound, get a number below it; 0 when the bytes are used up.

    Examples
    --------
    >>> numbers = picker(bytes([7, 1, 2]))
    >>> next(numbers), numbers.send(5), numbers.send(1000), numbers.send(9)
    (0, 2, 513, 0)
    """
    bound = yield 0
    while True:
        size = (int(bound - 1).bit_length() + 7) // 8
        piece, data = data[:size], data[size:]
        bound = yield int.from_bytes(piece, "little") % max(1, bound)


def damage_with(data: bytes, folder: Path, made: list[Path]) -> None:
    """Put a base into an empty folder, damaged as the bytes say."""
    from damage import damage

    numbers = picker(data)
    next(numbers)
    damage(made, folder, numbers.send)


def corpus() -> list[bytes]:
    """Return what earlier runs kept."""
    return [bytes.fromhex(line) for line in CORPUS.read_text().split()]


def fuzz(scratch: Path, made: list[Path], options: list[str]) -> None:
    """Let the fuzzer loose in this process, which it ends."""
    import atheris

    faulthandler.enable()
    with atheris.instrument_imports(include=["dask_logits"]):
        import victim

    def attempt(data: bytes) -> None:
        folder = scratch / "case"
        shutil.rmtree(folder, ignore_errors=True)
        damage_with(data, folder, made)
        victim.read(folder)

    atheris.Setup(
        [sys.argv[0], "-max_len=64", "-len_control=0", "-timeout=20", "-rss_limit_mb=6000", *options], attempt
    )
    atheris.Fuzz()


def in_child(scratch: Path, made: list[Path], options: list[str]) -> int:
    """Fuzz in a process of its own; return its exit status."""
    child = os.fork()
    if child == 0:
        fuzz(scratch, made, options)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def adding_lines(scratch: Path, made: list[Path], found: list[bytes]) -> list[bytes]:
    """Return those that reach lines of the package which none before them does."""
    import victim

    package = str(HERE.parents[1] / "dask_logits")
    seen: set[tuple[str, int]] = set()

    def note(frame: FrameType, event: str, argument: object) -> Callable[..., object] | None:
        if not frame.f_code.co_filename.startswith(package):
            return None
        seen.add((frame.f_code.co_filename, frame.f_lineno))
        return note

    least = []
    for data in found:
        before = len(seen)
        shutil.rmtree(scratch / "case", ignore_errors=True)
        damage_with(data, scratch / "case", made)
        sys.settrace(note)
        victim.read(scratch / "case")
        sys.settrace(None)
        if len(seen) > before:
            least.append(data)
    return least


def main() -> int:
    """Look for so many seconds, and keep what is worth it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=600)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        more = ["cluster=local_cpu", "distillation.teacher.generation.num_workers=1"]
        command = [sys.executable, "-m", "dask_logits", "generate", *job(scratch / "job"), *more]
        subprocess.run(command, check=True)
        made = bases(scratch / "bases", scratch / "job" / "run")
        kept = scratch / "kept"
        kept.mkdir()
        for number, data in enumerate(corpus()):
            (kept / str(number)).write_bytes(data)
        status = in_child(
            scratch, made, [f"-max_total_time={given.seconds}", f"-artifact_prefix={scratch}/", str(kept)]
        )
        for found in scratch.glob("*-*"):
            print(f"{found.name}: {found.read_bytes().hex()}")
        if status == 0:
            least = adding_lines(scratch, made, sorted((file.read_bytes() for file in kept.iterdir()), key=len))
            CORPUS.write_text("".join(sorted(f"{data.hex()}\n" for data in least if data)))
    return status


if __name__ == "__main__":
    sys.exit(main())
