# Pretraining by size (pretrain.sh): the full recipe with the classic architecture, and what depends on depth.
: "${DEPTH:=20}" "${TOTAL_BATCH_SIZE:=524288}" "${PARALLEL:=auto}"

# Depth:shards:rows, of text for 20 tokens a parameter, and on a GPU of 80 GB. A depth between two rows takes the one above it:
# text enough, and memory that surely suffices. d12 and d16 were added by the rule of the others: 12 % more shards than
# 4.8 characters a token and 250 million characters a shard ask for, and the rows that d20 leaves room for.
for row in 12:80:32 16:150:32 20:240:16 22:300:16 26:500:8 32:800:4 40:1500:1 44:2000:1 48:2500:1 56:3500:1 64:5000:1; do
  IFS=: read -r depth shards ROWS <<<"$row"
  [ "$depth" -lt "$DEPTH" ] || break
done
: "${SHARDS:=$shards}"

GPUS= # nanochat.launch counts them, on every node
source profiles/full.sh
BASE_TRAIN=() # the classic: the rows of the table are what it leaves room for
BASE_LOSS=()
