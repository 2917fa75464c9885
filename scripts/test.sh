#!/usr/bin/env bash
# Install and pass all tests: lint, types, tests, documentation. --all adds the long tier.
set -euo pipefail
cd "$(dirname "$0")/.."
cuda=cuda12
if nvidia-smi >/dev/null 2>&1; then cuda=cuda13; fi
scripts/install.sh "dev,$cuda"
.venv/bin/python scripts/prepare_quickstart.py
scripts/check "$@"
