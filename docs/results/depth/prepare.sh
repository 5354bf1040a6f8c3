# What the pair is trained on, from the corpus and its tokenizer; in an empty folder. `count`, which counts the needles' tokens, was a
# checkpoint of the quick start's memory model, with its tokenizer, trained for one step at `context = 8192`.
#   TRAIN=train.jsonl.zst VALID=valid.jsonl.zst TOKENIZER=tokenizer.json COUNT=count ENGRAM=engram bash prepare.sh
set -e
here=$(dirname "$(realpath "$0")")
random() { openssl enc -aes-256-ctr -pass pass:"$1" -nosalt </dev/zero 2>/dev/null; }
mixed() { shuf --random-source=<(random "$1"); }
sentences() { tr '\n' ' ' | sed 's/\([a-z][.!?]\) /\1\n/g' | awk 'length > 20 && length < 160'; }
recall() { python3 "$here/../long-context/recall.py" "$@" hay.txt; }
needles() { $ENGRAM eval ruler "$COUNT" --hay hay.txt --digits 2 --out "needles/$1" --lengths "$2" --kinds "$3" --samples "$4" --seed "$5"; }
said() { cat "$@" | jq -c '{text: (.prompt + " " + (.answers | join(", ")) + ".")}'; }
shards() { $ENGRAM data prepare "$1.jsonl" --tokenizer tokenizer.json --hold-out 0 --out "$1"; }

cp "$TOKENIZER" tokenizer.json
zstdcat "$TRAIN" | jq -c '{text}' | mixed 1 > all.jsonl
zstdcat "$VALID" | jq -c '{text}' > held-out.jsonl
tail -c 60000000 all.jsonl | tail -n +2 | jq -r .text | sentences > hay.txt
head -c 34000000 all.jsonl | head -n -1 > text.jsonl
needles a 160 single 5000 11
needles b 288 single 2000 12
needles c 470 multi_value,multi_query 700 13
needles d 510 single,multi_key,multi_value,multi_query 500 14
needles e 512,1024 single,multi_key,multi_value,multi_query 120 21
needles f 2048,4000 single,multi_key,multi_value,multi_query 70 22
said needles/[abcd]/*.jsonl > needles.jsonl
recall 5 20000 2,3,4,6,8,10 > recall.jsonl
cat text.jsonl needles.jsonl recall.jsonl | mixed 2 > mix.jsonl
recall 6 1500 20,40,60 > recall-long.jsonl
tail -c 40000000 all.jsonl | head -c 5000000 | tail -n +2 | head -n -1 > text-long.jsonl
said needles/[ef]/*.jsonl | cat - text-long.jsonl recall-long.jsonl | mixed 3 > long.jsonl
for split in mix long held-out; do shards $split; done
