# One GPU, about ten minutes with reinforcement learning.
: "${DEPTH:=12}" "${SOURCE:=pydocs}" "${VOCAB_SIZE:=32768}" "${NPROC_PER_NODE:=1}" "${TOTAL_BATCH_SIZE:=65536}" "${SHARDS:=4}"
TOK_TRAIN=(--max-chars=2e8)
BASE_TRAIN=(--arch=ngram --num-iterations=600 --eval-every=300 --eval-tokens=2097152
  --core-metric-every=-1 --sample-every=-1)
BASE_LOSS=(--split-tokens=2097152)
BASE_EVAL=(--max-per-task=300)
TASKS=SimpleSpelling,SpellingBee,Arithmetic,TextChoice,Identity
RL=(--task=Arithmetic)
if [ -n "$TASK_DATA" ]; then
  TASKS=GSM8K,$TASKS
  RL=(--task=GSM8K)
fi
MID=(--tasks="${TASKS/GSM8K/GSM8K*2}" --num-iterations=100 --eval-every=-1 --eval-tokens=1048576 --save-every=-1)
SFT=(--tasks="${TASKS/GSM8K/GSM8K*2}" --num-iterations=60 --eval-every=-1 --eval-tokens=1048576 --save-every=-1)
CHAT_EVAL=(-a "${TASKS%,Identity}" -x 256 -m 200 -b 128)
RL+=(--num-iterations=20 --device-batch-size=64 --max-new-tokens=200 --init-lr-frac=0.1 --eval-every=-1
  --eval-questions=128 --save-every=-1)
