"""Looks for damage that a reader does not survive, led by the lines of the package that it reaches.

    pip install atheris
    python tests/fuzz/guided.py --seconds 600

What reaches new lines is kept in ``tests/fuzz/corpus``.
"""

from __future__ import annotations

import argparse
import faulthandler
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
CORPUS = HERE / "corpus"
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "chaos")]


def bases(folder: Path, run: Path) -> list[Path]:
    """Return the folders that are damaged: of one cache each, of a run, and of one whose cache is not written."""
    made = []
    for golden in sorted((HERE.parent / "store" / "golden").glob("*.h5")):
        made.append(folder / golden.stem)
        made[-1].mkdir(parents=True)
        shutil.copy(golden, made[-1])
    for name, absent in (("run", ()), ("scored", ("teacher_logits*",))):
        made.append(folder / name)
        shutil.copytree(run, made[-1], ignore=shutil.ignore_patterns("*.lock", *absent))
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
        bound = yield int.from_bytes(piece, "little") % bound


def damage_with(data: bytes, folder: Path, made: list[Path]) -> None:
    """Put a base into an empty folder, damaged as the bytes say."""
    from damage import damage

    numbers = picker(data)
    next(numbers)
    damage(made, folder, numbers.send)


def main() -> None:
    """Look for so many seconds."""
    import atheris

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--corpus", type=Path, default=CORPUS)
    parser.add_argument("--merge", type=Path, help="keep of this corpus only what adds lines, in --corpus")
    given = parser.parse_args()
    given.corpus.mkdir(exist_ok=True)
    faulthandler.enable()
    with atheris.instrument_imports(include=["dask_logits"]):
        import victim
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        more = ["cluster=local_cpu", "distillation.teacher.generation.num_workers=1"]
        command = [sys.executable, "-m", "dask_logits", "generate", *job(scratch / "job"), *more]
        subprocess.run(command, check=True)
        made = bases(scratch / "bases", scratch / "job" / "run")

        def attempt(data: bytes) -> None:
            folder = scratch / "case"
            shutil.rmtree(folder, ignore_errors=True)
            damage_with(data, folder, made)
            victim.read(folder)

        options = [f"-max_total_time={given.seconds}", "-max_len=64", "-timeout=20", "-rss_limit_mb=6000"]
        folders = [str(given.corpus)]
        if given.merge:
            options.append("-merge=1")
            folders.append(str(given.merge))
        atheris.Setup([sys.argv[0], *options, *folders], attempt)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
