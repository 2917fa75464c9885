"""Which workers get work, as decisions without input or output.

A worker that fails rests for 2, 4, … 60 s while others work, so it draws few partitions however fast it fails. A worker
that fails three times in a row, the last time after others completed two of its partitions, gets no more work. A worker
with another environment than the run's gets none at all, and neither does one whose device fails three times in a row.
A worker has one partition at a time until it completes its first, and after a failure of its device until the next.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from dask_logits.job.gpus import WorkerFacts
from dask_logits.job.retry_policy import rest_seconds
from dask_logits.worker.environment import Environment, describe, differences, environment, fix_for

logger = logging.getLogger(__name__)

# Failures of a worker without a success in between, and how many of these partitions others must have completed.
_FAILURES_IN_A_ROW = 3
_DONE_BY_OTHERS = 2


@dataclass
class Roster:
    """State of the workers of a cluster.

    Parameters
    ----------
    hosts
        Address → name of the machine, if reported by the worker.
    left_out
        Address → reason why this worker gets no work.
    nannies
        Address → address of its nanny, which stays the same when the worker is restarted.
    gpus
        Address → its GPU, if reported by the worker.
    """

    hosts: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    nannies: dict[str, str] = field(default_factory=dict)
    gpus: dict[str, str] = field(default_factory=dict)
    _tried: dict[int, list[str]] = field(default_factory=dict)
    # Failures in a row: worker → partition → time when another worker completed it.
    _charges: dict[str, dict[int, float | None]] = field(default_factory=dict)
    _rests_until: dict[str, float] = field(default_factory=dict)
    # Nannies of workers that have completed a partition, and partitions that failed on a device in a row.
    _proven: set[str] = field(default_factory=set)
    _sick: dict[str, list[int]] = field(default_factory=dict)
    # Partition → failures on devices that work.
    _on_good_devices: Counter[int] = field(default_factory=Counter)

    def name(self, worker: str) -> str:
        """Return a worker's address with its host and GPU.

        >>> Roster(hosts={"tcp://10.0.0.2:4001": "node2"}).name("tcp://10.0.0.2:4001")
        'tcp://10.0.0.2:4001 on node2'
        """
        gpu = self._reported(self.gpus, worker)
        return f"{worker} on {self.host(worker)}{f' ({gpu})' if gpu else ''}"

    def host(self, worker: str) -> str:
        """Return the machine of a worker: its name, or the host part of its address."""
        return self._reported(self.hosts, worker) or worker.rpartition("://")[2].rpartition(":")[0] or worker

    def _reported(self, facts: Mapping[str, str], worker: str) -> str | None:
        """Return what a worker reported, or its process before a restart, which had another address."""
        nanny = self.nannies.get(worker)
        if worker in facts or nanny is None:
            return facts.get(worker)
        return next((fact for other, fact in facts.items() if self.nannies.get(other) == nanny), None)

    def note_nannies(self, workers: Mapping[str, Mapping[str, Any]]) -> None:
        """Record the nannies of workers, as the scheduler describes them."""
        self.nannies |= {worker: facts["nanny"] for worker, facts in workers.items() if facts.get("nanny")}

    def note_facts(self, worker: str, facts: WorkerFacts) -> None:
        """Record the machine of a worker, and its GPU if it has one."""
        self.hosts[worker] = facts.host
        if facts.gpus_in_use:
            self.gpus[worker] = facts.gpus_in_use[0]

    def rest(self, worker: str, until: float) -> None:
        """Give a worker no work before a time, while others remain."""
        self._rests_until[worker] = until

    def usable(self, present: Iterable[str]) -> set[str]:
        """Return the workers that may get work."""
        return set(present) - self.left_out.keys()

    def most(self, worker: str, threads: int) -> int:
        """Return how many partitions a worker with some threads may have at one time."""
        nanny = self._nanny(worker)
        return threads if nanny in self._proven and not self._sick.get(nanny) else 1

    def choose(self, present: Iterable[str], index: int | None, now: float) -> set[str]:
        """Return the workers that may get a partition now.

        Workers on which it failed, also before a restart, and resting workers are skipped while others remain. A
        partition that failed before is assigned to a worker without failures, if there is one.
        """
        usable = self.usable(present)
        awake = {worker for worker in usable if self._rests_until.get(worker, 0.0) <= now}
        tried = set(map(self._nanny, self.tried(index))) if index is not None else set()
        failed_on = {worker for worker in usable if self._nanny(worker) in tried}
        clean = awake - self._charges.keys() if failed_on else set()
        choices = (clean - failed_on, awake - failed_on, usable - failed_on, awake)
        return next((some for some in choices if some), usable)

    def tried(self, index: int) -> list[str]:
        """Return the workers on which a partition failed, without excluded ones."""
        return [worker for worker in self._tried.get(index, []) if worker not in self.left_out]

    def note_failure(self, worker: str, index: int, *, started: float, now: float) -> str | None:
        """Record a partition's failure on a worker. Return the reason if the worker gets no more work, else None."""
        self._tried.setdefault(index, []).append(worker)
        charges = self._charges.setdefault(worker, {})
        charges.pop(index, None)
        charges[index] = None
        self._rests_until[worker] = now + rest_seconds(len(charges))
        proven = sum(done is not None and done < started for done in charges.values())
        if len(charges) < _FAILURES_IN_A_ROW or proven < _DONE_BY_OTHERS:
            return None
        reason = f"it failed {len(charges)} partitions in a row, of which other workers completed {proven}"
        self.leave_out({worker: reason})
        return reason

    def note_device_failure(self, worker: str, index: int) -> tuple[int, str | None]:
        """Record that a device failed while it computed a partition.

        Returns
        -------
        int
            Failures of the partition on devices that work.
        str or None
            The reason if the worker should get no more work.
        """
        self._tried.setdefault(index, []).append(worker)
        nanny = self._nanny(worker)
        in_a_row = self._sick.setdefault(nanny, [])
        in_a_row.append(index)
        is_good = nanny in self._proven and set(in_a_row) == {index}
        self._on_good_devices[index] += is_good
        if is_good or len(in_a_row) < _FAILURES_IN_A_ROW:
            return self._on_good_devices[index], None
        return self._on_good_devices[index], f"its device failed {len(in_a_row)} times in a row"

    def _nanny(self, worker: str) -> str:
        return self.nannies.get(worker, worker)

    def note_success(self, worker: str | None, index: int, now: float) -> None:
        """Record that a partition was completed."""
        self._tried.pop(index, None)
        self._on_good_devices.pop(index, None)
        if worker is not None:
            self._proven.add(self._nanny(worker))
            self._sick.pop(self._nanny(worker), None)
            self._charges.pop(worker, None)
            self._rests_until.pop(worker, None)
        for charges in self._charges.values():
            if index in charges:
                charges[index] = now

    def note_bad(self, index: int) -> None:
        """Record that a partition has failed permanently, which is not the fault of a worker."""
        for in_a_row in self._sick.values():
            in_a_row[:] = [other for other in in_a_row if other != index]
        for worker in self._tried.pop(index, []):
            charges = self._charges.get(worker, {})
            charges.pop(index, None)
            if not charges:
                self._rests_until.pop(worker, None)

    def leave_out(self, reasons: Mapping[str, str]) -> None:
        """Exclude workers from further work."""
        self.left_out.update(reasons)

    def named(self) -> dict[str, str]:
        """Return address and host → reason, for excluded workers."""
        return {self.name(worker): reason for worker, reason in sorted(self.left_out.items())}

    def listed(self) -> str:
        """Return the excluded workers, one per line, with the reasons."""
        return "\n".join(f"  {worker}: {reason}" for worker, reason in self.named().items())


def choose_environment(workers: Mapping[str, Environment], own: Environment) -> Environment | None:
    """Return the environment for a new run.

    It is the most common one among the workers with this release of the package, or on a tie this process's own.

    Parameters
    ----------
    workers
        Address → environment.
    own
        Environment of this process, on a CPU.

    Returns
    -------
    mapping or None
        None if no worker has this release.
    """
    fitting = [workers[address] for address in sorted(workers) if workers[address]["dask_logits"] == own["dask_logits"]]
    votes = Counter(tuple(sorted(each.items())) for each in fitting)
    return max(fitting, key=lambda each: (votes[tuple(sorted(each.items()))], each == own), default=None)


def leave_out_misfits(roster: Roster, workers: Mapping[str, Environment], expected: Environment | None) -> list[str]:
    """Exclude workers with another environment, and log their names.

    Parameters
    ----------
    roster
        The roster. Excluded workers are added.
    workers
        Address → environment.
    expected
        The run's environment. None: a new run, which uses the most common environment.

    Returns
    -------
    list
        Workers that may get work.
    """
    own = environment("cpu")
    reference = expected or choose_environment(workers, own)
    reasons = {}
    for address, each in workers.items():
        differing = differences(reference or {**each, "dask_logits": own["dask_logits"]}, each)
        if differing:
            reasons[address] = f"{describe(differing)}; {fix_for(differing)}"
    roster.leave_out(reasons)
    fit = sorted(roster.usable(workers))
    if reasons and fit:
        logger.error(
            "these workers differ from the run's environment and get no work "
            "(distillation.cluster.allow_mixed_workers=true would allow it):\n%s",
            roster.listed(),
        )
    return fit
