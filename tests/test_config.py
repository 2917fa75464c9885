from __future__ import annotations

import re
import runpy
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from dask_logits.config.compose import _composed, _hydra, check_overrides, config_dir, load_config, override
from dask_logits.config.root import Config, settings
from dask_logits.errors import ConfigError

ROOT = Path(__file__).parents[1]
NEEDED = ["distillation.teacher.model_path=teacher", "distillation.dataset.name=data"]
PATHS = [
    "teacher.model_path", "teacher.revision", "teacher.tokenizer_path", "teacher.dtype", "teacher.trust_remote_code",
    "teacher.allow_pickle",
    "teacher.cache_dir", "teacher.generation.targets", "teacher.generation.top_k",
    "teacher.generation.draws", "teacher.generation.seed", "teacher.generation.temperatures",
    "teacher.generation.positions", "teacher.generation.position_share", "teacher.generation.batch_size",
    "teacher.generation.batch_tokens", "teacher.generation.head_rows", "teacher.generation.torch_threads",
    "teacher.generation.device", "teacher.generation.force_regenerate", "teacher.generation.num_workers",
    "teacher.generation.devices", "teacher.generation.gpus_per_worker", "teacher.generation.worker_id",
    "teacher.generation.total_workers", "dataset.name",
    "dataset.config_name", "dataset.split", "dataset.revision", "dataset.data_files",
    "dataset.text_column", "dataset.messages_column", "dataset.learn", "dataset.mask_column",
    "dataset.on_bad_row", "dataset.add_special_tokens", "dataset.vocab_size",
    "dataset.max_length",
    "dataset.long_documents", "dataset.window_stride", "dataset.packing", "dataset.separator_id",
    "dataset.max_samples", "dataset.streaming", "dataset.streaming_buffer_size", "dataset.streaming_chunk_size",
    "dataset.num_proc", "partition.rows", "scoring.logits",
    "scoring.compile", "cache.profile", "cache.precision", "cache.max_file_size",
    "cluster.kind", "cluster.scheduler", "cluster.scheduler_file",
    "cluster.dashboard_address", "cluster.wait_seconds", "cluster.allow_mixed_workers", "cluster.security.ca_file",
    "cluster.security.cert", "cluster.security.key", "job.retries", "job.stall_seconds", "job.max_failures",
    "job.keep_partitions", "job.notify_command", "job.log_level",
]  # fmt: skip


def problems_of(*overrides: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError, match="in the configuration") as caught:
        load_config([*NEEDED, *overrides])
    return caught.value.problems


def test_the_list_of_settings_is_pinned() -> None:
    assert [setting.path for setting in settings()] == [f"distillation.{path}" for path in PATHS]
    assert all(setting.doc for setting in settings())


def test_each_setting_of_the_kind_how_is_free_but_the_number_of_static_workers() -> None:
    bound = [setting for setting in settings() if setting.kind == "how" and not setting.is_free]
    assert [setting.path for setting in bound] == ["distillation.teacher.generation.total_workers"]
    assert "stays the same when a run is resumed" in bound[0].doc
    assert not any(setting.is_free for setting in settings() if setting.kind != "how")


def test_the_generated_files_follow_from_the_settings() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "write_settings.py"))
    assert script["YAML"].read_text() == script["defaults"]()
    assert script["PAGE"].read_text() == script["page"]()


def test_composing_changes_no_default() -> None:
    tree = {"teacher": {"model_path": "teacher"}, "dataset": {"name": "data"}}
    assert load_config(NEEDED) == Config.from_mapping(tree)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["distillation.partition.rows=3", "cluster=serial", "distillation.partition.rows=4"],
        ["distillation.teacher.generation={top_k: 7}", "distillation.dataset.data_files=[a,b]"],
        ["distillation.cluster.kind=serial", "cluster=local_cpu"],
        ["distillation.dataset.split=${distillation.dataset.name}", "distillation.dataset.name=null"],
        ["+distillation.dataset.name=a", "distillation.dataset.name=b", "~distillation.job.retries"],
        ["hydra.job.name=other", "distillation.job.retries=0"],
    ],
)
def test_the_tree_is_the_one_that_hydra_composes(overrides) -> None:
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        expected = compose("config", overrides)
    for _ in range(2):
        assert OmegaConf.to_container(_composed(overrides)) == OmegaConf.to_container(expected)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("distillation.partition.rows=1,2", "To sweep over it, add --multirun"),
        ("distillation.partition={row: 1}", "Could not override"),
    ],
)
def test_what_hydra_refuses_is_refused_in_its_words(override, message) -> None:
    for _ in range(2):
        assert message in problems_of(override)[0]


def test_an_unknown_preset_is_refused_with_those_there_are() -> None:
    presets = "auto, local_cpu, local_cuda, scheduler, serial, slurm"
    assert problems_of("cluster=slrm") == (f"cluster: expected one of {presets}, got 'slrm'",)


def test_a_hydra_program_may_load_the_configuration(tmp_path) -> None:
    from hydra import compose, initialize_config_dir

    (tmp_path / "program.yaml").write_text("size: 3\n")
    _hydra.cache_clear()
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        assert load_config(NEEDED).teacher.model_path == "teacher"
        problems_of("cluster=nowhere")
        assert compose("program").size == 3


def test_threads_may_load_the_configuration_at_the_same_time() -> None:
    presets = ["auto", "serial", "local_cpu", "local_cuda"] * 2
    _hydra.cache_clear()
    with ThreadPoolExecutor(len(presets)) as pool:
        kinds = list(pool.map(lambda preset: load_config([*NEEDED, f"cluster={preset}"]).cluster.kind, presets))
    assert kinds == presets


def test_a_changed_file_of_the_tree_is_read_again(tmp_path, monkeypatch) -> None:
    tree = shutil.copytree(config_dir(), tmp_path / "config")
    monkeypatch.setattr("dask_logits.config.compose.config_dir", lambda: tree)
    assert load_config(NEEDED).partition.rows != 77
    file = tree / "distillation" / "default.yaml"
    file.write_text(re.sub(r"(?m)^(partition:\n  rows:).*$", r"\1 77", file.read_text()))
    assert load_config(NEEDED).partition.rows == 77


@pytest.mark.parametrize("preset", sorted(path.stem for path in (ROOT / "config" / "cluster").glob("*.yaml")))
def test_every_cluster_preset_composes(preset: str) -> None:
    joins = preset in ("scheduler", "slurm")
    extra = ["distillation.cluster.scheduler=tcp://127.0.0.1:8786"] if joins else []
    assert load_config([*NEEDED, f"cluster={preset}", *extra]).cluster.kind == ("scheduler" if joins else preset)


@pytest.mark.parametrize(
    "path",
    ["teacher.generation.top_k", "teacher.generation.batch_size", "teacher.generation.batch_tokens",
     "teacher.generation.head_rows", "teacher.generation.torch_threads", "teacher.generation.num_workers",
     "teacher.generation.gpus_per_worker", "dataset.vocab_size",
     "dataset.max_length", "dataset.max_samples", "dataset.streaming_buffer_size",
     "dataset.streaming_chunk_size", "dataset.num_proc", "partition.rows", "job.max_failures", "job.stall_seconds"],
)  # fmt: skip
def test_counts_below_one_are_refused(path: str) -> None:
    (problem,) = problems_of(f"distillation.{path}=0")
    assert problem.startswith(f"distillation.{path}: expected")
    assert " ≥ 1" in problem
    assert problem.endswith("got 0")


@pytest.mark.parametrize("path", ["job.retries", "cluster.wait_seconds"])
def test_negative_values_are_refused(path: str) -> None:
    assert " ≥ 0, got" in problems_of(f"distillation.{path}=-1")[0]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("distillation.teacher.generation.top_k=many", "expected int ≥ 1, got 'many'"),
        ("distillation.teacher.generation.top_k=true", "expected int ≥ 1, got True"),
        ("distillation.teacher.generation.batch_tokens=manual", "expected 'auto' or int ≥ 1, got 'manual'"),
        ("distillation.teacher.generation.device=tpu", "'auto' or 'cpu' or 'cuda', got 'tpu'"),
        ("distillation.teacher.dtype=int8", "got 'int8'"),
        ("distillation.dataset.streaming=1", "expected bool, got 1"),
        ("distillation.dataset.max_samples=some", "expected int ≥ 1 or 'all' or null, got 'some'"),
        ("distillation.job.stall_seconds=soon", "expected float ≥ 1, got 'soon'"),
        ("distillation.dataset=wikitext", "distillation"),
        ("distillation.teacher.generation.gpus_per_worker=all", "expected int ≥ 1, got 'all'"),
        ("distillation.teacher.generation.devices=[[0],1]", "expected str or null, got [[0], 1]"),
    ],
)
def test_wrong_types_are_refused(override: str, expected: str) -> None:
    assert expected in " ".join(problems_of(override))


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "distillation.dataset.streaming=true",
            "max_samples: expected a number of rows for a stream, got null. The stream",
        ),
        ("distillation.teacher.generation.worker_id=0", "total_workers: expected a number because"),
        ("distillation.teacher.generation.total_workers=2", "worker_id: expected a number because"),
        ("distillation.dataset.window_stride=8", "window_stride: expected null unless long_documents is 'window'"),
        ("distillation.dataset.separator_id=0", "separator_id: expected null with packing=none, got 0"),
        ("cluster=scheduler", "expected an address or a scheduler_file"),
        ("distillation.teacher.cache_dir='~nobody-here/run'", "expected a path, got '~nobody-here/run', whose home"),
        ("distillation.cluster.security.key='~nobody-here/key'", "expected a path, got '~nobody-here/key', whose home"),
        ("distillation.dataset.name=json", "distillation.dataset.data_files: expected files"),
    ],
)
def test_what_does_not_go_together_is_refused(override: str, expected: str) -> None:
    assert expected in " ".join(problems_of(override))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["worker_id=4", "total_workers=4"], "worker_id: expected less than total_workers 4, got 4"),
        (["worker_id=0", "total_workers=2", "force_regenerate=true"], "force_regenerate: expected false with total_wo"),
    ],
)
def test_static_workers_must_be_possible(overrides: list[str], expected: str) -> None:
    problems = problems_of(*(f"distillation.teacher.generation.{override}" for override in overrides))
    assert expected in " ".join(problems)


def test_a_static_worker_joins_no_scheduler() -> None:
    share = ["distillation.teacher.generation.worker_id=0", "distillation.teacher.generation.total_workers=2"]
    assert (
        "expected null with an existing scheduler" in problems_of(*share, "distillation.cluster.scheduler=tcp://a:1")[0]
    )


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["max_length=2048", "long_documents=window", "window_stride=3000"],
            "window_stride: expected at most max_length 2048, got 3000",
        ),
        (["long_documents=window", "packing=concat"], "long_documents: expected 'truncate' with packing=concat"),
    ],
)
def test_ways_of_cutting_must_fit_together(overrides: list[str], expected: str) -> None:
    assert expected in " ".join(problems_of(*(f"distillation.dataset.{override}" for override in overrides)))


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("split=train[:5]+test[:5]", "train[:5]+test[:5]"),
        ("split='train[:10%]'", "train[:10%]"),
        ("data_files=/x/date=2024-01-01/*.parquet", ("/x/date=2024-01-01/*.parquet",)),
        ("data_files=a.jsonl,b.jsonl", ("a.jsonl", "b.jsonl")),
        ("data_files=[/x/d=1/part-[0-9].jsonl,'b c.jsonl']", ("/x/d=1/part-[0-9].jsonl", "b c.jsonl")),
        ("data_files=/x/{a,b}/*.jsonl", ("/x/{a,b}/*.jsonl",)),
        ("data_files=~/d.jsonl", ("~/d.jsonl",)),
        ("data_files=null", None),
        ("config_name=2024", "2024"),
        ("name=/data/it's here/x\\", "/data/it's here/x\\"),
        ("text_column=doc.text", "doc.text"),
        ("max_length=auto", "auto"),
    ],
)
def test_texts_need_no_quotes_beyond_the_shells(override: str, value: object) -> None:
    name = override.partition("=")[0]
    config = load_config([*NEEDED, f"distillation.dataset.{override}"])
    assert getattr(config.dataset, name) == value


@pytest.mark.parametrize(
    "change",
    [
        "teacher.revision=1234567",
        "teacher.tokenizer_path=007",
        "teacher.model_path=a: b",
        "teacher.generation={top_k: 7}",
        "teacher.generation.devices=[0,1]",
        "dataset.revision=1e5",
        "dataset.split=train[:5]",
        "dataset.data_files=a.jsonl,b.jsonl",
        "dataset.max_samples=1000",
        "job.notify_command=[tee,'/tmp/a b']",
        "cluster.dashboard_address=12:30",
        "cluster.dashboard_address=null",
    ],
)
def test_a_run_is_taken_up_with_the_values_that_start_one(change: str) -> None:
    change = f"distillation.{change}"
    assert override(load_config(NEEDED).model_dump(), [change]) == load_config([*NEEDED, change])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("distillation.teacher.generation.devices=0,1", "devices=0,1: expected one value, got several; write a list"),
        ("distillation.job.retries={", "expected SETTING=VALUE"),
        ("cluster=serial", "expected distillation.SETTING=VALUE"),
    ],
)
def test_a_run_is_not_taken_up_with_other_values(change: str, message: str) -> None:
    with pytest.raises(ConfigError, match="in the configuration") as caught:
        override(load_config(NEEDED).model_dump(), [change])
    assert message in caught.value.problems[0]


def test_scheduler_and_scheduler_file_exclude_each_other() -> None:
    both = ["distillation.cluster.scheduler=tcp://a:1", "distillation.cluster.scheduler_file=s.json"]
    assert "got both" in problems_of(*both)[0]


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(["distillation.teacher.generation.top_k=0", "distillation.dataset.max_length=x"])
    paths = [problem.split(":")[0] for problem in caught.value.problems]
    assert paths == [
        "distillation.teacher.generation.top_k",
        "distillation.dataset.max_length",
        "distillation.teacher.model_path",
        "distillation.dataset.name",
    ]


def test_unknown_settings_get_the_nearest_spelling() -> None:
    with pytest.raises(ConfigError) as caught:
        check_overrides(
            [
                "distillation.dataset.nam=x",
                "distillation.teacher.generation.topk=3",
                "nonsense=1",
                "worker_id=0",
                "distillation.teacher.top_k=3",
                "distillation.data.revision=main",
            ]
        )
    assert caught.value.problems[3].endswith("did you mean 'distillation.teacher.generation.worker_id'?")
    assert caught.value.problems[4].endswith("did you mean 'distillation.teacher.generation.top_k'?")
    assert caught.value.problems[5].endswith("did you mean 'distillation.dataset.revision'?")
    assert [problem.partition("did you mean ")[2] for problem in caught.value.problems[:2]] == [
        "'distillation.dataset.name'?",
        "'distillation.teacher.generation.top_k'?",
    ]
    assert caught.value.problems[2] == "nonsense: unknown setting"


def test_a_setting_added_with_plus_is_unknown_too() -> None:
    with pytest.raises(ConfigError, match="unknown setting"):
        load_config([*NEEDED, "+distillation.dataset.colour=red"])


def test_the_old_tree_is_refused_with_the_new_name() -> None:
    with pytest.raises(ConfigError, match=r"use distillation\.teacher\.generation\.top_k=32"):
        load_config(["teacher_logits.top_k=32"])


@pytest.mark.parametrize(("given", "expected"), [("[0,1]", "0,1"), ("'0, 1'", "0,1"), ("2", "2")])
def test_devices_may_be_a_list_or_a_string(given: str, expected: str) -> None:
    assert (
        load_config([*NEEDED, f"distillation.teacher.generation.devices={given}"]).teacher.generation.devices
        == expected
    )


@given(st.sampled_from([s for s in settings() if s.type in ("int ≥ 0", "int ≥ 1")]), st.integers(1, 10**9))
def test_any_positive_count_is_taken(setting, value: int) -> None:
    tree: dict = {"teacher": {"model_path": "t"}, "dataset": {"name": "d"}}
    node = tree
    *groups, leaf = setting.path.split(".")[1:]
    for group in groups:
        node = node.setdefault(group, {})
    node[leaf] = value
    found = Config.from_mapping(tree)
    for part in [*groups, leaf]:
        found = getattr(found, part)
    assert found == value
