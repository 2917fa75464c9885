"""Ask workers what they are. Those that join during a job are asked once, without waiting for the answer.

In a job on GPUs a newcomer rests until it has answered, at most 20 s, while others work.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from distributed import Client

from dask_logits.job.gpus import WorkerFacts, unfit, worker_facts
from dask_logits.job.roster import Roster
from dask_logits.job.scheduler import CALL_SECONDS

logger = logging.getLogger(__name__)

# Time until a worker that did not answer is asked again.
_AGAIN_SECONDS = 60.0


async def ask(client: Client, address: str, seconds: float) -> Any:
    """Return the facts of a worker, or the error that it answers. None or an ``OSError`` says nothing of the worker."""
    call = client.run(worker_facts, workers=[address], asynchronous=True, on_error="return")
    return (await asyncio.wait_for(call, seconds)).get(address)


def broken(answer: object) -> str:
    """Return why a worker gets no work that answered with another thing than its facts."""
    return f"it cannot tell its environment ({answer!r}); install the same packages there"


@dataclass
class Newcomers:
    """Compare workers that join later with those that a job has.

    Parameters
    ----------
    client
        A connected client.
    roster
        Hosts and GPUs of newcomers are added, and those that cannot score are left out.
    device, gpus_per_worker
        The device of the job, and how many GPUs a worker uses.
    facts
        Address → facts of the workers that have answered.
    """

    client: Client
    roster: Roster
    device: str
    gpus_per_worker: int
    facts: dict[str, WorkerFacts]
    _asked: dict[str, Future[Any]] = field(default_factory=dict)
    _silent_until: dict[str, float] = field(default_factory=dict)

    def look(self, present: Collection[str], now: float) -> None:
        """Ask new workers among the present ones, and judge those that have answered since the last call."""
        for known in (self.facts, self._silent_until):
            for gone in known.keys() - present:
                del known[gone]
        for address in sorted(set(present) - self.facts.keys() - self._asked.keys() - self.roster.left_out.keys()):
            if self._silent_until.get(address, 0.0) <= now:
                self._asked[address] = asyncio.run_coroutine_threadsafe(
                    ask(self.client, address, CALL_SECONDS), self.client.loop.asyncio_loop
                )
                if self.device == "cuda":
                    self.roster.rest(address, now + CALL_SECONDS)
        for address, future in list(self._asked.items()):
            if future.done():
                del self._asked[address]
                if address in present:
                    self._judge(address, future, now)

    def cancel(self) -> None:
        """Wait for no more answers."""
        for future in self._asked.values():
            future.cancel()
        self._asked.clear()

    def _judge(self, address: str, future: Future[Any], now: float) -> None:
        # An exception of the call itself says nothing of the worker.
        answer = None if future.cancelled() or future.exception() else future.result()
        if answer is None or isinstance(answer, OSError):
            self._silent_until[address] = now + _AGAIN_SECONDS
            return
        reason = self._reason(address, answer)
        self.roster.rest(address, 0.0)
        if reason is not None:
            self.roster.leave_out({address: reason})
            logger.error("worker %s joined and gets no work: %s", self.roster.name(address), reason)

    def _reason(self, address: str, answer: Any) -> str | None:
        """Return why a worker gets no work. None: it can score."""
        if not isinstance(answer, WorkerFacts):
            return broken(answer)
        self.roster.note_facts(address, answer)
        nanny = self.roster.nannies.get(address)
        others = {
            other: facts
            for other, facts in self.facts.items()
            # Not its own process from before a restart.
            if other not in self.roster.left_out and (nanny is None or self.roster.nannies.get(other) != nanny)
        }
        reason = unfit({**others, address: answer}, self.device, self.gpus_per_worker).get(address)
        if reason is None:
            self.facts[address] = answer
        return reason
