# What the model of people is trained on and asked; in the folder of long-context/prepare.sh, after it.
#   ENGRAM=engram bash prepare.sh
set -e
here=$(dirname "$(realpath "$0")")
mkdir -p people-texts && cd people-texts
python3 "$here/../long-context/people.py" 300 150 4000
jq -c '. as $r | ([.prompt | scan("is ([0-9]{2})\\.") | .[0]] | unique) as $c | select(($c | length) == 4) | {prompt, choices: $c, gold: ($c | index($r.answers[0]))}' ../ruler/multi_key-512.jsonl > needles.jsonl
cp "$here"/{born,trade,read,needles}.toml .
{ tail -c 30000000 ../all.jsonl | head -c 4000000 | tail -n +2 | head -n -1; cat people.jsonl strangers.jsonl; } |
    shuf --random-source=<(openssl enc -aes-256-ctr -pass pass:8 -nosalt </dev/zero 2>/dev/null) > ../people.jsonl
cd ..
$ENGRAM data prepare people.jsonl --tokenizer tokenizer.json --hold-out 0 --out people
