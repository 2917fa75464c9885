"""The hub of datasets: whether it answers, the commit of its files, and their local copies."""

from __future__ import annotations

import contextlib
import logging
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence

from dask_logits.errors import DatasetError

logger = logging.getLogger(__name__)

_COMMIT = re.compile(r"@([0-9a-f]{40})/")
_HUB_SECONDS = 5.0


@contextlib.contextmanager
def given_up_soon(name: str, is_asked: bool) -> Iterator[None]:
    """Fail within seconds if the hub is asked and does not answer. ``datasets`` retries for most of a minute.

    Downloaded files are still used.
    """
    import datasets.config
    from huggingface_hub import constants

    reason = _unreachable(constants.ENDPOINT) if is_asked and not constants.is_offline_mode() else None
    if reason is None:
        yield
        return
    logger.warning("%s cannot be reached (%s): only downloaded datasets are used", constants.ENDPOINT, reason)
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    except DatasetError as error:
        raise DatasetError(
            f"distillation.dataset.name: {constants.ENDPOINT} cannot be reached, and {name!r} was not downloaded "
            f"before; check the network or the name ({error})"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def pinned_commit(files: Sequence[str]) -> str | None:
    """Return the commit that hub URLs are pinned to.

    >>> pinned_commit(["hf://datasets/a/b@" + "0" * 40 + "/x.parquet"]) == "0" * 40, pinned_commit(["/tmp/x.parquet"])
    (True, None)
    """
    match = _COMMIT.search(files[0]) if files else None
    return match.group(1) if match else None


def downloaded(files: Sequence[str], num_proc: int | None) -> list[str]:
    """Return local copies of a hub's files, from the cache of ``datasets``."""
    from datasets import DownloadConfig, DownloadManager

    if not files[0].startswith("hf://"):
        return list(files)
    manager = DownloadManager(download_config=DownloadConfig(num_proc=num_proc))
    paths: list[str] = manager.download(list(files))
    return paths


def _unreachable(address: str) -> str | None:
    """Return the reason why a server is unreachable, or None if it answers with any status."""
    request = urllib.request.Request(address, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=_HUB_SECONDS):
            return None
    except urllib.error.HTTPError:
        return None
    except OSError as error:
        # Certificate errors are left to the hub library.
        cause = getattr(error, "reason", error)
        return None if isinstance(cause, ssl.SSLError) else str(cause)
