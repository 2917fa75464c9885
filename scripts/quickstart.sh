#!/usr/bin/env bash
# From nothing to a student that learns from cached targets: installs, prepares a real teacher and a real corpus, scores
# the corpus through Dask into output/quickstart, and trains a tiny student on it. Run it again: no work is done twice.
#   scripts/quickstart.sh [distillation.OVERRIDE=VALUE …]
set -euo pipefail
cd "$(dirname "$0")/.."
extras=quickstart,dashboard
if nvidia-smi >/dev/null 2>&1; then extras=$extras,cuda13; fi
scripts/install.sh "$extras"
.venv/bin/python scripts/prepare_quickstart.py
.venv/bin/dask-logits generate \
  distillation.teacher.model_path=output/models/SmolLM2-135M-Instruct \
  distillation.teacher.cache_dir=output/quickstart \
  distillation.dataset.name=json \
  distillation.dataset.data_files=output/corpus/python-reference.jsonl \
  distillation.dataset.max_length=1024 \
  "$@"
echo
.venv/bin/python scripts/train_tiny_student.py output/quickstart
