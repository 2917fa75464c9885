"""The command line: each command is a few lines around one public function.

stdout is the answer, stderr the log. Exit status: 0 done, 1 ran and something failed, 2 refused, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from types import FrameType
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from dask_logits.errors import DaskLogitsError
from dask_logits.stderr import unblocked_stderr

if TYPE_CHECKING:
    from dask_logits.observe.status import Status

# SIGHUP is sent when a terminal closes, SIGUSR1 by Slurm as a warning (--signal=B:USR1@120).
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
# Launchers also forward a Ctrl-C that the terminal has already sent to the job.
_SAME_SECONDS = 1.0
_LAST_WORDS_SECONDS = 0.2

# Time limit in seconds for counting the rows of a Parquet stream in `plan`.
_COUNT_SECONDS = 10.0


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


class Command(click.Command):
    """A command that signals can stop. Errors of this package become a message and an exit status."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        run(partial(super().invoke, ctx))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Read the command line. A setting that is written as an option is refused with its name."""
        given = list(args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            if any(each.name == "overrides" for each in self.params) and (name := _setting_of(error.option_name)):
                value = next((word.partition("=")[2] for word in given if word.startswith(f"{error.option_name}=")), "")
                raise click.UsageError(f"settings have no dashes: write {name}={value or 'VALUE'}", ctx) from error
            raise


def _setting_of(option: str) -> str | None:
    """Return the setting that an option of its name, or of its last part, must mean."""
    from dask_logits.config.root import settings

    word = option.lstrip("-").replace("-", "_")
    return next((each.path for each in settings() if each.path == word or each.path.endswith(f".{word}")), None)


class _SettingsCommand(Command):
    """A command whose help ends with the list of the settings."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from dask_logits.config.root import settings

        formatter.write("\nA run may be resumed with other values of the settings that are marked (free).\n")
        for (group, purpose), members in groupby(settings(), lambda each: (each.path.rpartition(".")[0], each.purpose)):
            with formatter.section(f"{group}: {purpose}"):
                for each in members:
                    free = " (free)" if each.is_free else ""
                    # A narrow first column puts the description on a line of its own.
                    formatter.write_dl([(f"{each.path}={each.default_text}", each.doc + free)], col_max=2)


def complete_settings(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem[Any]]:
    """Complete the names of settings and presets, and the values of the only one that matches."""
    from dask_logits.config.compose import config_dir
    from dask_logits.config.root import settings

    help_of = {each.path: each.doc for each in settings()} | {"cluster": "Preset of the group cluster."}
    values = {each.path: each.choices for each in settings()}
    values["cluster"] = tuple(sorted(path.stem for path in (config_dir() / "cluster").glob("*.yaml")))
    # bash splits NAME=VALUE at the equals sign and completes the last part only.
    *_, last = "", *(word for word in context.params[parameter.name or ""] or () if word != "=")
    known = f"{last}=" if last in values else ""
    word = known + incomplete
    names = [name for name in values if f"{name}=".startswith(word) or word.startswith(f"{name}=")]
    matches = [
        (name, f"{name}={value}") for name in names for value in ("", *(values[name] if len(names) == 1 else ()))
    ]
    return [
        CompletionItem(match.removeprefix(known), help=help_of[name])
        for name, match in matches
        if match.startswith(word) and match != word
    ]


settings_argument = click.argument(
    "overrides", nargs=-1, metavar="[SETTING=VALUE]...", shell_complete=complete_settings
)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
# The options of Hydra that `generate` passes on.
_HYDRA = (
    click.Option(["-c", "--cfg"], type=click.Choice(["job", "hydra", "all"]), help="Print the settings and stop."),
    click.Option(["-m", "--multirun"], is_flag=True, help="Run one job for each of several values: SETTING=A,B."),
    click.Option(["-p", "--package"], metavar="GROUP", help="With --cfg: print only this group of settings."),
    click.Option(["--resolve"], is_flag=True, help="With --cfg: resolve interpolations."),
    click.Option(["-r", "--run"], is_flag=True, help="Run a single job, the default."),
    click.Option(["-i", "--info"], metavar="WHAT", help="Print information about Hydra: all, config, defaults, …"),
    click.Option(["-cp", "--config-path"], metavar="DIR", help="Replace the folder of the configuration."),
    click.Option(["-cn", "--config-name"], metavar="NAME", help="Replace the name of the configuration."),
    click.Option(["-cd", "--config-dir"], metavar="DIR", help="Add a folder of configurations."),
    click.Option(["--experimental-rerun"], metavar="FILE", help="Rerun a job from a pickled configuration."),
    click.Option(["--hydra-help"], is_flag=True, help="Print the help of Hydra."),
)


class _Commands(click.Group):
    command_class = Command

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True},
    epilog="SETTING is a path such as distillation.dataset.name, or cluster for a preset such as cluster=local_cpu. "
    "`dask-logits generate --help` lists every setting.",
)
@click.version_option(package_name="dask-logits", message="%(prog)s %(version)s")
def commands() -> None:
    """Score a dataset with a teacher once, and train students from the file."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command. Exit with its status unless that is 0."""
    try:
        commands.main(arguments, prog_name="dask-logits")
    except SystemExit as end:
        if end.code:
            raise


@commands.command(cls=_SettingsCommand, params=list(_HYDRA))
@settings_argument
def generate(overrides: tuple[str, ...], **hydra: str | bool | None) -> None:
    """Score a dataset with a teacher into a run folder.

    The same command resumes a run that was stopped. The teacher (model_path) and the dataset (name) are required:

    \b
      dask-logits generate \\
        distillation.teacher.model_path=Qwen/Qwen3-8B \\
        distillation.dataset.name=Salesforce/wikitext \\
        distillation.dataset.config_name=wikitext-103-raw-v1 \\
        distillation.teacher.cache_dir=output/wikitext
    """
    from dask_logits.config.compose import load_config, run_hydra_app
    from dask_logits.config.root import Config

    def one(config: Config) -> None:
        from dask_logits.job.progress import step_lines

        _log_to_stderr(config.job.log_level)
        step_lines("preparing")("loading libraries")
        from dask_logits.job.run import generate
        from dask_logits.observe.status import read_status

        generate(config)
        _say("\n".join(read_status(config.teacher.cache_dir).lines()))

    given = {f"--{name.replace('_', '-')}": value for name, value in hydra.items() if value}
    options = [word for name, value in given.items() for word in ((name,) if value is True else (name, str(value)))]
    if options:
        # Hydra prints a traceback for exceptions of its task. Ours are printed as messages.
        run_hydra_app([*options, *overrides], lambda tree: _exit_on_error(lambda: one(Config.from_mapping(tree))))
    else:
        one(load_config(overrides))


@commands.command(cls=_SettingsCommand)
@settings_argument
@click.option("--measure", is_flag=True, help="Load the teacher and score a sample: measured time, and a table by k.")
@_json
def plan(overrides: tuple[str, ...], measure: bool, as_json: bool) -> None:
    """Estimate the cost of `generate`, without writing anything.

    The estimate has rows, tokens, partitions, time, disk and memory, beside the free disk and memory.
    """
    import json

    from dask_logits.config.compose import load_config
    from dask_logits.job.progress import step_lines

    config = load_config(overrides)
    _log_to_stderr(config.job.log_level)
    show = step_lines("planning")
    show("loading libraries")
    from dask_logits.job.capacity import plan_figures, plan_lines
    from dask_logits.job.forecast import forecast, forecast_lines
    from dask_logits.job.measured_plan import measure_plan, measured_figures, measured_lines
    from dask_logits.job.prepare import check_folder, prepare

    job = prepare(config, on_step=show, count_seconds=_COUNT_SECONDS)
    check_folder(job)
    if measure:
        found = measure_plan(job, on_step=show)
        lines, figures = measured_lines(job, found), measured_figures(job, found)
    else:
        show("estimating the speed")
        expected = forecast(job)
        lines = forecast_lines(job, expected)
        figures = {"tokens_per_second": expected and expected.tokens_per_second}
    _say(json.dumps({**plan_figures(job), **figures}) if as_json else "\n".join([*plan_lines(job), *lines]))


@commands.command()
@click.argument("run", type=click.Path())
@_json
@click.option("--watch", is_flag=True, help="Repeat until the run ends. Exit with 1 if it failed, 130 if it stopped.")
def status(run: str, as_json: bool, watch: bool) -> None:
    """Report the state of a run, from the files in its folder RUN."""
    from dask_logits.observe.status import read_status
    from dask_logits.observe.watch import EXIT_STATUS

    if watch and as_json:
        raise click.UsageError("expected --json or --watch, got both")
    state = _watched(run) if watch else read_status(run)
    _say(state.to_json() if as_json else "\n".join(state.lines()))
    if watch:
        # A reader that closed the pipe did not wait for the end.
        sys.exit(EXIT_STATUS.get(state.state, 0))


def _watched(run: str) -> Status:
    """Show a run until it ends: in place on a terminal, else a line for each change. Return its last state."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    from dask_logits.observe.watch import follow, progress_line

    console, before = Console(), ""
    with Live(console=console, auto_refresh=False, transient=True) as live:
        for state in follow(run):
            line = progress_line(state)
            if console.is_terminal:
                live.update(Text("\n".join(state.lines())), refresh=True)
            elif line != before and not _say(f"{time.strftime('%H:%M:%S')} {line}"):
                break
            before = line
    return state


@commands.command()
@click.argument("path", type=click.Path())
@click.option(
    "--output", type=click.Path(), help="File to write.  [default: report.html in a run, NAME.report.html by a cache]"
)
def report(path: str, output: str | None) -> None:
    """Write a page with charts of a run or a cache.

    PATH is a run folder in any state, a cache or an index. The page is one file and needs no network.
    """
    from dask_logits.observe.report import write_report

    _log_to_stderr("warning")
    _say(write_report(path, output))


@commands.command()
@click.argument("cache", type=click.Path())
@click.option(
    "--port", default=0, show_default=False, metavar="N", help="Port on this machine.  [default: any that is free]"
)
@click.option("--html", "output", type=click.Path(), help="Write some documents to this file instead of serving all.")
@click.option("--documents", metavar="N,N,…", help="Numbers of the documents for --html, from 0.")
def explore(cache: str, port: int, output: str | None, documents: str | None) -> None:
    """Show what the teacher expected at each token of a document, in a browser.

    CACHE is a cache, an index or a run folder. The page is served on this machine only, until Ctrl-C.
    """
    from dask_logits.observe.explore import Explorer, ExploreServer, write_explorer

    if (output is None) != (documents is None):
        raise click.UsageError("expected --html and --documents together, got one of them")
    if output is not None and documents is not None:
        words = documents.split(",")
        if not all(word.strip().isascii() and word.strip().isdigit() for word in words):
            raise click.UsageError(f"--documents: expected numbers such as 0,5,7, got {documents!r}")
        _say(write_explorer(cache, output, [int(word) for word in words]))
        return
    with ExploreServer(Explorer(cache), port) as server:
        _say(f"{server.address}  (Ctrl-C ends it)")
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()


@commands.command()
@click.argument("run", type=click.Path())
@settings_argument
@click.option("--bisect", is_flag=True, help="Find the rows that make a partition fail.")
def retry(run: str, overrides: tuple[str, ...], bisect: bool) -> None:
    """Score only the failed partitions of a run.

    RUN is its folder. Settings that are free may have other values than before.
    """
    from dask_logits.job.run import retry
    from dask_logits.observe.status import read_status

    _log_to_stderr("info")
    retry(run, overrides=overrides, bisect=bisect)
    _say("\n".join(read_status(run).lines()))


@commands.command()
@click.argument("path", type=click.Path())
@click.option(
    "--recompute", default=0, metavar="N", help="Score the partitions of N random rows of a run again and compare."
)
@click.option("--seed", default=0, help="Seed of the choice of these rows.")
@_json
def verify(path: str, recompute: int, seed: int, as_json: bool) -> None:
    """Check all checksums and invariants.

    PATH is a cache, an index or a run folder.
    """
    from dask_logits.job.recompute import verify

    _log_to_stderr("info")
    report = verify(path, recompute=recompute, seed=seed)
    _say(report.to_json() if as_json else "\n".join(report.lines()))
    if not report.ok:
        sys.exit(1)


@commands.command()
@click.argument("cache", type=click.Path())
@_json
def show(cache: str, as_json: bool) -> None:
    """Show the metadata of a cache.

    CACHE is a cache, an index or a run folder.
    """
    import json

    from dask_logits.ops.show import card, card_lines

    metadata = card(cache)
    _say(json.dumps(metadata, indent=1, ensure_ascii=False) if as_json else "\n".join(card_lines(metadata)))


@commands.command()
@click.argument("cache", type=click.Path())
@click.argument("target", type=click.Path())
@click.option("--profile", type=click.Choice(["plain", "compact"]), required=True)
@click.option("--precision", type=click.Choice([8, 10, 12]), default=8, help="Bits of a log-prob.")
def convert(cache: str, target: str, **options: Any) -> None:
    """Rewrite a cache in another profile, to the file TARGET.

    CACHE is a cache, an index or a run folder.
    """
    from dask_logits.ops.convert import convert

    _log_to_stderr("info")
    _say(convert(cache, target, **options))


@commands.command()
@click.argument("parts", nargs=-1, type=click.Path())
@click.option("--input-dir", type=click.Path(), help="Run folder of all workers, or a folder with their run folders.")
@click.option("--num-workers", type=int, metavar="N", help="Number of static workers. Any other number is refused.")
@click.option("--output", type=click.Path(), help="File to write.  [default: teacher_logits.h5 in the input folder]")
@click.option("--index", is_flag=True, help="Write an index over one cache per part instead of a single cache.")
@click.option("--max-file-size", metavar="SIZE", help="Split a larger cache into shards with an index, such as 20GB.")
def merge(parts: tuple[str, ...], input_dir: str | None, **options: Any) -> None:
    """Merge the results of static workers into one cache.

    PARTS are run folders or caches.
    """
    from dask_logits.observe.report import leave_report
    from dask_logits.ops.merge import merge
    from dask_logits.run.folder import RunFolder

    if not parts and not input_dir:
        raise click.UsageError("expected --input-dir or parts, got neither")
    _log_to_stderr("info")
    merged = merge([*([input_dir] if input_dir else []), *parts], **options)
    run = RunFolder(merged.parent)
    if run.manifest_path.exists():
        leave_report(run)
    _say(merged)


def _say(answer: object) -> bool:
    """Print the answer. Return False if the reader has closed the pipe early, such as `head`."""
    try:
        print(answer, flush=True)
    except BrokenPipeError:
        # Otherwise the interpreter would report the closed pipe again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
    return True


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
    """Turn the first signal that stops a job into KeyboardInterrupt, and end the process at the next one.

    Ignored signals stay ignored, as with ``nohup``.
    """
    since: float | None = None

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal since
        now = time.monotonic()
        if since is None:
            since = now
            raise KeyboardInterrupt
        if now - since > _SAME_SECONDS:
            os.write(2, b"dask-logits: ended at once; run the same command again to go on\n")
            time.sleep(_LAST_WORDS_SECONDS)
            os._exit(130)

    before = {number: signal.getsignal(number) for number in _STOP_SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
