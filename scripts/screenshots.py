"""Write the screenshots of the README with Chromium: docs/figures/report.png, explorer.png and page.png.

Report and explorer show a finished run. The page in the Dask dashboard shows a job with the settings of this run and
smaller partitions, on two workers, while it is at work. This job is stopped after the picture. The folder of a run is
shown as the quickstart names it, wherever it is.

Usage: ``python scripts/screenshots.py RUN [CHROMIUM]``
"""

from __future__ import annotations

import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from dask_logits import RunConflictError, read_status, write_report
from dask_logits.config.compose import generate_command
from dask_logits.files.atomic import expanded
from dask_logits.observe.explore import write_explorer
from dask_logits.run.folder import RunFolder

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium"))), "chromium")
# How the pictures name the folder of a run.
SHOWN = "output/quickstart"
# Width and height in pixels.
SIZE = (960, 780)
# Committed partitions in the picture of a job at work.
COMMITTED = 9
SETTINGS = (
    "distillation.partition.rows=4",
    "distillation.cluster.kind=local_cpu",
    "distillation.cluster.dashboard_address=127.0.0.1:0",
    "distillation.teacher.generation.num_workers=2",
    "distillation.teacher.generation.torch_threads=1",
    "distillation.scoring.compile=never",
)


def shoot(page: str, run: Path, image: Path, chromium: str) -> None:
    """Write an image of the beginning of a page of a run."""
    with tempfile.NamedTemporaryFile("w", suffix=".html", encoding="utf-8") as file:
        file.write(page.replace(str(expanded(run)), SHOWN))
        file.flush()
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=1"]
        options += [f"--window-size={SIZE[0]},{SIZE[1]}", f"--screenshot={image}", f"file://{file.name}"]
        subprocess.run([chromium, *options], check=True, capture_output=True, timeout=120)


def shoot_job(run: Path, folder: Path, image: Path, chromium: str) -> None:
    """Write an image of the page of a job at work."""
    manifest = RunFolder(run).manifest()
    if manifest is None:
        raise RunConflictError(f"{run}: expected a run folder with run.json, got none")
    command = generate_command(manifest.how)
    if command is None:
        raise RunConflictError(f"{run}: expected a run of a dataset that its settings name, got one of an object")
    words = shlex.split(command.replace("\\\n", " "))[1:]
    given = [*words, *SETTINGS, f"distillation.teacher.cache_dir={folder / 'quickstart'}"]
    with subprocess.Popen([sys.executable, "-m", "dask_logits", *given]) as job:
        try:
            dashboard = wait(folder / "quickstart", job)
            address = dashboard.replace("/status", "/dask-logits")
            # The first reading may take longer than a request waits.
            with urllib.request.urlopen(address, timeout=60) as answer:
                answer.read()
            with urllib.request.urlopen(address, timeout=60) as answer:
                shoot(answer.read().decode(), folder / "quickstart", image, chromium)
        finally:
            job.send_signal(signal.SIGINT)


def wait(run: Path, job: subprocess.Popen[bytes]) -> str:
    """Return the dashboard of a job that has committed some partitions."""
    while job.poll() is None:
        time.sleep(2)
        if not run.exists() or not RunFolder(run).driver_statuses():
            continue
        status = read_status(run)
        if status.committed >= COMMITTED and status.dashboard:
            return status.dashboard
    raise SystemExit("the job ended before the picture")


def main(run: Path, chromium: str = CHROMIUM) -> None:
    """Write all images."""
    with tempfile.TemporaryDirectory() as folder:
        pages = Path(folder)
        report = write_report(run, pages / "report.html").read_text(encoding="utf-8")
        explorer = write_explorer(run, pages / "explorer.html", [1]).read_text(encoding="utf-8")
        shoot(report, run, FIGURES / "report.png", chromium)
        shoot(explorer, run, FIGURES / "explorer.png", chromium)
        shoot_job(run, pages, FIGURES / "page.png", chromium)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
