#!/usr/bin/env bash
# Score a dataset with N static workers on this machine and merge: the same as `dask-logits-parallel`, from a checkout.
#   scripts/generate_teacher_logits_parallel.sh [--no-merge] N [DEVICES] [-- OVERRIDE…]
#   scripts/generate_teacher_logits_parallel.sh 4 0,1,2,3 -- distillation.dataset.name=Salesforce/wikitext …
# Logs: CACHE_DIR/logs/worker-I.log. Exit status: 0 done, 1 a worker or the merge failed, 2 wrong usage, 130 stopped.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3
exec "$python" -m dask_logits.parallel "$@"
