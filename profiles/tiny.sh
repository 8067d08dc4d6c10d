# The whole chain on 2 CPU cores in a quarter of an hour, without network.
# shellcheck disable=SC2034 # dev/stages.sh reads these
: "${DEPTH:=4}" "${SOURCE:=pydocs}" "${VOCAB_SIZE:=4096}" "${NPROC_PER_NODE:=1}" "${DEVICE_BATCH_SIZE:=16}" "${TOTAL_BATCH_SIZE:=4096}" "${SHARDS:=1}"
TOK_TRAIN=(--max-chars=2e7)
# of a million tokens more is learnt by small batches at high rates, and by what sees the token before (smear)
BASE_TRAIN=(--head-dim=64 --max-seq-len=256 --num-iterations=250 --x0-shortcut --value-embeds=gated --smear
  --matrix-lr=0.08 --embedding-lr=0.8 --unembedding-lr=0.016 --value-embedding-lr=0.8
  --eval-every=125 --eval-tokens=65536 --core-metric-every=-1 --sample-every=-1 --save-every=50)
# processors that multiply bf16 natively train twice as fast in it (9,000 against 4,300 tokens/s on two cores)
if [ -r /proc/cpuinfo ] && [[ $(</proc/cpuinfo) =~ avx512_bf16|amx_bf16 ]]; then
  export NANOCHAT_DTYPE=${NANOCHAT_DTYPE:-bfloat16}
fi
BASE_LOSS=(--split-tokens=131072)
BASE_EVAL=(--max-per-task=100)
TASK_DATA= # no task below comes from there
TASKS=SimpleSpelling,SpellingBee,Arithmetic,TextChoice,Identity
# counts are shares: the steps take about half of each. Spelling needs the most, for each token has letters of its own
MID=(--tasks="Arithmetic:6000,SimpleSpelling:10000,SpellingBee:3000,TextChoice:2000,Identity*2" --packing=bestfit
  --loss-on=assistant --num-iterations=180 --eval-every=-1 --eval-tokens=65536 --save-every=50)
SFT=(--tasks="Arithmetic:5000,SimpleSpelling:10000,SpellingBee:4000,TextChoice:2000,Identity"
  --num-iterations=150 --init-lr-frac=1 --eval-every=-1 --eval-tokens=65536 --save-every=50)
CHAT_EVAL=(-a "Arithmetic,SimpleSpelling,SpellingBee,TextChoice" -m 110 -b 64)
# all that can be practised, at a small rate: what is left out of it gets worse
RL=(--task="Arithmetic:4000,SimpleSpelling:4000,SpellingBee:2000" --num-iterations=18 --num-samples=8
  --device-batch-size=32 --max-new-tokens=80 --init-lr-frac=0.05 --eval-every=-1 --eval-questions=96 --eval-samples=2
  --save-every=-1)
