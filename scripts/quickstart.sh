#!/usr/bin/env bash
# From nothing to a student that learns from cached targets, in about five minutes after the installation: prepares a
# real teacher and a real corpus, scores through Dask as many documents as this machine can in 2.5 minutes into
# output/quickstart, and trains tiny students on them. Run it again: no work is done twice.
#   scripts/quickstart.sh [distillation.OVERRIDE=VALUE …]
set -euo pipefail
cd "$(dirname "$0")/.."
# Container images set it. Without compiled modules each interpreter takes seconds more to start.
unset PYTHONDONTWRITEBYTECODE
extras=quickstart,dashboard
if nvidia-smi >/dev/null 2>&1; then extras=$extras,cuda13; fi
scripts/install.sh "$extras"
teacher=output/models/SmolLM2-135M-Instruct corpus=output/corpus/python-reference.jsonl run=output/quickstart
limit='' choose=yes
for override in "$@"; do
  case $override in
    distillation.teacher.cache_dir=*) run=${override#*=} ;;
    distillation.dataset.max_samples=*) choose='' ;;
  esac
done
.venv/bin/python scripts/prepare_quickstart.py
[ -z "$choose" ] || limit=$(.venv/bin/python scripts/choose_documents.py "$teacher" "$corpus" "$run")
[ "$limit" != all ] || limit=''
.venv/bin/dask-logits generate \
  distillation.teacher.model_path=output/models/SmolLM2-135M-Instruct \
  distillation.teacher.cache_dir=output/quickstart \
  distillation.dataset.name=json \
  distillation.dataset.data_files=output/corpus/python-reference.jsonl \
  distillation.dataset.max_length=1024 \
  ${limit:+distillation.dataset.max_samples=$limit} \
  "$@"
echo
.venv/bin/python scripts/distill.py student=tiny distillation.teacher.cache_dir="$run"
echo
echo "Done. $run/teacher_logits.h5 holds the targets of the teacher $teacher."
if [ -n "$limit" ]; then
  echo "It covers the first $limit documents of $corpus. Continue with all of them:"
  echo "  scripts/quickstart.sh $*${*:+ }distillation.dataset.max_samples=all"
fi
cat <<TEXT
Next:
  source .venv/bin/activate
  dask-logits explore $run     # each document, coloured by the teacher's surprise
  dask-logits verify $run      # every checksum
  python scripts/distill.py distillation.teacher.cache_dir=$run    # a larger student, for longer
$run/report.html shows how the run went. README.md, "Training from it", shows the loop for your own student.
TEXT
