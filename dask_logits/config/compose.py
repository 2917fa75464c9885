"""Hydra composition: YAML tree plus overrides, validated as :class:`~dask_logits.Config`.

The composed tree leaves this module as a plain mapping, so no other module depends on Hydra or OmegaConf.
Override keys are checked before Hydra sees them, because Hydra stops at the first unknown key and users want all.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
import shlex
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dask_logits.config.root import Config, settings
from dask_logits.config.setting import flat, nearest
from dask_logits.errors import ConfigError

# Hydra composes with one global state per process.
_COMPOSING = threading.Lock()
_OLD_TREE = "teacher_logits."
_OLD_NAMES = {
    "teacher_model_path": "distillation.teacher.model_path",
    "model_path": "distillation.teacher.model_path",
    "cache_dir": "distillation.teacher.cache_dir",
    "output_dir": "distillation.teacher.cache_dir",
}


def config_dir() -> Path:
    """Return the folder with ``config.yaml``: next to the package in a checkout, inside it in a wheel."""
    package = Path(__file__).parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "config"


def load_config(overrides: Sequence[str] = (), *, dataset_given: bool = False) -> Config:
    """Compose and validate the configuration.

    Parameters
    ----------
    overrides
        Hydra overrides such as ``distillation.dataset.name=wikitext``.
    dataset_given
        Whether a dataset object is passed separately, so that ``dataset.name`` may be missing.

    Raises
    ------
    ConfigError
        With all problems of the overrides, or else all of the values.
    """
    from omegaconf import OmegaConf

    check_overrides(overrides)
    with _translated(), _COMPOSING:
        tree = OmegaConf.to_container(_composed(quoted(overrides)), resolve=True)
    assert isinstance(tree, dict)
    return Config.from_mapping(tree["distillation"], dataset_given=dataset_given)


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Raise errors of Hydra and OmegaConf as ConfigError."""
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    try:
        yield
    except (HydraException, OmegaConfBaseException) as error:
        problem = " ".join(str(error).split())
        if isinstance(error, OverrideParseException):
            problem = (
                f"{error.override}: expected SETTING=VALUE, got a value that Hydra's grammar does not know; put one "
                "with other characters than letters, digits and -_./:@+ in quotes, as in 'SETTING=\"a b\"'"
            )
        elif isinstance(error, MissingConfigException) and error.options:
            group, _, name = str(error.missing_cfg_file).rpartition("/")
            problem = f"{group}: expected one of {', '.join(error.options)}, got {name!r}" if group else problem
        raise ConfigError.from_problems(problem) from error


def _composed(overrides: Sequence[str]) -> Any:
    """Compose the tree. Tree are composed once per process, because Hydra takes 60 ms for them."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    values = [override for override in overrides if override.startswith("distillation.")]
    groups = [override for override in overrides if not override.startswith("distillation.")]
    parsed = OverridesParser.create().parse_overrides(values)
    if any(group.startswith(("+", "~")) for group in groups) or any(each.is_sweep_override() for each in parsed):
        return _hydra(tuple(overrides), _edited())
    tree = copy.deepcopy(_hydra(tuple(groups), _edited()))
    try:
        for each in parsed:
            OmegaConf.update(tree, each.key_or_group, each.value())
    except OmegaConfBaseException:
        # Hydra says which override it was.
        return _hydra(tuple(overrides), _edited())
    return tree


def _edited() -> tuple[int, ...]:
    """Return when the files of the tree were last changed, in nanoseconds."""
    return tuple(path.stat().st_mtime_ns for path in sorted(config_dir().rglob("*.yaml")))


@functools.lru_cache(maxsize=16)
def _hydra(overrides: tuple[str, ...], edited: tuple[int, ...]) -> Any:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    # The caller may be a Hydra program itself.
    outer = GlobalHydra.instance()
    program = outer.hydra
    outer.clear()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            return compose("config", list(overrides))
    finally:
        outer.hydra = program
        GlobalHydra.set_instance(outer)


def run_hydra_app(arguments: Sequence[str], task: Callable[[dict[str, Any]], None]) -> None:
    """Serve Hydra's own flags (``--help``, ``--cfg job``, ``--multirun``, …) over the same tree.

    Parameters
    ----------
    arguments
        The command line after the command's name.
    task
        Called with each composed ``distillation`` tree before validation. Under ``--multirun``, each tree has its own
        sub-folder of ``cache_dir``.

    Raises
    ------
    ConfigError
        If an override key does not exist.
    """
    import sys

    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    check_overrides([argument for argument in arguments if "=" in argument and not argument.startswith("-")])
    if not {"-m", "--multirun"} & set(arguments):
        # A sweep needs Hydra's own grammar.
        arguments = [argument if argument.startswith("-") else quoted([argument])[0] for argument in arguments]

    def app(composed: Any) -> None:
        tree = OmegaConf.to_container(composed, resolve=True)
        assert isinstance(tree, dict)
        distillation = tree["distillation"]
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            folder = Path(distillation["teacher"]["cache_dir"]) / str(HydraConfig.get().job.num)
            distillation["teacher"]["cache_dir"] = str(folder)
        task(distillation)

    sys.argv = [sys.argv[0], *arguments]
    hydra.main(config_path=str(config_dir()), config_name="config", version_base="1.3")(app)()


def quoted(overrides: Sequence[str]) -> list[str]:
    """Quote the values of text settings as Hydra's grammar requires, so that users do not have to.

    Quoted values, null and interpolations are unchanged.

    >>> quoted(["distillation.dataset.split=train[:5]+test[:5]", "distillation.partition.rows=4"])
    ["distillation.dataset.split='train[:5]+test[:5]'", 'distillation.partition.rows=4']
    >>> quoted(["distillation.dataset.data_files=[/x/date=2024-01-01/*.parquet,b.parquet]"])
    ["distillation.dataset.data_files=['/x/date=2024-01-01/*.parquet','b.parquet']"]
    """
    types = {setting.path: setting.type for setting in settings()}
    made = []
    for override in overrides:
        key, equals, value = override.partition("=")
        kind = types.get(key.lstrip("+"), "")
        if equals and value not in ("", "null") and "${" not in value and not key.endswith(".devices"):
            if kind in ("str", "str or null"):
                override = f"{key}={_quoted(value)}"
            elif kind == "list of str or null":
                items = _items(value[1:-1] if value.startswith("[") and value.endswith("]") else value)
                override = f"{key}=[{','.join(map(_quoted, items))}]"
        made.append(override)
    return made


def _items(text: str) -> list[str]:
    """Split a list at the commas outside quotes, braces and brackets."""
    return [item.strip() for item in re.findall(r"""(?:"[^"]*"|'[^']*'|\{[^}]*\}|\[[^\]]*\]|[^,])+""", text)]


def _quoted(value: str) -> str:
    is_quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return value if is_quoted else _in_quotes(value, "'")


def _in_quotes(text: str, quote: str) -> str:
    """Put a text in quotes. In Hydra's grammar, a backslash counts only before a quote."""
    escaped = re.sub(rf"(\\*){quote}", rf"\1\1\\{quote}", re.sub(r"(\\+)$", r"\1\1", text))
    return f"{quote}{escaped}{quote}"


def check_overrides(overrides: Sequence[str]) -> None:
    """Refuse unknown override keys, all at once, each with the nearest known spelling.

    >>> check_overrides(["distillation.dataset.nam=c4"])
    Traceback (most recent call last):
    dask_logits.errors.ConfigError: 1 problem in the configuration:
      distillation.dataset.nam: unknown setting, did you mean 'distillation.dataset.name'?
    """
    known = [setting.path for setting in settings()]
    groups = {path.rsplit(".", depth)[0] for path in known for depth in range(1, path.count(".") + 1)}
    heads = {"distillation", "cluster", *groups}
    problems = []
    for override in overrides:
        key, _, value = override.partition("=")
        key = key.lstrip("+~").split("@")[0]
        leaf = key.rsplit(".", 1)[-1]
        same_leaf = [path for path in known if path.endswith(f".{leaf}")]
        if key.startswith(_OLD_TREE):
            name = next(iter(same_leaf), _OLD_NAMES.get(leaf))
            new = f"{name}={value}" if name else "the nearest setting in docs/SETTINGS.md"
            problems.append(f"{key}: this tree has gone; use {new}")
        elif key not in known and key not in heads and not key.startswith("hydra"):
            # The right name in the wrong group, or in none, is preferred to a similar spelling.
            guess = nearest(key, same_leaf, cutoff=0) or nearest(key, known)
            problems.append(f"{key}: unknown setting{guess}")
    if problems:
        raise ConfigError.from_problems(*problems)


def generate_command(tree: Mapping[str, Any]) -> str | None:
    """Return the command line that starts a job with these settings, or None if the dataset is a Python object.

    Parameters
    ----------
    tree
        The ``distillation`` tree of a manifest.

    Examples
    --------
    >>> print(generate_command({"teacher": {"model_path": "my teacher"}, "dataset": {"name": "c4", "streaming": True}}))
    dask-logits generate \\
      'distillation.teacher.model_path="my teacher"' \\
      distillation.dataset.name=c4 \\
      distillation.dataset.streaming=true
    """
    if not flat(tree).get("distillation.dataset.name"):
        return None
    defaults = flat(Config().model_dump())
    # A file holds lists where the defaults have tuples.
    changed = [(path, value) for path, value in flat(tree).items() if _written(value) != _written(defaults.get(path))]
    return " \\\n  ".join(
        ["dask-logits generate", *(shlex.quote(f"{path}={_written(value)}") for path, value in changed)]
    )


def _written(value: Any) -> str:
    """Format a value in Hydra's syntax.

    >>> _written(None), _written(True), _written("0,1"), _written(["a.jsonl", "b c"])
    ('null', 'true', '"0,1"', '[a.jsonl,"b c"]')
    """
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_written, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if not isinstance(value, str):
        return str(value)
    is_plain = re.fullmatch(r"[\w./:@+-]*[A-Za-z/][\w./:@+-]*", value, re.A)
    if is_plain and value.lower() not in ("null", "true", "false", "nan", "inf", "yes", "no", "on", "off"):
        return value
    return _in_quotes(value, '"')


def override(tree: Mapping[str, Any], overrides: Sequence[str], *, dataset_given: bool = False) -> Config:
    """Validate a ``distillation`` tree with some settings changed.

    Parameters
    ----------
    tree
        Nested mappings, for example from a manifest.
    overrides
        ``distillation.….…=value``.
    dataset_given
        Whether a dataset object is passed separately.

    Raises
    ------
    ConfigError
        With all problems of the overrides, or else all of the values.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    check_overrides(overrides)
    groups = [given for given in overrides if not given.startswith("distillation.")]
    if groups:
        raise ConfigError.from_problems(*[f"{given}: expected distillation.SETTING=VALUE" for given in groups])
    with _translated(), _COMPOSING:
        parsed = OverridesParser.create().parse_overrides(quoted(overrides))
        if sweeps := [each.input_line for each in parsed if each.is_sweep_override()]:
            wrong = "expected one value, got several; write a list as [a,b], and put a text with commas in quotes"
            raise ConfigError.from_problems(*[f"{line}: {wrong}" for line in sweeps])
        merged = OmegaConf.create({"distillation": dict(tree)})
        for each in parsed:
            OmegaConf.update(merged, each.key_or_group, each.value())
        plain = OmegaConf.to_container(merged)
    assert isinstance(plain, dict)
    return Config.from_mapping(plain["distillation"], dataset_given=dataset_given)
