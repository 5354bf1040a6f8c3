"""Texts in which every fact is said twice, among sentences of the hay, the second time in another order.

    python3 recall.py SEED TEXTS FACTS,FACTS,... HAY
"""
import json
import random
import sys

seed, texts = map(int, sys.argv[1:3])
counts = [int(n) for n in sys.argv[3].split(",")]
random.seed(seed)
ADJECTIVES = "amber ancient bitter brave bright calm clever cold crimson curious eager early faint fierce gentle golden hollow honest idle jolly keen lively lonely mellow misty modest noble odd pale plain proud quick quiet rapid rare rough round royal rusty silent silver simple slow solid steady stormy swift tall tidy vivid warm wild wise young".split()
NOUNS = "anchor apple arrow basket beacon bell blanket bottle bridge bucket button candle canvas castle cellar chapel cloud copper dagger desert donkey feather ferry forest fountain garden hammer harbor island jacket kettle ladder lantern lemon marble meadow mirror mountain needle orchard paper parrot pebble pillow pocket ribbon river saddle shadow shelter shovel spoon teapot tunnel valley violin wagon window".split()
hay = [line.strip() for line in open(sys.argv[4])]
for _ in range(texts):
    count = random.choice(counts)
    names = random.sample([f"{adjective}-{noun}" for adjective in ADJECTIVES for noun in NOUNS], count)
    facts = [f"The secret number of {name} is {random.randrange(10, 100)}." for name in names]
    again = facts[:]
    random.shuffle(again)
    start = random.randrange(len(hay) - 4 * count)
    for sentence in hay[start : start + random.choice([0, 0, count // 2, count, 2 * count])]:
        facts.insert(random.randrange(len(facts) + 1), sentence)
    print(json.dumps({"text": " ".join(facts + again)}))
