"""Texts of many kinds, in pieces that are learned from and pieces held out of the same texts.

    zstdcat train.jsonl.zst | python3 mix.py          writes seen.jsonl and held.jsonl

Novels are three quarters of the corpus; of their pieces 1200 are taken, so that they are a sixth of what is learned.
"""

import json
import random
import sys

PIECE = 8000  # characters
NOVELS = ("english-novels", "eltec-eng")

chance = random.Random(0)
novels, others = [], []
for line in sys.stdin:
    document = json.loads(line)
    text = document["text"]
    pieces = [text[start : start + PIECE] for start in range(0, len(text), PIECE)]
    (novels if document["source"] in NOVELS else others).extend(pieces)

mixed = others + chance.sample(novels, 1200)
chance.shuffle(mixed)
held = round(0.008 * len(mixed))
for name, pieces in (("held", mixed[:held]), ("seen", mixed[held:])):
    with open(f"{name}.jsonl", "w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in pieces)
