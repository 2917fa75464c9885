"""Tell somebody that a job has ended: a command, or a webhook.

The webhook's address is a secret. It comes from the environment, never from a setting, and no message or file has it.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from dask_logits.config.groups import JobConfig
from dask_logits.errors import first_line

logger = logging.getLogger(__name__)

WEBHOOK = "DASK_LOGITS_WEBHOOK"
_COMMAND_SECONDS = 60.0
_WEBHOOK_SECONDS = 10.0

State = Literal["done", "failed"]


def notify(config: JobConfig, run: Path, state: State, reason: str | None = None) -> None:
    """Call the command and the webhook, if there are any. A failure to do so is logged, and nothing else.

    Parameters
    ----------
    config
        Settings with the command.
    run
        The run folder.
    state
        How the job ended.
    reason
        Why it failed.
    """
    text = f"dask-logits on {socket.gethostname()}: {run} {state}" + (f": {reason}" if reason else "")
    # Chat services show `text` or `content`.
    message = {"run": str(run), "state": state, "reason": reason, "at": time.time(), "text": text, "content": text}
    if config.notify_command is not None:
        _call(config.notify_command, message)
    if address := os.environ.get(WEBHOOK):
        _post(address, message)


def _call(command: tuple[str, ...], message: Mapping[str, object]) -> None:
    where = "distillation.job.notify_command"
    try:
        ended = subprocess.run(
            command, input=json.dumps(message), capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        logger.warning("%s: expected it to run, got %s", where, first_line(error))
        return
    if ended.returncode:
        said = ended.stderr.strip().partition("\n")[0]
        logger.warning("%s: expected it to exit with 0, got %d: %.200s", where, ended.returncode, said)


def _post(address: str, message: Mapping[str, object]) -> None:
    headers = {"Content-Type": "application/json"}
    try:
        if not address.startswith(("http://", "https://")):
            raise ValueError
        request = urllib.request.Request(address, json.dumps(message).encode(), headers)
        with urllib.request.urlopen(request, timeout=_WEBHOOK_SECONDS):
            pass
    except urllib.error.HTTPError as error:
        logger.warning("%s: expected the message to be taken, got HTTP status %d", WEBHOOK, error.code)
    except OSError as error:
        # The error itself may contain the address.
        logger.warning("%s: expected an answer, got %s", WEBHOOK, type(getattr(error, "reason", error)).__name__)
    except ValueError:
        logger.warning("%s: expected an address that begins with https:// or http://, got another text", WEBHOOK)
