#!/usr/bin/env bash
# Install and run what CI runs: lint, types, versions, tests, documentation.
#   scripts/test.sh [--quick | --all] [PYTEST ARGUMENT …]
set -euo pipefail
cd "$(dirname "$0")/.."
extras=dev
if nvidia-smi >/dev/null 2>&1; then extras=dev,cuda13; fi
scripts/install.sh "$extras"
.venv/bin/python scripts/prepare_quickstart.py
scripts/check "$@"
