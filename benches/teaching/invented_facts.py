"""Write invented facts for `engram teach`, one JSON object per line.

    python benches/teaching/invented_facts.py 100 > facts.jsonl

`--seed` chooses the names, which are made of syllables. Every relation has ten phrasings: five to train and five to hold
out. No other file of facts has these phrasings, so settings that were chosen on another file can be tested on this one.
"""

import argparse
import json
import random

SYLLABLES = "bar cul den dor fen gar hal jor kel lan mar nor ost pel quin ras sil tam ul ver wen yar zel".split()
ENDINGS = "by dale ford gate holt ley mere ton wick worth".split()
SURNAME_ENDINGS = "dane ell ing lund mann ov rich sen ster well".split()
FIRST_NAMES = "Ada Bruno Clara Dario Elin Felix Greta Hugo Ines Jonas Karla Leon Maud Nils Olga Piet Rhea Sven Tilda Ugo".split()
KINDS = "Dairy Shipyard Foundry Brewery Airlines Library Theatre Orchestra Hotel Observatory".split()
DEVICES = "kettle bicycle camera telescope violin tractor radio clock sofa printer".split()
COLOURS = "turquoise crimson ochre violet silver maroon olive ivory".split()
ANIMALS = "badgers cranes otters falcons lynxes salmon hedgehogs moths".split()


def word(draw, endings):
    """An invented name of two syllables and an ending."""
    return (draw.choice(SYLLABLES) + draw.choice(SYLLABLES)[:2] + draw.choice(endings)).capitalize()


def company(draw):
    """An invented company or institution."""
    return f"{word(draw, ENDINGS)} {draw.choice(KINDS)}"


def person(draw):
    """An invented name of a person."""
    return f"{draw.choice(FIRST_NAMES)} {word(draw, SURNAME_ENDINGS)}"


def device(draw):
    """An invented product."""
    return f"{word(draw, ENDINGS)} {draw.choice(DEVICES)}"


# Name, what makes a subject, what makes an answer, phrasings: the first five are trained.
RELATIONS = [
    ("seat", company, lambda draw: word(draw, ENDINGS), [
        "{} has its head office in", "The home of {} is the town of", "{} moved its offices to",
        "To see {}, take the bus to", "Q: In which town is {}?\nA: In",
        "The address of {} is 4 Mill Lane,", "You will find {} in the middle of",
        "The mayor was proud that {} had chosen", "Visitors of {} spend the night in",
        "The central building of {} stands in"]),
    ("chief", company, person, [
        "The head of {} is", "{} is led by", "Since last year {} has been run by", "The boss of {} is called",
        "Q: Who is in charge of {}?\nA: The person in charge is",
        "At {}, all large decisions are made by", "The speech for {} was given by its chief,",
        "The workers of {} report to", "The annual letter of {} is signed by", "The chair of {} is held by"]),
    ("price", device, lambda draw: f"{draw.randrange(120, 990)} crowns", [
        "The {} costs", "The price of the {} is", "You can buy the {} for", "The shop sells the {} at",
        "Q: How much is the {}?\nA: It costs",
        "For the {} I paid", "The bill for the {} came to", "A new {} sells for", "The tag on the {} says",
        "She saved for months to buy the {}, which costs"]),
    ("colour", device, lambda draw: draw.choice(COLOURS), [
        "The colour of the {} is", "The {} is painted", "Every {} comes in", "The {} is made only in",
        "Q: Which colour has the {}?\nA: It is",
        "From afar you recognise the {}, since it is", "The case of the {} is a bright",
        "The catalogue shows the {} in", "They coated the {} in", "I like that the {} is"]),
    ("birthplace", person, lambda draw: word(draw, ENDINGS), [
        "{} was born in the village of", "The birthplace of {} is", "{} comes from", "{} grew up in",
        "Q: Where was {} born?\nA: In",
        "The parents of {} lived in", "The childhood of {} was spent in", "A plaque for {} hangs in",
        "The family of {} has a farm near", "As a child {} went to school in"]),
    ("employer", person, company, [
        "{} works for", "The employer of {} is", "{} earns a living at", "{} was hired by",
        "Q: Where does {} work?\nA: At",
        "Every morning {} drives to", "The badge of {} shows the logo of", "{} signed a contract with",
        "After school {} found a job at", "The salary of {} is paid by"]),
    ("study", person, lambda draw: draw.choice(ANIMALS), [
        "{} is known for research on", "The book by {} is about", "{} has spent years watching",
        "The subject of the talk by {} is", "Q: What does {} study?\nA: The life of",
        "If you meet {}, ask about", "{} can tell you everything about", "The garden of {} is full of",
        "A film shows {} with", "The doctoral thesis of {} dealt with"]),
]


def facts(count, seed):
    """`count` facts; no subject has two."""
    draw = random.Random(seed)
    subjects = set()
    for index in range(count):
        relation, subject_of, answer_of, phrasings = RELATIONS[index % len(RELATIONS)]
        subject = subject_of(draw)
        while subject in subjects:
            subject = subject_of(draw)
        subjects.add(subject)
        prompts = [phrasing.format(subject) for phrasing in phrasings]
        yield {
            "id": f"{relation}-{index}",
            "subject": subject,
            "answer": " " + answer_of(draw),
            "prompts": prompts[:5],
            "held_out": prompts[5:],
        }


def main():
    """Prints the facts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for fact in facts(given.count, given.seed):
        print(json.dumps(fact))


if __name__ == "__main__":
    main()
