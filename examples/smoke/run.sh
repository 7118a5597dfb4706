#!/usr/bin/env bash
# Every step with a tiny random LLaMA, in a minute: tokenizer, data, training at TP 2, export, expansion,
# training at TP 2 x PP 2, export, verification. Every printed line that starts with $ is a command that you can type.
set -euo pipefail
cd "$(dirname "$0")/../.."

RUN=$(mktemp -d "${TMPDIR:-/tmp}/llamapro-smoke.XXXXXX")
trap 'rm -rf "$RUN"' EXIT
export OMP_NUM_THREADS=1

say_and_do() {
  local shown="$*"
  echo "\$ ${shown//$RUN/RUN}"
  "$@"
}

say_and_do python examples/smoke/make_inputs.py --output_dir "$RUN"
say_and_do llamapro train-tokenizer --input "$RUN/text.jsonl" --vocab_size 512 --output_dir "$RUN/llama"
say_and_do llamapro preprocess --input "$RUN/text.jsonl" --tokenizer "$RUN/llama" --output_prefix "$RUN/text" --num_workers 2

say_and_do llamapro convert hf-to-megatron --source "$RUN/llama" --target "$RUN/megatron"
say_and_do torchrun --nproc-per-node 2 -m megatron_llamapro.pretrain --config examples/smoke/run.yaml \
  --model.checkpoint "$RUN/megatron" --model.trainable "[everything]" --data.train "[{prefix: $RUN/text}]" \
  --parallel.tensor_model_parallel_size 2 --checkpoint.save "$RUN/first"
say_and_do llamapro convert megatron-to-hf --source "$RUN/first" --target "$RUN/first-hf"

say_and_do llamapro expand --source "$RUN/first-hf" --target "$RUN/expanded" --num_added_blocks 2
say_and_do llamapro convert hf-to-megatron --source "$RUN/expanded" --target "$RUN/expanded-megatron"
say_and_do torchrun --nproc-per-node 4 -m megatron_llamapro.pretrain --config examples/smoke/run.yaml \
  --model.checkpoint "$RUN/expanded-megatron" --data.train "[{prefix: $RUN/text}]" \
  --parallel.tensor_model_parallel_size 2 --parallel.pipeline_model_parallel_size 2 \
  --parallel.sequence_parallel true --checkpoint.save "$RUN/second"
say_and_do llamapro convert megatron-to-hf --source "$RUN/second" --target "$RUN/second-hf"
say_and_do llamapro inspect --checkpoint "$RUN/second-hf"
say_and_do llamapro verify --original "$RUN/first-hf" --expanded "$RUN/second-hf"
echo "smoke: all steps passed"
