"""Resolve every documented install against the public package index, without installing anything.

Two sets of versions are resolved from metadata: the pinned one of ``constraints.txt``, for each supported Python and
for macOS, and the lowest versions that ``pyproject.toml`` allows, for each documented install. One solution for all
extras together is also a solution for each of them, so the pinned set takes one resolution per Python. The whole check
takes some seconds.

Local package folders and further indexes of this machine are left out, because users do not have them.

    .venv/bin/python scripts/check_versions.py [--constraints FILE]

Exit status: 0 everything resolves, 1 an install does not resolve or the index cannot be reached.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12", "3.13")
# What README.md, CONTRIBUTING.md and the scripts install; "" is the package without extras.
INSTALLS = ("", "cuda13", "dashboard,quickstart", "dev", "docs", "adapters,gcs,http,s3")
EVERYWHERE = "adapters,dashboard,dev,docs,gcs,http,quickstart,s3"
# Settings that would bring packages which the public index does not have.
LOCAL = ("CONSTRAINT", "EXTRA_INDEX_URL", "FIND_LINKS", "INDEX", "INDEX_URL", "OVERRIDE", "TORCH_BACKEND")
UNREACHABLE = ("error sending request", "Failed to fetch", "client error", "dns error", "network was disabled")


@dataclass(frozen=True, kw_only=True)
class Resolution:
    """One set of requirements to resolve."""

    extras: str
    python: str
    platform: str = "x86_64-manylinux_2_28"
    constraints: Path | None = None
    """None: the lowest versions of the direct dependencies."""

    def __str__(self) -> str:
        """Name it in one line.

        >>> str(Resolution(extras="dev", python="3.11"))
        "lowest versions: '.[dev]', Python 3.11, x86_64-manylinux_2_28"
        """
        versions = "lowest versions" if self.constraints is None else f"{self.constraints.name}"
        return f"{versions}: '.{f'[{self.extras}]' if self.extras else ''}', Python {self.python}, {self.platform}"

    def command(self, uv: Path) -> list[str]:
        """Return uv's command, which prints the resolved set."""
        extras = [f"--extra={extra}" for extra in self.extras.split(",") if extra]
        versions = ["--resolution=lowest-direct"] if self.constraints is None else [f"--constraints={self.constraints}"]
        return [
            str(uv), "pip", "compile", "--quiet", "--no-config", "--no-header", "--no-annotate",
            f"--python-version={self.python}", f"--python-platform={self.platform}", *versions, *extras,
            str(ROOT / "pyproject.toml"),
        ]  # fmt: skip


def resolve(uv: Path, resolution: Resolution) -> subprocess.CompletedProcess[str]:
    """Resolve one set with uv."""
    environment = {name: value for name, value in os.environ.items() if name.removeprefix("UV_") not in LOCAL}
    # The first macOS for which PyTorch has wheels.
    environment["MACOSX_DEPLOYMENT_TARGET"] = "14.0"
    return subprocess.run(resolution.command(uv), capture_output=True, text=True, env=environment, check=False)


def main() -> int:
    """Resolve all sets; report those that fail."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--constraints", type=Path, default=ROOT / "constraints.txt")
    pinned = parser.parse_args().constraints
    uv = Path(sys.executable).with_name("uv")
    if not uv.exists():
        print(f"check_versions: {uv} does not exist; install it with: pip install -c constraints.txt '.[dev]'")
        return 1
    resolutions = [
        *(Resolution(extras=f"{EVERYWHERE},cuda13", python=python, constraints=pinned) for python in PYTHONS),
        Resolution(extras=EVERYWHERE, python=PYTHONS[0], platform="aarch64-apple-darwin", constraints=pinned),
        *(Resolution(extras=extras, python=PYTHONS[0]) for extras in INSTALLS),
    ]
    with ThreadPoolExecutor(max_workers=4) as pool:
        results = list(pool.map(lambda resolution: resolve(uv, resolution), resolutions))
    failed = [(each, done) for each, done in zip(resolutions, results, strict=True) if done.returncode]
    for each, done in failed:
        if any(sign in done.stderr for sign in UNREACHABLE):
            print(f"check_versions: the package index cannot be reached, so nothing was checked:\n{done.stderr}")
            return 1
        print(f"check_versions: this does not resolve: {each}\n{done.stderr}")
    if not failed:
        print(f"check_versions: all {len(results)} sets resolve")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
