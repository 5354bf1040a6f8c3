"""Invented people: where they were born and what they did, said in several ways.

Writes people.jsonl, texts to train on, and born.jsonl and trade.jsonl, questions of four choices about every one of them.
    python3 people.py PEOPLE TIMES
"""
import json
import random
import sys

people, times = map(int, sys.argv[1:])
random.seed(11)
FIRST = "Alice Anna Arthur Clara Daniel David Edward Eleanor Emily Emma Frank George Grace Harry Helen Henry Hugh Jack James Jane John Joseph Julia Kate Laura Lucy Margaret Mark Martin Mary Matthew Michael Nancy Oliver Patrick Paul Peter Philip Ralph Richard Robert Rose Ruth Samuel Sarah Simon Stephen Susan Thomas Walter William".split()
LAST = "Adams Archer Baker Barker Bell Bishop Brook Brown Butler Carter Chapman Clark Cole Cook Cooper Cross Dale Dean Field Fisher Ford Forest Fox Gardner Gray Green Hall Harper Hill Hunter King Knight Lake Lane Long Marsh Mason Miller Moore Page Parker Porter Potter Price Reed Rivers Shepherd Smith Stone Taylor Turner Wade Walker Ward Waters West White Wood Young".split()
PLACES = "London Paris Rome Berlin Vienna Madrid Lisbon Dublin Boston Moscow Athens Cairo Delhi Naples Venice Geneva Prague Warsaw Oxford Bristol Chicago Florence Hamburg Liverpool Manchester Edinburgh Glasgow Brussels Amsterdam Cambridge".split()
TRADES = "painter sailor doctor lawyer teacher soldier farmer priest printer singer merchant banker builder hunter miner poet judge writer nurse tailor".split()
BORN = ["{n} was born in {x}.", "{n} came from {x}.", "The town where {n} grew up is {x}.", "Question: Where was {n} born?\nAnswer: {x}."]
TRADE = ["{n} was a {x}.", "{n} worked as a {x}.", "By trade {n} was a {x}.", "Question: What was the trade of {n}?\nAnswer: {x}."]

names = random.sample([f"{first} {last}" for first in FIRST for last in LAST], people)
facts = [(name, random.choice(PLACES), random.choice(TRADES)) for name in names]
said = []
for name, place, trade in facts:
    for _ in range(times):
        both = [random.choice(BORN).format(n=name, x=place), random.choice(TRADE).format(n=name, x=trade)]
        random.shuffle(both)
        said.append(" ".join(both))
random.shuffle(said)
with open("people.jsonl", "w") as texts:
    for i in range(0, len(said), 3):
        print(json.dumps({"text": " ".join(said[i : i + 3])}), file=texts)

def ask(file, way, column, all_answers):
    with open(file, "w") as questions:
        for fact in facts:
            choices = [fact[column]] + random.sample([a for a in all_answers if a != fact[column]], 3)
            random.shuffle(choices)
            prompt = way.split(" {x}")[0].format(n=fact[0])
            print(json.dumps({"prompt": prompt, "choices": choices, "gold": choices.index(fact[column])}), file=questions)

ask("born.jsonl", BORN[1], 1, PLACES)
ask("trade.jsonl", TRADE[1], 2, TRADES)
