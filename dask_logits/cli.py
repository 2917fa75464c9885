"""The command line: each command is a few lines around one public function.

stdout is the answer, stderr the log. Exit status: 0 done, 1 ran and something failed, 2 refused, 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import re
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import NoReturn

from dask_logits.config import nearest
from dask_logits.errors import ConfigError, DaskLogitsError
from dask_logits.stderr import unblocked_stderr
from dask_logits.usage import HELP, HYDRA_OPTIONS, USAGE, settings_help

# SIGHUP is sent when a terminal closes, SIGUSR1 by Slurm as a warning (--signal=B:USR1@120).
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# Launchers also forward a Ctrl-C that the terminal has already sent to the job.
_SAME_SECONDS = 1.0
_LAST_WORDS_SECONDS = 0.2

# Time limit in seconds for counting the rows of a Parquet stream in `plan`.
_COUNT_SECONDS = 10.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command and exit with its status."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    commands: dict[str, Callable[[list[str]], None]] = {
        "generate": _generate,
        "plan": _plan,
        "status": _status,
        "retry": _retry,
        "merge": _merge,
        "verify": _verify,
        "show": _show,
        "convert": _convert,
    }
    if given and given[0] == "--version":
        from importlib.metadata import version

        print(f"dask-logits {version('dask-logits')}")
        sys.exit(0)
    if not given or given[0] in ("-h", "--help"):
        print(USAGE, end="")
        sys.exit(0 if given else 2)
    if given[0] not in commands:
        print(f"dask-logits: unknown command {given[0]!r}{nearest(given[0], commands)}\n\n{USAGE}", file=sys.stderr)
        sys.exit(2)
    run(lambda: commands[given[0]](given[1:]))


def run(command: Callable[[], None]) -> None:
    """Run a command that signals can stop. Turn this package's errors into a message and an exit status."""
    with unblocked_stderr(), _stoppable():
        _exit_on_error(command)


def _exit_on_error(command: Callable[[], None]) -> None:
    try:
        command()
    except DaskLogitsError as error:
        print(f"dask-logits: {error}", file=sys.stderr)
        sys.exit(1 if error.ran else 2)
    except OSError as error:
        print(f"dask-logits: expected files that can be read and written, got {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("dask-logits: stopped; run the same command again to go on", file=sys.stderr)
        sys.exit(130)


class _Parser(argparse.ArgumentParser):
    """An argument parser for one command that suggests the nearest option for an unknown one."""

    def error(self, message: str) -> NoReturn:
        for option in re.findall(r"unrecognized arguments: (-[\w-]+)", message):
            known = re.findall(r"--[\w-]+", self.format_help())
            message = f"unknown option {option!r}{nearest(option, known)}; see {self.prog} --help"
        super().error(message)


def _print_help(command: str, arguments: Sequence[str]) -> bool:
    """Print the help of a command that takes settings, if requested. Refuse unknown options."""
    if any(argument in ("-h", "--help") for argument in arguments):
        _say(f"{HELP[command]}\n{settings_help(min(100, shutil.get_terminal_size().columns))}".rstrip())
        return True
    known = HYDRA_OPTIONS if command == "generate" else ("--help",)
    for argument in arguments:
        option = argument.partition("=")[0]
        if option.startswith("-") and option not in known:
            hint = nearest(option, known) or "; settings have no dashes: distillation.PATH=VALUE"
            raise ConfigError(f"{command}: unknown option {option!r}{hint}; see dask-logits {command} --help")
    return False


def _generate(overrides: list[str]) -> None:
    from dask_logits.config import Config
    from dask_logits.hydra_config import load_config, run_hydra_app

    if _print_help("generate", overrides):
        return

    def one(config: Config) -> None:
        from dask_logits.job.progress import Steps

        _log_to_stderr(config.job.log_level)
        with Steps("preparing", is_live=False) as steps:
            steps.show("loading libraries")
            from dask_logits.job.run import generate
            from dask_logits.observe.status import read_status
        generate(config)
        _say("\n".join(read_status(config.teacher.cache_dir).lines()))

    if any(override.startswith("-") for override in overrides):
        # Hydra prints a traceback for exceptions of its task. Ours are printed as messages.
        run_hydra_app(overrides, lambda tree: _exit_on_error(lambda: one(Config.from_mapping(tree))))
    else:
        one(load_config(overrides))


def _plan(overrides: list[str]) -> None:
    if _print_help("plan", overrides):
        return
    from dask_logits.hydra_config import load_config
    from dask_logits.job.progress import Steps

    config = load_config(overrides)
    _log_to_stderr(config.job.log_level)
    with Steps("planning", is_live=False) as steps:
        steps.show("loading libraries")
        from dask_logits.job.capacity import plan_lines
        from dask_logits.job.forecast import forecast_lines
        from dask_logits.job.prepare import check_folder, prepare

        job = prepare(config, on_step=steps.show, count_seconds=_COUNT_SECONDS)
        check_folder(job)
        steps.show("estimating the speed")
        lines = [*plan_lines(job), *forecast_lines(job)]
    _say("\n".join(lines))


def _status(arguments: list[str]) -> None:
    from dask_logits.observe.status import read_status

    parser = _Parser(prog="dask-logits status", description="Say what a run has done.")
    parser.add_argument("run", help="the run folder (distillation.teacher.cache_dir)")
    parser.add_argument("--json", action="store_true", help="for programs")
    parsed = parser.parse_args(arguments)
    status = read_status(parsed.run)
    _say(status.to_json() if parsed.json else "\n".join(status.lines()))


def _retry(arguments: list[str]) -> None:
    from dask_logits.job.run import retry
    from dask_logits.observe.status import read_status

    parser = _Parser(prog="dask-logits retry", description="Take up just the partitions that failed.")
    parser.add_argument("run", help="the run folder (distillation.teacher.cache_dir)")
    parser.add_argument("overrides", nargs="*", help="settings that are free to change: distillation.SETTING=VALUE")
    parser.add_argument("--bisect", action="store_true", help="look for the rows that make a partition fail")
    parsed = parser.parse_args(arguments)
    _log_to_stderr("info")
    retry(parsed.run, overrides=parsed.overrides, bisect=parsed.bisect)
    _say("\n".join(read_status(parsed.run).lines()))


def _verify(arguments: list[str]) -> None:
    from dask_logits.job.recompute import verify

    parser = _Parser(prog="dask-logits verify", description="Check every checksum and every row.")
    parser.add_argument("path", help="a cache, an index, or a run folder")
    parser.add_argument("--recompute", type=int, default=0, help="rows of a run to score again and compare")
    parser.add_argument("--seed", type=int, default=0, help="what these rows are drawn from")
    parser.add_argument("--json", action="store_true", help="for programs")
    parsed = parser.parse_args(arguments)
    _log_to_stderr("info")
    report = verify(parsed.path, recompute=parsed.recompute, seed=parsed.seed)
    _say(report.to_json() if parsed.json else "\n".join(report.lines()))
    if not report.ok:
        sys.exit(1)


def _show(arguments: list[str]) -> None:
    import json

    from dask_logits.ops.show import card, card_lines

    parser = _Parser(prog="dask-logits show", description="Say what a cache is.")
    parser.add_argument("cache", help="the cache, or the run folder it lies in")
    parser.add_argument("--json", action="store_true", help="for programs")
    parsed = parser.parse_args(arguments)
    found = card(parsed.cache)
    _say(json.dumps(found, indent=1, ensure_ascii=False) if parsed.json else "\n".join(card_lines(found)))


def _convert(arguments: list[str]) -> None:
    from dask_logits.ops.convert import convert

    parser = _Parser(prog="dask-logits convert", description="Write a cache in another profile.")
    parser.add_argument("cache", help="the cache file")
    parser.add_argument("target", help="the file to write")
    parser.add_argument("--profile", choices=["plain", "compact"], required=True)
    parser.add_argument("--precision", type=int, choices=[8, 10, 12], default=8, help="bits of a log-prob; default: 8")
    parser.add_argument("--takeover", action="store_true", help="take over from a process elsewhere that is gone")
    parsed = parser.parse_args(arguments)
    _log_to_stderr("info")
    _say(
        convert(
            parsed.cache, parsed.target, profile=parsed.profile, precision=parsed.precision, takeover=parsed.takeover
        )
    )


def _merge(arguments: list[str]) -> None:
    from dask_logits.ops.merge import merge

    parser = _Parser(prog="dask-logits merge", description="Make one cache of the parts of a job.")
    parser.add_argument("parts", nargs="*", help="run folders or caches")
    parser.add_argument("--input-dir", help="the run folder that workers shared, or a folder of their run folders")
    parser.add_argument("--num-workers", type=int, help="static workers there were; refuse any other number")
    parser.add_argument("--output", help="the file to write; default: teacher_logits.h5 in the input folder")
    parser.add_argument("--index", action="store_true", help="write an index over a cache of each part instead")
    parser.add_argument("--takeover", action="store_true", help="take over from a process elsewhere that is gone")
    parser.add_argument("--max-file-size", help="split a larger cache into numbered files with an index, e.g. 20GB")
    parsed = parser.parse_args(arguments)
    parts = [*([parsed.input_dir] if parsed.input_dir else []), *parsed.parts]
    if not parts:
        parser.error("expected --input-dir or parts, got neither")
    _log_to_stderr("info")
    made = merge(
        parts,
        output=parsed.output,
        num_workers=parsed.num_workers,
        index=parsed.index,
        max_file_size=parsed.max_file_size,
        takeover=parsed.takeover,
    )
    _say(made)


def _say(answer: object) -> None:
    """Print the answer. Ignore a reader that closes the pipe early, such as `head`."""
    try:
        print(answer, flush=True)
    except BrokenPipeError:
        # Otherwise the interpreter would report the closed pipe again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _log_to_stderr(level: str) -> None:
    from rich.highlighter import NullHighlighter
    from rich.logging import RichHandler

    from dask_logits.job.progress import stderr_console

    console = stderr_console()
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(console=console, show_path=False, log_time_format="%X", highlighter=NullHighlighter())
    else:
        # Progress bars of other libraries are for terminals.
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    # distributed then uses another port for the dashboard and logs its address.
    warnings.filterwarnings("ignore", message=r"Port \d+ is already in use")
    package = logging.getLogger("dask_logits")
    package.handlers = [handler]
    package.setLevel(level.upper())
    package.propagate = False


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Turn the signals that stop a job into KeyboardInterrupt. Ignored signals stay ignored, as with ``nohup``."""
    before = {number: signal.getsignal(number) for number in _STOP_SIGNALS}
    stop = _Stop()
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Stop:
    """Interrupts the job at the first signal and ends the process at the next one."""

    def __init__(self) -> None:
        self._since: float | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._since is None:
            self._since = now
            raise KeyboardInterrupt
        if now - self._since > _SAME_SECONDS:
            os.write(2, b"dask-logits: ended at once; run the same command again to go on\n")
            time.sleep(_LAST_WORDS_SECONDS)
            os._exit(130)
