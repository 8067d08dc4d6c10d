# For a node of GPUs and hours. Recipes of training that are not here stand in the scripts.
: "${DEPTH:=20}" "${SOURCE:=fineweb-edu}" "${VOCAB_SIZE:=65536}" "${NPROC_PER_NODE:=$GPUS}" "${SHARDS:=240}"
TOK_TRAIN=(--max-chars=2e9)
# Twice as many slots as tokens, as many as five times of mini's smaller vocabulary: 1.3 billion parameters at d20, where
# the classic (--arch=nanochat) has 0.56
BASE_TRAIN=(--arch=ngram --ngram-slots=2)
BASE_LOSS=(--split-tokens=10485760)
BASE_EVAL=()
TASKS=SmolTalk,MMLU,GSM8K,ARC-Easy,ARC-Challenge,HumanEval,SimpleSpelling,SpellingBee,Identity
MID=()
SFT=(--total-batch-size=65536) # at the batch of pretraining an epoch would be 16 steps
CHAT_EVAL=(-a "ARC-Easy,ARC-Challenge,MMLU,GSM8K,HumanEval,SpellingBee")
RL=(--task=GSM8K)
