#!/usr/bin/env bash
# Score a dataset inside one Slurm allocation: a Dask scheduler and the job's driver on the first node, workers on all.
#   sbatch [SBATCH OPTION…] scripts/slurm_teacher_logits.sh OVERRIDE…
#   sbatch --nodes=2 --gpus-per-node=4 --cpus-per-task=32 scripts/slurm_teacher_logits.sh \
#     distillation.dataset.name=Salesforce/wikitext …
# Submit it from the checkout, on a file system that all nodes see. With GPUs there is a worker for each, or for each
# group of a node's GPUs if distillation.teacher.generation.gpus_per_worker is among the overrides; without, so many on
# each node as WORKERS_PER_NODE says (1). Submit it again after a failure or a time limit: only what is missing
# is done. The job's progress and errors: teacher-logits-JOB.log, where you submit. Logs of scheduler and workers:
# output/slurm-JOB/. Exit status: that of `dask-logits generate`; 1 if scheduler or workers are lost.
# It runs .venv/bin/python of the checkout, or PYTHON if that is set where you submit.
# If DASK_LOGITS_WEBHOOK is set where you submit, that address is told when the job is done or has failed.
#SBATCH --job-name=teacher-logits
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:TERM@120
#SBATCH --output=teacher-logits-%j.log
set -uo pipefail

job=${SLURM_JOB_ID:?submit this with sbatch}
# Slurm runs a copy of this file; the checkout is where it was submitted.
root=${SLURM_SUBMIT_DIR:-$PWD}
python=${PYTHON:-$root/.venv/bin/python}
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3
logs=$root/output/slurm-$job
mkdir -p "$logs" || exit 1
# config/cluster/slurm.yaml reads it.
export DASK_LOGITS_SCHEDULER_FILE=$logs/scheduler.json
rm -f "$DASK_LOGITS_SCHEDULER_FILE"

# As on clusters that the job makes itself: partitions wait at the scheduler, a dead worker costs one attempt, a long
# partition does not count as a dead worker.
export DASK_DISTRIBUTED__SCHEDULER__WORKER_SATURATION=1.0
export DASK_DISTRIBUTED__SCHEDULER__WORK_STEALING=False
export DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES=2
export DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL="30 minutes"
# CUDA counts GPUs as Slurm and nvidia-smi do, and not from the fastest one.
export CUDA_DEVICE_ORDER=PCI_BUS_ID
has_gpus=${SLURM_GPUS_ON_NODE:-}${SLURM_JOB_GPUS:-}
# Without GPUs, Slurm may set CUDA_VISIBLE_DEVICES=NoDevFiles, which ends servers of distributed 2026.7.1 that ask NVML.
[ -n "$has_gpus" ] || export DASK_DISTRIBUTED__DIAGNOSTICS__NVML=False

say() { echo "slurm_teacher_logits: $*" >&2; }
alive() { kill -0 "$1" 2>/dev/null; }
end() {  # PID: ask it to end, insist after 30 s
  [ -n "$1" ] && alive "$1" || return 0
  kill "$1"
  for ((i = 0; i < 300; i++)); do alive "$1" || return 0; sleep 0.1; done
  kill -KILL "$1"
}
start_groups() {  # N COMMAND…: on a node, start the command once for each N of its GPUs, and wait for all
  local n=$1 gpus i
  shift
  IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES:-$(seq -s , 0 $((${SLURM_GPUS_ON_NODE:-$(nvidia-smi -L | wc -l)} - 1)))}"
  [ ${#gpus[@]} -ge "$n" ] || { echo "expected $n GPUs or more on $HOSTNAME, got ${#gpus[@]}" >&2; return 1; }
  trap 'kill $(jobs -p) 2>/dev/null' TERM INT
  for ((i = 0; i + n <= ${#gpus[@]}; i += n)); do
    CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${gpus[*]:i:n}") "$@" &
  done
  # A signal ends the first one.
  wait
  wait
}

scheduler='' workers='' driver='' stopping=''
# The workers before the scheduler, without which they would wait for another.
trap 'end "$driver"; end "$workers"; end "$scheduler"; rm -f "$DASK_LOGITS_SCHEDULER_FILE"' EXIT
trap 'stopping=yes; [ -z "$driver" ] || kill "$driver" 2>/dev/null' TERM INT HUP USR1

network=(${DASK_INTERFACE:+--interface "$DASK_INTERFACE"})
"$python" -m dask scheduler --scheduler-file "$DASK_LOGITS_SCHEDULER_FILE" --port 0 \
  --preload dask_logits.job.dashboard --dashboard-address 127.0.0.1:8787 "${network[@]}" >"$logs/scheduler.log" 2>&1 &
scheduler=$!
until [ -s "$DASK_LOGITS_SCHEDULER_FILE" ]; do
  [ -z "$stopping" ] || exit 130
  alive "$scheduler" || { say "the scheduler ended early; see $logs/scheduler.log"; exit 1; }
  sleep 0.2
done

group=1
for override in "$@"; do
  if [[ $override =~ ^[+]*distillation\.teacher\.generation\.gpus_per_worker=([1-9][0-9]*)$ ]]; then
    group=${BASH_REMATCH[1]}
  fi
done
groups=()
worker=(worker --nworkers "${WORKERS_PER_NODE:-1}" --nthreads 2)
if [ -n "$has_gpus" ]; then
  # Not dask cuda worker, which binds a worker to the cores of another GPU (dask-cuda 26.10.0).
  groups=(bash -c "$(declare -f start_groups); start_groups \"\$@\"" start_groups "$group")
  worker=(worker --nworkers 1 --nthreads 3)
fi
# One task for each node, with the cores of all tasks that the allocation has there.
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
  --kill-on-bad-exit=0 --cpu-bind=none \
  ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$((SLURM_CPUS_PER_TASK * ${SLURM_NTASKS_PER_NODE:-1}))"} \
  "${groups[@]}" "$python" -m dask "${worker[@]}" --scheduler-file "$DASK_LOGITS_SCHEDULER_FILE" --memory-limit 0 \
  --death-timeout 300 "${network[@]}" >"$logs/workers.log" 2>&1 &
workers=$!

"$python" -m dask_logits generate cluster=slurm "$@" &
driver=$!
# A signal that came before the driver was there.
[ -z "$stopping" ] || kill "$driver" 2>/dev/null
while alive "$driver"; do
  if ! alive "$workers" && [ -z "$stopping" ]; then
    say "all workers have ended; see $logs/workers.log"
    kill "$driver"
    wait "$driver"
    exit 1
  fi
  sleep 1
done
wait "$driver"
