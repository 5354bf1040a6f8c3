# Everything that the comparison is trained on and asked, from the corpus and its tokenizer; in an empty folder.
#   TRAIN=train.jsonl.zst VALID=valid.jsonl.zst TOKENIZER=tokenizer.json ENGRAM=engram bash prepare.sh
set -e
here=$(dirname "$(realpath "$0")")
random() { openssl enc -aes-256-ctr -pass pass:"$1" -nosalt </dev/zero 2>/dev/null; }
mixed() { shuf --random-source=<(random "$1"); }
sentences() { tr '\n' ' ' | sed 's/\([a-z][.!?]\) /\1\n/g' | awk 'length > 20 && length < 160'; }
lists() { python3 "$here/lists.py" "$@" hay.txt tokenizer.json; }
recall() { python3 "$here/recall.py" "$@" hay.txt; }
needles() { $ENGRAM eval ruler count --hay hay.txt --digits 2 --out "needles/$1" --lengths "$2" --kinds "$3" --samples "$4" --seed "$5"; }
said() { cat "$@" | jq -c '{text: (.prompt + " " + (.answers | join(", ")) + ".")}'; }
shards() { $ENGRAM data prepare "$1.jsonl" --tokenizer tokenizer.json --hold-out "$2" --out "$1"; }

cp "$TOKENIZER" tokenizer.json
zstdcat "$TRAIN" | jq -c '{text}' | mixed 1 > all.jsonl
zstdcat "$VALID" | jq -c '{text}' > held-out.jsonl
tail -c 60000000 all.jsonl | tail -n +2 | jq -r .text | sentences > hay.txt
jq -r .text held-out.jsonl | sentences > hay-held-out.txt
shards held-out 0

# 1. Nothing but lists said again and again, of 64 tokens
lists 1 80000 56 72 4 24 > copy.jsonl
shards copy 0.01

# 2. English, needles, facts said twice, people, and longer lists, of 512 tokens. `count` is a model that counts tokens.
python3 "$here/people.py" 600 30
sed 's/^steps = .*/steps = 1/; s/warmup = [0-9]*/warmup = 0/; s/"long\/train"/"copy\/train"/' "$here/memory-long.toml" > count.toml
$ENGRAM train count.toml --out count
all=single,multi_key,multi_value,multi_query
needles a 160 single 2600 11
needles b 288 single 1000 12
needles c 384 multi_key 900 13
needles d 480 multi_value,multi_query 300 14
needles e 510 $all 200 15
{
    head -c 10500000 all.jsonl | head -n -1
    said needles/[a-e]/*.jsonl
    recall 5 4000 2,3,4,6,8,10
    lists 3 4000 60 400 8 120
    cat people.jsonl
} | mixed 2 > mix.jsonl
shards mix 0

# 3. English, needles and facts said twice, of 4096 tokens
needles f 512,1024 $all 100 21
needles g 2048,4096 $all 60 22
{
    tail -c 40000000 all.jsonl | head -c 5000000 | tail -n +2 | head -n -1
    said needles/[fg]/*.jsonl
    recall 6 800 20,40,60
} | mixed 3 > long.jsonl
shards long 0

# What is asked
cp "$here/long-texts.toml" .
jq -c 'select((.text | length) > 20000) | .text | [range(0; length - 13500; 13500) as $i | .[$i : $i + 13500]] | .[] | {text: .}' held-out.jsonl > long-texts.jsonl
$ENGRAM eval ruler count --hay hay-held-out.txt --digits 2 --out ruler --lengths 512,1024,2048,4096 --kinds $all --samples 100 --seed 99
$ENGRAM eval ruler count --hay hay-held-out.txt --digits 2 --out ruler --lengths 1024,2048,4096 --kinds variable_tracking,common_words,frequent_words --samples 50 --seed 99
