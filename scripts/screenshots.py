"""Write the screenshots of the README from a finished run, with Chromium: docs/figures/report.png and explorer.png.

Usage: ``python scripts/screenshots.py RUN [CHROMIUM]``
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from dask_logits import write_report
from dask_logits.observe.explore import write_explorer

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
# Width and height in pixels.
SIZE = (960, 720)


def shoot(page: Path, image: Path, chromium: str) -> None:
    """Write an image of the beginning of a page."""
    size = f"--window-size={SIZE[0]},{SIZE[1]}"
    options = ["--no-sandbox", "--hide-scrollbars", "--force-device-scale-factor=1", size, f"--screenshot={image}"]
    subprocess.run([chromium, *options, page.as_uri()], check=True, capture_output=True, timeout=120)


def main(run: Path, chromium: str = "chromium") -> None:
    """Write both images."""
    with tempfile.TemporaryDirectory() as folder:
        pages = Path(folder)
        shoot(write_report(run, pages / "report.html"), FIGURES / "report.png", chromium)
        shoot(write_explorer(run, pages / "explorer.html", [1]), FIGURES / "explorer.png", chromium)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
