"""Which worker is given what, and which gets no more work."""

from __future__ import annotations

from dask_logits.job.roster import Roster, choose_environment


def test_a_retry_goes_to_a_worker_that_has_not_failed() -> None:
    roster = Roster()
    assert roster.choose("abc", 0, 0.0) == {"a", "b", "c"}
    roster.note_failure("a", 0, started=0.0, now=0.0)
    assert roster.choose("abc", 0, 0.0) == {"b", "c"}
    # Others are not given to a worker that rests after a failure, unless there is no other worker.
    assert roster.choose("abc", 1, 1.0) == {"b", "c"}
    assert roster.choose("a", 1, 1.0) == {"a"}
    assert roster.choose("abc", 1, 3.0) == {"a", "b", "c"}
    roster.note_failure("b", 1, started=0.0, now=0.0)
    assert roster.choose("abc", 0, 9.0) == {"c"}
    assert roster.choose("ab", 0, 9.0) == {"b"}
    roster.leave_out({"b": "why"})
    assert roster.choose("ab", 0, 9.0) == {"a"}
    assert roster.choose("b", 0, 9.0) == set()


def test_a_worker_that_fails_what_others_complete_gets_no_more_work() -> None:
    roster = Roster(hosts={"bad": "node7"})
    for index, now in enumerate((0.0, 3.0, 8.0)):
        assert roster.note_failure("bad", index, started=now, now=now) is None
    # It rests for 2, 4, 8 s.
    assert roster.choose(["bad", "good"], 9, 15.0) == {"good"}
    for index in (0, 1):
        roster.note_success("good", index, 10.0)
    reason = roster.note_failure("bad", 4, started=17.0, now=17.0)
    assert reason == "it failed 4 partitions in a row, of which other workers completed 2"
    assert roster.named() == {"bad on node7": reason}
    # What failed there alone does not count against a partition.
    assert roster.tried(4) == []


def test_an_outage_of_the_shared_disk_retires_nobody() -> None:
    roster = Roster()
    for index, worker in enumerate("aaabbb"):
        roster.note_failure(worker, index, started=0.0, now=float(index))
    roster.note_success("a", 3, 20.0)
    roster.note_success("a", 4, 21.0)
    # Submitted before others succeeded, so it says nothing about the time after.
    assert roster.note_failure("b", 7, started=19.0, now=22.0) is None
    roster.note_success("b", 8, 30.0)
    assert roster.note_failure("b", 9, started=31.0, now=31.0) is None
    assert roster.left_out == {}


def test_bad_partitions_are_no_workers_fault() -> None:
    roster = Roster()
    for index in range(5):
        for worker in "ab":
            assert roster.note_failure(worker, index, started=0.0, now=0.0) is None
        roster.note_bad(index)
    assert roster.choose("abc", 9, 0.0) == {"a", "b", "c"}


def test_a_new_run_takes_the_environment_of_most_workers_with_this_release() -> None:
    own = {"dask_logits": "1", "cpu": "AVX2"}
    wide = {"dask_logits": "1", "cpu": "AVX512"}
    old = {"dask_logits": "0", "cpu": "AVX2"}
    assert choose_environment({"a": wide, "b": own}, own) == own
    assert choose_environment({"a": wide, "b": own, "c": wide}, own) == wide
    assert choose_environment({"a": old, "b": old, "c": wide}, own) == wide
    assert choose_environment({"a": old}, own) is None


def test_a_device_that_fails_in_a_row_gets_no_more_work_and_a_bad_partition_is_told_from_it() -> None:
    roster = Roster(nannies={"a1": "nanny", "a2": "nanny"})
    # It has completed nothing, so nothing is said about the partition. A restart changes the address.
    assert roster.note_device_failure("a1", 0) == (0, None)
    assert roster.note_device_failure("a2", 0) == (0, None)
    assert roster.note_device_failure("a2", 0) == (0, "its device failed 3 times in a row")
    roster = Roster()
    roster.note_success("a", 0, 0.0)
    assert roster.note_device_failure("a", 1) == (1, None)
    roster.note_success("a", 2, 0.0)
    assert roster.note_device_failure("a", 1) == (2, None)
    roster.note_bad(1)
    # Different partitions in a row: the device is sick.
    assert roster.note_device_failure("a", 3) == (1, None)
    assert roster.note_device_failure("a", 4) == (0, None)
    assert roster.note_device_failure("a", 3) == (1, "its device failed 3 times in a row")


def test_a_restarted_worker_is_named_with_its_host_and_gpu() -> None:
    roster = Roster(hosts={"tcp://n:1": "node7"}, gpus={"tcp://n:1": "NVIDIA H200 GPU-e0"})
    roster.note_nannies({"tcp://n:1": {"nanny": "tcp://n:9"}, "tcp://n:5": {"nanny": None}})
    roster.note_nannies({"tcp://n:2": {"nanny": "tcp://n:9"}, "tcp://n:6": {"nanny": None}})
    assert roster.name("tcp://n:2") == "tcp://n:2 on node7 (NVIDIA H200 GPU-e0)"
    assert roster.name("tcp://n:6") == "tcp://n:6 on n"


def test_a_worker_has_one_partition_until_it_has_completed_one_and_after_a_failure_of_its_device() -> None:
    roster = Roster(nannies={"a1": "nanny", "a2": "nanny"})
    assert roster.most("a1", 3) == 1
    roster.note_success("a1", 0, 0.0)
    assert (roster.most("a1", 3), roster.most("a2", 2), roster.most("b", 3)) == (3, 2, 1)
    roster.note_device_failure("a1", 1)
    assert roster.most("a2", 3) == 1
    roster.note_success("a2", 2, 0.0)
    assert roster.most("a2", 3) == 3
    # A failure that is not the device's.
    roster.note_failure("a2", 3, started=0.0, now=0.0)
    assert roster.most("a2", 3) == 3


def test_a_restarted_worker_is_the_one_on_which_a_partition_failed() -> None:
    roster = Roster(nannies={"tcp://a:1": "tcp://a:9", "tcp://a:2": "tcp://a:9", "tcp://b:1": "tcp://b:9"})
    roster.note_success("tcp://a:1", 4, 0.0)
    roster.note_device_failure("tcp://a:1", 5)
    assert roster.choose(["tcp://a:2", "tcp://b:1"], 5, 0.0) == {"tcp://b:1"}
    assert roster.choose(["tcp://a:2", "tcp://b:1"], 6, 0.0) == {"tcp://a:2", "tcp://b:1"}
    assert roster.choose(["tcp://a:2"], 5, 0.0) == {"tcp://a:2"}
