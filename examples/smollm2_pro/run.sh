#!/usr/bin/env bash
# LLaMA Pro on a real LLaMA, start to finish. Every printed line that starts with $ is a command that you can type.
# STEPS=20 sets the length. A step whose result exists is skipped; remove runs/smollm2_pro to start over.
set -euo pipefail
cd "$(dirname "$0")/../.."

STEPS=${STEPS:-20}
HERE=examples/smollm2_pro
RUN=runs/smollm2_pro
OUT=$RUN/$STEPS-steps
export TOKENIZERS_PARALLELISM=false OMP_NUM_THREADS=1
mkdir -p "$OUT"

# step RESULT COMMAND...: run the command unless its result exists.
step() {
  local result=$1
  shift
  if [ -e "$result" ]; then
    echo "# $result exists"
  else
    local shown="$*"
    echo "\$ ${shown#tee_to "$result" }"
    "$@"
  fi
}

# tee_to FILE COMMAND...: print the output and keep it in FILE, which appears only if the command succeeds.
tee_to() {
  local file=$1
  shift
  "$@" | tee "$file.tmp"
  mv "$file.tmp" "$file"
}

echo "# 1. A pretrained LLaMA"
step $RUN/smollm2 python $HERE/extract_model.py --target $RUN/smollm2

echo "# 2. Text: English and Python, known to the model, and C++, the new domain"
step $RUN/text/cpp.train.jsonl python $HERE/build_text.py --output_dir $RUN/text
for part in {english,python,cpp}.{train,held_out}; do
  step "$RUN/data/$part.idx" llamapro preprocess --input "$RUN/text/$part.jsonl" \
    --tokenizer $RUN/smollm2 --output_prefix "$RUN/data/$part" --num_workers 2
done

echo "# 3. Convert to Megatron: 30 blocks with 15 identity blocks added; for the control, without them"
step $RUN/megatron-45 llamapro convert hf-to-megatron \
  --source $RUN/smollm2 --target $RUN/megatron-45 --num_added_blocks 15
step $RUN/verify-before.txt tee_to $RUN/verify-before.txt llamapro verify \
  --original $RUN/smollm2 --expanded $RUN/megatron-45 --trained nothing
step $RUN/megatron-30 llamapro convert hf-to-megatron \
  --source $RUN/smollm2 --target $RUN/megatron-30

echo "# 4. Post-pretrain on C++, $STEPS steps: only the added blocks; then, as a control, all weights of the original"
for method in llamapro all_weights; do
  step "$OUT/$method.sweep.json" torchrun --nproc-per-node 2 -m megatron_llamapro.pretrain \
    --config "$HERE/$method.yaml" --training.train_iters "$STEPS" --checkpoint.save "$OUT/$method"
done

echo "# 5. Turn the dial of both: what C++ gains against what English and Python lose"
for method in llamapro all_weights; do
  step "$OUT/$method.sweep.json" torchrun --nproc-per-node 2 -m megatron_llamapro sweep \
    --checkpoint "$OUT/$method" --original $RUN/smollm2 --new cpp=$RUN/data/cpp.held_out \
    --known english=$RUN/data/english.held_out python=$RUN/data/python.held_out \
    --seq_length 256 --num_samples 8 --micro_batch_size 4 --scales 0.5,0.75,1 --output "$OUT/$method.sweep.json"
done

echo "# 6. Export to Hugging Face at the scale that gains most at no loss, and verify that no original weight moved"
SCALE=$(python -c "import json; print(json.load(open('$OUT/llamapro.sweep.json'))['choice']['scale'])")
step "$OUT/llamapro-hf" llamapro convert megatron-to-hf \
  --source "$OUT/llamapro" --target "$OUT/llamapro-hf" --added_block_scale "$SCALE"
step "$OUT/verify.txt" tee_to "$OUT/verify.txt" llamapro verify \
  --original $RUN/smollm2 --expanded "$OUT/llamapro-hf" --undialed "$OUT/llamapro"

echo "# 7. Report"
for model in "smollm2:$RUN/smollm2" "llamapro:$OUT/llamapro-hf"; do
  sample=$OUT/${model%%:*}.sample.json
  step "$sample" python $HERE/generate.py --model "${model#*:}" --output "$sample"
done
echo "\$ python $HERE/report.py --run_dir $RUN --steps $STEPS"
python $HERE/report.py --run_dir $RUN --steps "$STEPS"
