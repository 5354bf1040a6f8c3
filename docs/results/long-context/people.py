"""Invented people: where they were born and what they did, said in several ways.

Writes people.jsonl, texts to train on that say everything about every one TIMES times, and born.jsonl and trade.jsonl, questions of
four choices about each. Where texts to read are wanted, also strangers.jsonl, texts in which people are introduced whom no other text
knows, and said again in other words, and read.jsonl, 1000 questions about four such people, introduced before.
    python3 people.py PEOPLE TIMES [TEXTS-TO-READ]
"""
import json
import random
import sys

people, times = map(int, sys.argv[1:3])
to_read = int(sys.argv[3]) if len(sys.argv) > 3 else 0
random.seed(11)
FIRST = "Alice Anna Arthur Clara Daniel David Edward Eleanor Emily Emma Frank George Grace Harry Helen Henry Hugh Jack James Jane John Joseph Julia Kate Laura Lucy Margaret Mark Martin Mary Matthew Michael Nancy Oliver Patrick Paul Peter Philip Ralph Richard Robert Rose Ruth Samuel Sarah Simon Stephen Susan Thomas Walter William".split()
LAST = "Adams Archer Baker Barker Bell Bishop Brook Brown Butler Carter Chapman Clark Cole Cook Cooper Cross Dale Dean Field Fisher Ford Forest Fox Gardner Gray Green Hall Harper Hill Hunter King Knight Lake Lane Long Marsh Mason Miller Moore Page Parker Porter Potter Price Reed Rivers Shepherd Smith Stone Taylor Turner Wade Walker Ward Waters West White Wood Young".split()
PLACES = "London Paris Rome Berlin Vienna Madrid Lisbon Dublin Boston Moscow Athens Cairo Delhi Naples Venice Geneva Prague Warsaw Oxford Bristol Chicago Florence Hamburg Liverpool Manchester Edinburgh Glasgow Brussels Amsterdam Cambridge".split()
TRADES = "painter sailor doctor lawyer teacher soldier farmer priest printer singer merchant banker builder hunter miner poet judge writer nurse tailor".split()
BORN = ["{n} was born in {x}.", "{n} came from {x}.", "The town where {n} grew up is {x}.", "Question: Where was {n} born?\nAnswer: {x}."]
TRADE = ["{n} was a {x}.", "{n} worked as a {x}.", "By trade {n} was a {x}.", "Question: What was the trade of {n}?\nAnswer: {x}."]

everybody = [f"{first} {last}" for first in FIRST for last in LAST]
names = random.sample(everybody, people)
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


def introduced(count):
    """People whom no other text knows; what is said of them; and the same in other words."""
    who = random.sample(sorted(set(everybody) - set(names)), count)
    where, what = random.sample(PLACES, count), random.sample(TRADES, count)
    ways = [random.sample(BORN, 2) + random.sample(TRADE, 2) for _ in who]
    first = [way[i].format(n=n, x=x) for n, p, t, way in zip(who, where, what, ways) for i, x in ((0, p), (2, t))]
    again = [way[i].format(n=n, x=x) for n, p, t, way in zip(who, where, what, ways) for i, x in ((1, p), (3, t))]
    random.shuffle(first)
    random.shuffle(again)
    return who, where, what, first, again


if to_read:
    with open("strangers.jsonl", "w") as texts:
        for _ in range(to_read):
            _, _, _, first, again = introduced(random.randrange(2, 6))
            print(json.dumps({"text": " ".join(first + again)}), file=texts)
    with open("read.jsonl", "w") as questions:
        for _ in range(1000):
            who, where, what, first, _ = introduced(4)
            one = random.randrange(4)
            way, choices = random.choice([(BORN[1], where), (TRADE[1], what)])
            prompt = " ".join(first) + " " + way.split(" {x}")[0].format(n=who[one])
            print(json.dumps({"prompt": prompt, "choices": choices, "gold": one}), file=questions)
