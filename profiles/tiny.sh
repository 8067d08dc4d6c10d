# The whole chain on 2 CPU cores, without network.
: "${DEPTH:=4}" "${SOURCE:=pydocs}" "${VOCAB_SIZE:=1024}" "${NPROC_PER_NODE:=1}" "${DEVICE_BATCH_SIZE:=8}" "${TOTAL_BATCH_SIZE:=4096}" "${SHARDS:=1}"
TOK_TRAIN=(--max-chars=2e7)
# In minutes a narrow model that reads three times the text learns more than a wide one, a small vocabulary is sooner
# known letter by letter, and documents repeat their own words: rows of 512 tokens, and keys of the token before
BASE_TRAIN=(--aspect-ratio=32 --head-dim=64 --max-seq-len=512 --num-iterations=500 --x0-shortcut --value-embeds=gated
  --smear --key-offset --matrix-lr=0.04 --embedding-lr=0.4 --unembedding-lr=0.008 --value-embedding-lr=0.4
  --warmdown-ratio=0.5 --eval-every=250 --eval-tokens=65536 --core-metric-every=-1 --sample-every=-1 --save-every=100)
# processors that multiply bf16 natively train twice as fast in it (9,000 against 4,300 tokens/s on two cores)
if [[ $(cat /proc/cpuinfo 2>&1) =~ avx512_bf16|amx_bf16 ]]; then export NANOCHAT_DTYPE=${NANOCHAT_DTYPE:-bfloat16}; fi
BASE_LOSS=(--split-tokens=131072)
BASE_EVAL=(--max-per-task=100)
TASK_DATA= # no task below comes from there
TASKS=SimpleSpelling,SpellingBee,Arithmetic,TextChoice,Identity
# counts are shares: the steps take two thirds of each, then a half. Spelling needs the most, for each token has letters
# of its own. Conversations fit rows of 256, which cost a CPU a tenth less
MID=(--tasks="Arithmetic:11000,SimpleSpelling:15000,SpellingBee:5000,TextChoice:3000,Identity*4" --packing=bestfit
  --loss-on=assistant --max-seq-len=256 --device-batch-size=16 --num-iterations=460 --eval-every=-1
  --eval-tokens=65536 --save-every=100)
SFT=(--tasks="Arithmetic:11000,SimpleSpelling:15000,SpellingBee:6000,TextChoice:3000,Identity*4"
  --num-iterations=340 --init-lr-frac=1 --eval-every=-1 --eval-tokens=65536 --save-every=100)
CHAT_EVAL=(-a "Arithmetic,SimpleSpelling,SpellingBee,TextChoice" -m 110 -b 64)
# all that can be practised, at a small rate: what is left out of it gets worse
RL=(--task="Arithmetic:4000,SimpleSpelling:4000,SpellingBee:2000" --num-iterations=18 --num-samples=8
  --device-batch-size=32 --max-new-tokens=80 --init-lr-frac=0.05 --eval-every=-1 --eval-questions=96 --eval-samples=2
  --save-every=-1)
