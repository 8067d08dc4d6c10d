# The classic recipe, for a node of GPUs and hours. Recipes of training that are not here stand in the scripts.
# shellcheck disable=SC2034 # dev/stages.sh reads these
: "${DEPTH:=20}" "${SOURCE:=fineweb-edu}" "${VOCAB_SIZE:=65536}" "${NPROC_PER_NODE:=$GPUS}" "${SHARDS:=240}"
TOK_TRAIN=(--max-chars=2e9)
BASE_TRAIN=()
BASE_LOSS=(--split-tokens=10485760)
BASE_EVAL=()
TASKS=SmolTalk,MMLU,GSM8K,ARC-Easy,ARC-Challenge,HumanEval,SimpleSpelling,SpellingBee,Identity
MID=()
SFT=(--total-batch-size=65536) # at the batch of pretraining an epoch would be 16 steps
CHAT_EVAL=(-a "ARC-Easy,ARC-Challenge,MMLU,GSM8K,HumanEval,SpellingBee")
RL=(--task=GSM8K)
