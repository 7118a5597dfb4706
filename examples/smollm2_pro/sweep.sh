#!/usr/bin/env bash
# A sweep of learning rates. llamapro.yaml and all_weights.yaml use the best ones: those with the lowest mean held-out
# loss of the three domains (C++ to learn, English and Python to keep) after SWEEP_STEPS steps.
# First run run.sh with any STEPS; it makes the model and the data. Each rate takes about three minutes on two cores.
set -euo pipefail
cd "$(dirname "$0")/../.."

SWEEP_STEPS=${SWEEP_STEPS:-20}
HERE=examples/smollm2_pro
OUT=runs/smollm2_pro/sweep-$SWEEP_STEPS-steps
export OMP_NUM_THREADS=1
mkdir -p "$OUT"

sweep() {
  local method=$1
  shift
  for lr in "$@"; do
    local metrics=$OUT/$method-$lr.jsonl
    [ -e "$metrics.done" ] && continue
    rm -f "$metrics" # left by an interrupted start
    torchrun --nproc-per-node 2 -m megatron_llamapro.pretrain --config "$HERE/$method.yaml" \
      --training.train_iters "$SWEEP_STEPS" --training.eval_interval "$SWEEP_STEPS" --training.eval_samples 16 \
      --optimizer.lr "$lr" --checkpoint.save null --logging.metrics_file "$metrics"
    touch "$metrics.done"
  done
}

sweep llamapro 5e-4 1e-3 2e-3 4e-3
sweep all_weights 5e-5 1e-4 2e-4 4e-4
python $HERE/sweep_table.py --metrics_dir "$OUT"
