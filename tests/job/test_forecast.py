"""What `plan` says of rows, speed and time."""

from __future__ import annotations

import json
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders import cache_dir, save_tokenizer, sentences, tiny_model, write_json_lines
from fault_points import NUMERICS

from dask_logits import ConfigError, generate, load_config, verify
from dask_logits.cache.reader import CacheReader
from dask_logits.cli import main
from dask_logits.files.atomic import replace_json
from dask_logits.job.capacity import plan_figures, plan_lines
from dask_logits.job.forecast import Forecast, forecast, forecast_lines, matrix_flops
from dask_logits.job.measured_plan import measure_plan, measured_lines
from dask_logits.job.prepare import prepare
from dask_logits.ops.show import card as show
from dask_logits.run.folder import RunFolder


@pytest.fixture
def stream(overrides, tmp_path) -> list[str]:
    """Overrides of a job over three Parquet files of 30 rows."""
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(3):
        pq.write_table(pa.table({"text": sentences(30, seed=i)}), folder / f"{i}.parquet", row_group_size=12)
    mine = [override for override in overrides if ".dataset.name" not in override and "data_files" not in override]
    return [*mine, "distillation.dataset.name=parquet", f"distillation.dataset.data_files={folder}/*.parquet",
            "distillation.dataset.streaming=true", "cluster=local_cpu"]  # fmt: skip


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_rate_of_matrix_products_is_measured_in_a_moment(dtype) -> None:
    started = time.process_time()
    assert matrix_flops(dtype, "cpu", 1) > 0
    assert time.process_time() - started < 30


@pytest.mark.parametrize(
    ("samples", "text"), [("all", "90, by the footers"), ("50", "50"), ("500", "90, by the footers")]
)
def test_a_parquet_stream_is_planned_by_its_footers(stream, samples, text) -> None:
    config = load_config([*stream, f"distillation.dataset.max_samples={samples}"])
    steps: list[str] = []
    job = prepare(config, on_step=steps.append, count_seconds=60)
    lines = plan_lines(job)
    assert f"rows          {text}" in lines
    assert job.estimate.tokens is not None
    assert "counting rows in the footers of the Parquet files" in steps


@pytest.mark.parametrize(
    ("settings", "note"),
    [
        (["cache.profile=plain"], "MiB"),
        (["cache.profile=compact"], "MiB at most, because compact usually takes less than half of it"),
        (
            ["cache.profile=compact", "teacher.generation.targets=sample"],
            "MiB at most, because compact usually takes less than a third of it",
        ),
    ],
)
def test_a_plan_says_what_its_size_is_worth(settings, note, overrides) -> None:
    mine = [override for override in overrides if "top_k" not in override]
    job = prepare(load_config([*mine, *(f"distillation.{setting}" for setting in settings)]))
    (line,) = [line for line in plan_lines(job) if line.startswith("cache")]
    assert line.endswith(note)
    assert plan_figures(job)["profile"] == ("compact" if job.is_compact else "plain")


def test_rows_of_files_that_were_not_reached_in_time_are_estimated(stream) -> None:
    config = load_config([*stream, "distillation.dataset.max_samples=all"])
    job = prepare(config, count_seconds=1e-9)
    assert "rows          90, estimated from 1 of 3 files" in plan_lines(job)


def test_the_speed_is_estimated_before_the_calibration_and_measured_after_it(overrides) -> None:
    config = load_config([*overrides, "cluster=local_cpu"])
    before = forecast(prepare(config))
    assert before is not None
    assert not before.is_measured
    joined = [*overrides, "distillation.cluster.scheduler=tcp://127.0.0.1:1"]
    assert forecast(prepare(load_config(joined))) is None
    run = RunFolder(cache_dir(overrides))
    run.path.mkdir()
    replace_json(run.calibration_path, {"numerics": NUMERICS, "tokens_per_second": 50.0})
    job = prepare(config)
    after = forecast(job)
    assert after == Forecast(tokens_per_second=50.0, is_measured=True)
    first, second = forecast_lines(job, forecast(job))
    assert first.startswith("speed         50 tokens/s for ")
    assert first.endswith(", measured by the calibration")
    assert second.startswith("time          about ")


@pytest.fixture
def measured(overrides, tmp_path) -> list[str]:
    """Overrides of a job of 4,000 rows, of which nothing is scored."""
    file = write_json_lines(tmp_path / "many.jsonl", sentences(400) * 10)
    return [*overrides, "cluster=local_cpu", "distillation.teacher.generation.num_workers=1",
            f"distillation.dataset.data_files={file}", "distillation.cache.profile=compact"]  # fmt: skip


def test_a_plan_can_be_measured(measured, tmp_path, capsys) -> None:
    wide = tmp_path / "wide"
    tiny_model("llama", vocab_size=304).save_pretrained(wide)
    save_tokenizer(wide, 300)
    main(["plan", "--measure", "--json", *measured, f"distillation.teacher.model_path={wide}"])
    found = json.loads(capsys.readouterr().out)
    assert not (tmp_path / "run").exists()
    assert found["rows"] == 4000
    least, most = found["seconds"]
    assert least < found["tokens"] / found["tokens_per_second"] < most
    ks = [one["top_k"] for one in found["by_k"]]
    assert ks == [8, 16, 32, 64, 128, 256]
    for name, sign in (("kept_mass", 1), ("bytes_per_token", 1), ("lost_nats", -1)):
        values = [sign * one[name] for one in found["by_k"]]
        assert values == sorted(values), name
        assert len(set(values)) == len(values), name
    assert 0 < found["by_k"][-1]["kept_mass"] < 1
    assert found["peak_bytes"] > 0
    of_k, of_all = found["by_k"][0], found["by_share"][-1]
    assert of_all["share"] == 1
    assert all(of_all[name] == of_k[name] for name in ("kept_mass", "lost_nats", "bytes_per_token"))


def test_what_k_keeps_and_costs_is_what_a_run_has(measured) -> None:
    config = load_config(
        [*measured, "distillation.teacher.generation.top_k=16", "distillation.dataset.max_samples=400"]
    )
    found = measure_plan(prepare(config))
    (of_k,) = [one for one in found.by_k if one.size == 16]
    cache = generate(config)
    card = show(cache)
    # The sample is the first documents, and the file has an id table and documents beside the tokens.
    assert of_k.kept == pytest.approx(card["kept_mass"], abs=0.02)
    assert of_k.lost_nats == pytest.approx(
        verify(cache.parent, recompute=20).recomputed["nats_lost_by_keeping_k"], rel=0.3
    )
    reader = CacheReader(cache)
    gaps = int(reader.arrays["chunks/topk_gaps_b0/size"].sum()) / reader.n_tokens
    # Entries that fill the last chunk take no place among the figures of a token.
    plain = (
        sum(array.nbytes for name, array in reader.arrays.items() if name in reader.profile.arrays) / reader.n_entries
    )
    assert of_k.bytes_per_token == pytest.approx(gaps + plain, rel=0.05)


def test_a_plan_for_other_machines_is_not_measured_here(overrides) -> None:
    job = prepare(load_config([*overrides, "distillation.cluster.scheduler=tcp://127.0.0.1:1"]))
    with pytest.raises(ConfigError, match="plan --measure: expected a job on this machine, got one on a scheduler"):
        measure_plan(job)


def test_a_measured_plan_marks_the_chosen_k(measured) -> None:
    job = prepare(load_config(measured))
    lines = measured_lines(job, measure_plan(job))
    assert [line for line in lines if line.endswith("← top_k")] == [line for line in lines if line.split()[:1] == ["8"]]
    assert any(line.startswith("time ") and " to " in line for line in lines)
