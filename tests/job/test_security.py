"""Who may join, what is run or loaded, and what never reaches a file."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import warm
from builders import cache_dir, tree, wait_for

from dask_logits import ClusterError, ConfigError, TeacherError, generate, load_config
from dask_logits.cache.reader import CacheReader
from dask_logits.job.driver import score

DASK = [sys.executable, "-m", "dask"]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory) -> dict[str, Path]:
    """An authority of its own, a certificate that it signed, and a stranger's."""
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    def authority(name: str) -> None:
        openssl(
            "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}",
            "-keyout", f"{name}.key", "-out", f"{name}.pem",
        )  # fmt: skip

    authority("ca")
    authority("stranger")
    openssl("req", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=node", "-keyout", "node.key", "-out", "node.csr")
    openssl(
        "x509", "-req", "-in", "node.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2",
        "-out", "node.pem",
    )  # fmt: skip
    return {path.name: path for path in folder.iterdir()}


def secured(certificates: dict[str, Path], cert: str = "node", ca: str = "ca") -> list[str]:
    return [
        f"distillation.cluster.security.ca_file={certificates[f'{ca}.pem']}",
        f"distillation.cluster.security.cert={certificates[f'{cert}.pem']}",
        f"distillation.cluster.security.key={certificates[f'{cert}.key']}",
    ]


@contextlib.contextmanager
def encrypted_processes(folder: Path, certificates: dict[str, Path]) -> Iterator[Path]:
    """Start a scheduler and a worker that speak TLS only; yield the scheduler file."""
    file = folder / "scheduler.json"
    tls = ["--tls-ca-file", str(certificates["ca.pem"]), "--tls-cert", str(certificates["node.pem"]),
           "--tls-key", str(certificates["node.key"]), "--scheduler-file", str(file), "--no-dashboard"]  # fmt: skip
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    scheduler = warm.Popen([*DASK, "scheduler", *tls, "--protocol", "tls", "--port", "0"], **quiet)
    wait_for(lambda: file.exists() and file.read_text(), scheduler)
    more = ["--nthreads", "1", "--memory-limit", "0", "--local-directory", str(folder)]
    worker = warm.Popen([*DASK, "worker", *tls, *more], **quiet)
    try:
        yield file
    finally:
        for process in (worker, scheduler):
            process.terminate()
            process.wait(20)


def test_a_job_speaks_tls_and_others_are_turned_away(overrides, joined, certificates, tmp_path) -> None:
    expected = generate(load_config([*joined, f"distillation.teacher.cache_dir={tmp_path / 'plain'}"]))
    with encrypted_processes(tmp_path, certificates) as file:
        assert json.loads(file.read_text())["address"].startswith("tls://")
        mine = [*overrides, f"distillation.cluster.scheduler_file={file}"]
        quick = "distillation.cluster.wait_seconds=5"
        for stranger in ([], secured(certificates, "stranger"), secured(certificates, "node", "stranger")):
            with pytest.raises(ClusterError, match=r"expected a scheduler at .*, got .*cluster\.security"):
                generate(load_config([*mine, quick, *stranger]))
            assert not cache_dir(overrides).exists()
        cache = generate(load_config([*mine, *secured(certificates)]))
    found, wanted = (CacheReader(path).attributes["content_digest"] for path in (cache, expected))
    assert found == wanted
    said = tree(cache_dir(overrides))
    assert not [name for name, data in said.items() if b"PRIVATE KEY" in data]


@pytest.mark.slow
def test_a_cluster_that_is_made_speaks_tls(overrides, certificates, monkeypatch) -> None:
    addresses: list[str] = []

    def noted(job, cluster, *rest, **more):
        addresses.extend([cluster.client.scheduler.address, *cluster.client.nthreads()])
        return score(job, cluster, *rest, **more)

    monkeypatch.setattr("dask_logits.job.run.score", noted)
    one = "distillation.teacher.generation.num_workers=1"
    generate(load_config([*overrides, "cluster=local_cpu", one, *secured(certificates)]))
    assert [address.split("127.0.0.1")[0] for address in addresses] == ["tls://", "tls://"]


def test_a_part_of_a_certificate_is_refused(overrides, certificates) -> None:
    ca, cert, _ = secured(certificates)
    with pytest.raises(ConfigError, match=r"cluster\.security\.key: expected a file, got null. Set all three"):
        load_config([*overrides, ca, cert])
    with pytest.raises(ConfigError, match=r"cluster\.security\.key: expected a file, got '/none'"):
        load_config([*overrides, ca, cert, "distillation.cluster.security.key=/none"])


def test_a_pickled_checkpoint_is_refused_unless_allowed(overrides, joined, llama, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "pickled"
    shutil.copytree(llama, folder)
    weights = AutoModelForCausalLM.from_pretrained(llama).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    mine = [*joined, f"distillation.teacher.model_path={folder}"]
    with pytest.raises(TeacherError, match=r"expected weights in safetensors, got pickled ones in .*allow_pickle=true"):
        generate(load_config(mine))
    assert not cache_dir(joined).exists()
    cache = generate(load_config([*mine, "distillation.teacher.allow_pickle=true"]))
    assert CacheReader(cache).n_documents == 40


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("dataset.data_files", "https://me:swordfish@example.org/a.jsonl"),
        ("dataset.data_files", "https://example.org/a.jsonl?x=1&X-Amz-Signature=swordfish"),
        ("dataset.data_files", "https://example.org/a.jsonl?token=swordfish"),
        ("dataset.name", "s3://key:swordfish@bucket/data"),
        ("dataset.data_files", "https://swordfish@example.org/a.jsonl"),
        ("dataset.data_files", "https://example.org/a.jsonl?x=1;sig=swordfish"),
        ("dataset.name", "s3://key:sword/swordfish+x@bucket/data"),
        ("teacher.model_path", "https://me:swordfish@example.org/model"),
        ("cluster.scheduler", "tcp://me:swordfish@host:8786"),
    ],
)
def test_credentials_in_an_address_are_refused_and_not_repeated(overrides, setting, value) -> None:
    with pytest.raises(ConfigError, match=f"distillation.{setting}: expected an address without credentials") as caught:
        load_config([*overrides, f"distillation.{setting}='{value}'"])
    assert "swordfish" not in str(caught.value)


@pytest.mark.parametrize(
    "address",
    [
        "hf://datasets/a/b@main/c.parquet",
        "s3://bucket/a:b@c.parquet",
        "tcp://host:8786/a@b",
        "https://e.org/@me?author=x",
    ],
)
def test_addresses_without_credentials_are_taken(overrides, address) -> None:
    assert load_config([*overrides, f"distillation.dataset.data_files='{address}'"]).dataset.data_files == (address,)


def test_tokens_of_the_environment_reach_no_file_and_no_log(joined) -> None:
    secret = "hf_" + "swordfish" * 4
    command = [sys.executable, "-m", "dask_logits", "generate", *joined, "distillation.job.log_level=debug"]
    done = warm.run(command, env={**os.environ, "HF_TOKEN": secret})
    assert done.returncode == 0, done.stderr
    assert secret not in done.stdout + done.stderr
    assert not [name for name, data in tree(cache_dir(joined)).items() if secret.encode() in data]


def test_code_that_comes_with_a_model_is_said_aloud(joined, caplog) -> None:
    generate(load_config([*joined, "distillation.teacher.trust_remote_code=true"]))
    assert "trust_remote_code: code that comes with" in caplog.text


def test_the_dashboard_and_the_scheduler_are_on_loopback(overrides) -> None:
    default = load_config([given for given in overrides if "dashboard_address" not in given])
    assert default.cluster.dashboard_address.startswith("127.0.0.1")
