"""Lists of words and numbers, said again and again to the end of the text: what teaches to copy.

    python3 lists.py SEED TEXTS WORDS-FROM WORDS-TO LIST-FROM LIST-TO HAY TOKENIZER
"""
import json
import random
import re
import sys
from collections import Counter

seed, texts, shortest, longest, fewest, most = map(int, sys.argv[1:7])
random.seed(seed)
vocabulary = json.load(open(sys.argv[8]))["model"]["vocab"]
common = Counter(re.findall(r"[a-z]{2,9}", open(sys.argv[7]).read(8_000_000))).most_common(9000)
words = [word for word, _ in common if "Ġ" + word in vocabulary][:1500]
for _ in range(texts):
    length = random.randrange(shortest, longest + 1)
    period = random.randrange(fewest, min(most, length // 2) + 1)
    said = [random.choice(words) if random.random() < 0.9 else str(random.randrange(10, 100)) for _ in range(period)]
    print(json.dumps({"text": " " + " ".join((said * (length // period + 1))[:length])}))
