#!/usr/bin/env bash
# Score a dataset with N static workers: processes on their own that share one run folder and need no Dask cluster
# between them. One per GPU, in turn; without GPUs they share the cores. Waits for all, reports each, merges at the end.
# Run it again after a failure: only what is missing is done.
#   scripts/generate_teacher_logits_parallel.sh [--no-merge] N [DEVICES] [-- OVERRIDE…]
#   scripts/generate_teacher_logits_parallel.sh 4 0,1,2,3 -- distillation.dataset.name=Salesforce/wikitext …
# Logs: CACHE_DIR/logs/worker-I.log. Exit status: 0 all done, 1 a worker or the merge failed, 2 wrong usage.
set -uo pipefail
usage() { sed -n '5,6s/^# *//p' "$0" >&2; exit 2; }

merge=yes
if [ "${1:-}" = --no-merge ]; then merge=no; shift; fi
workers=${1:-}
[[ "$workers" =~ ^[1-9][0-9]*$ ]] || usage
shift
devices=
if [ $# -gt 0 ] && [ "$1" != -- ]; then devices=$1; shift; fi
if [ $# -gt 0 ]; then [ "$1" = -- ] || usage; shift; fi

root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
[ -x "$python" ] || python=python3
if [ -z "$devices" ] && command -v nvidia-smi >/dev/null; then
  devices=$(nvidia-smi --query-gpu=index --format=csv,noheader 2>/dev/null | paste -sd,) || devices=
fi
IFS=, read -ra device <<<"$devices"

run=output/teacher_logits
threads=$(($(nproc) / workers)); [ "$threads" -ge 1 ] || threads=1
for override in "$@"; do
  case $override in
    distillation.teacher.cache_dir=*) run=${override#*=} ;;
    distillation.teacher.generation.torch_threads=*) threads= ;;
  esac
done
[ ${#device[@]} -eq 0 ] || threads=
run=${run/#\~\//$HOME/}
mkdir -p "$run/logs" || exit 1

pids=()
trap 'kill "${pids[@]}" 2>/dev/null; wait; exit 130' INT TERM
for ((i = 0; i < workers; i++)); do
  if [ ${#device[@]} -gt 0 ]; then export CUDA_VISIBLE_DEVICES=${device[i % ${#device[@]}]}; fi
  "$python" -m dask_logits generate ${threads:+distillation.teacher.generation.torch_threads=$threads} "$@" \
    distillation.teacher.generation.worker_id="$i" distillation.teacher.generation.total_workers="$workers" \
    distillation.cluster.dashboard_address=null >"$run/logs/worker-$i.log" 2>&1 &
  pids+=($!)
  echo "worker $i: process $!${CUDA_VISIBLE_DEVICES:+ on GPU $CUDA_VISIBLE_DEVICES}, log $run/logs/worker-$i.log" >&2
done

failed=0
for ((i = 0; i < workers; i++)); do
  wait "${pids[i]}"
  status=$?
  if [ $status -eq 0 ]; then
    echo "worker $i: done" >&2
  else
    failed=1
    echo "worker $i: failed with exit status $status; the end of its log:" >&2
    tail -n 5 "$run/logs/worker-$i.log" | sed 's/^/  /' >&2
  fi
done
if [ $failed -ne 0 ]; then
  echo "mend the cause and run the same command again: only what is missing is done" >&2
  exit 1
fi
[ $merge = no ] || "$python" -m dask_logits merge --input-dir "$run" --num-workers "$workers" || exit 1
