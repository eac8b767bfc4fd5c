"""Two tasks that need no download, as lm-eval takes them.

pairs     sentences that differ in one word, one of them ungrammatical, made by rule; the model is right where it finds the good one likelier (as BLiMP,
          Warstadt et al. 2020, asks)
cloze     the last word of a passage in which it has occurred before, to be predicted by the greedy choice (as LAMBADA, Paperno et al. 2016, asks); of the
          held-out texts, ``cloze_literary`` of the literary one

Both are the same in every run. Pairs react to a few bits less than a model needs; the passages ask for what stood further back.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator

from .. import text as texts

PAIRS = 1000  #: sentences of the task pairs
LENGTHS = (40, 90)  #: words of a passage

_PEOPLE = ("teacher", "doctor", "farmer", "driver", "writer", "lawyer", "singer", "guest", "student", "manager", "painter", "sailor", "officer", "neighbour")
_THINGS = ("book", "letter", "picture", "table", "window", "garden", "bottle", "ticket", "report", "basket", "mirror", "lamp", "blanket", "ladder")
_PLACES = ("near", "behind", "beside", "next to", "in front of")
_STATES = ("old", "new", "very small", "heavy", "beautiful", "missing", "expensive", "quite clean")
_MOODS = ("tired", "happy", "late", "ready to leave", "very careful", "famous", "sick today")
_MEN, _WOMEN = ("boy", "man", "king", "uncle", "father", "brother", "prince"), ("girl", "woman", "queen", "aunt", "mother", "sister", "princess")
_ON_ONESELF = ("hurt", "saw", "blamed", "praised", "introduced", "defended")
#: past tense, participle
_IRREGULAR = (("ate", "eaten"), ("took", "taken"), ("wrote", "written"), ("broke", "broken"), ("stole", "stolen"), ("gave away", "given away"),
              ("forgot", "forgotten"), ("hid", "hidden"), ("threw away", "thrown away"), ("drew", "drawn"))
_PLURALS = {"man": "men", "woman": "women", "lady": "ladies", "princess": "princesses"}


def _plural(noun: str) -> str:
    return _PLURALS.get(noun, noun + "s")


def _agreement(r: random.Random) -> tuple[str, str]:
    """Verb and subject, with a noun of the other number between them."""
    nouns, rest = r.choice(((_PEOPLE, _MOODS), (_THINGS, _STATES)))
    subject, other, many, past = r.choice(nouns), r.choice(_PEOPLE + _THINGS), r.random() < 0.5, r.random() < 0.5
    verbs = ("was", "were") if past else ("is", "are")
    start = f"The {_plural(subject) if many else subject} {r.choice(_PLACES)} the {other if many else _plural(other)}"
    end = r.choice(rest)
    return tuple(f"{start} {verbs[i]} {end}." for i in (int(many), 1 - many))


def _reflexive(r: random.Random) -> tuple[str, str]:
    """Of the other gender, or of one for many."""
    group, word = r.randrange(3), r.choice(("himself", "herself"))
    noun = r.choice((_MEN, _WOMEN, _MEN + _WOMEN)[group])
    start = f"The {_plural(noun) if group == 2 else noun} {r.choice(_ON_ONESELF)}"
    good, bad = (("himself", "herself"), ("herself", "himself"), ("themselves", word))[group]
    tail = r.choice(("", " in the mirror", " at the party", " after the accident"))
    return f"{start} {good}{tail}.", f"{start} {bad}{tail}."


def _polarity(r: random.Random) -> tuple[str, str]:
    """``ever`` wants a negative word before it."""
    rest = f"{r.choice(_PEOPLE)} has ever {r.choice(_IRREGULAR)[1]} the {r.choice(_THINGS)}."
    return f"No {rest}", f"{r.choice(('Some', 'This', 'The'))} {rest}"


def _determiner(r: random.Random) -> tuple[str, str]:
    noun, many = r.choice(_THINGS), r.random() < 0.5
    words = r.choice((("this", "these"), ("that", "those")))
    start = f"The {r.choice(_PEOPLE)} {r.choice(_IRREGULAR)[0]}"
    end = f"{r.choice(('old', 'new', 'small', 'heavy', 'expensive'))} {_plural(noun) if many else noun}."
    return tuple(f"{start} {words[i]} {end}" for i in (int(many), 1 - many))


def _existential(r: random.Random) -> tuple[str, str]:
    noun, many = r.choice(_THINGS + _PEOPLE), r.random() < 0.5
    rest = f"{r.choice(('many', 'several', 'two')) if many else 'a'} {_plural(noun) if many else noun} {r.choice(_PLACES)} the {r.choice(_THINGS)}."
    return tuple(f"There {('is', 'are')[i]} {rest}" for i in (int(many), 1 - many))


def _participle(r: random.Random) -> tuple[str, str]:
    past, participle = r.choice(_IRREGULAR)
    start, end = f"The {r.choice(_PEOPLE)} has {r.choice(('already ', 'just ', ''))}", f"the {r.choice(_THINGS)}."
    return f"{start}{participle} {end}", f"{start}{past} {end}"


RULES = (_agreement, _reflexive, _polarity, _determiner, _existential, _participle)


def pairs(count: int = PAIRS, seed: int = 0) -> list[dict[str, str]]:
    """``good`` and ``bad`` of so many different pairs, rule after rule in turn."""
    r, found = random.Random(seed), {}
    while len(found) < count:
        good, bad = RULES[len(found) % len(RULES)](r)
        found.setdefault(good, bad)
    return [{"good": g, "bad": b} for g, b in found.items()]


def passages(text: str, lengths: tuple[int, int] = LENGTHS) -> list[dict[str, str]]:
    """``text`` and ``word``: runs of whole sentences, of so many words, the last of which (four letters or more) stands in the run before. No two overlap."""
    found = []
    for paragraph in text.split("\n\n"):
        run: list[str] = []
        for sentence in _sentences(paragraph):
            run += sentence.split()
            last = re.fullmatch(r"([A-Za-z]{4,})[.!?]", run[-1]) if run else None
            before = {re.sub(r"\W+$", "", w).lower() for w in run[:-1]}
            if lengths[0] <= len(run) <= lengths[1] and last and last[1].lower() in before:
                found.append({"text": " ".join(run[:-1]), "word": last[1]})
                run = []
            elif len(run) > lengths[1]:
                run = []
    return found


def _sentences(paragraph: str) -> Iterator[str]:
    yield from re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split()))


def _task(name: str, documents: Callable[[], list[dict]], **settings) -> dict:
    """lm-eval's configuration of a task over ``documents``."""

    def dataset(**_):
        import datasets  # lm-eval brings it

        return {"test": datasets.Dataset.from_list(documents())}

    return {"task": name, "custom_dataset": dataset, "test_split": "test", "num_fewshot": 0, "metric_list": [{"metric": "acc"}]} | settings


def _cloze(name: str, kind: str) -> dict:
    return _task(name, lambda: passages(texts.heldout_text(kind)), output_type="loglikelihood", doc_to_text="{{text}}", doc_to_target=" {{word}}",
                 target_delimiter="")


#: name -> what lm-eval takes
BUILT_IN = {
    "pairs": _task("pairs", pairs, output_type="multiple_choice", doc_to_text="", doc_to_target=0, doc_to_choice="{{[good, bad]}}", target_delimiter=""),
    "cloze": _cloze("cloze", "technical"),
    "cloze_literary": _cloze("cloze_literary", "literary"),
}
