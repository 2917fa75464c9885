#!/usr/bin/env bash
# Build the documentation site into build/docs, in an installed .venv. A warning is an error.
#   scripts/docs.sh [SPHINX-BUILD OPTION …]
set -euo pipefail
cd "$(dirname "$0")/.."
.venv/bin/python -m sphinx --quiet --fail-on-warning --keep-going -b html docs build/docs "$@"
echo "Built build/docs/index.html"
