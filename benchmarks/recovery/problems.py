"""Word problems of two or three steps, written from templates, with a worked solution.

A problem is a short story about one quantity: somebody has some things, things happen to them, a question asks
how many there are. The solution is known by construction, because the story is told while it is computed.
A quarter of the stories hold a sentence with a number that does not matter.

Streams. Every problem belongs to one of four streams (pretraining, RL, development, test), decided by a hash of
its chain of equations. Two streams therefore share no chain of equations, whatever names, things and phrases
the stories use, and however many problems are drawn.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from benchmarks.recovery.careless import careless_equations
from qnoise.spelling import nearest

STREAMS = {"pretrain": range(0, 5), "rl": range(5, 7), "dev": range(7, 8), "test": range(8, 10)}
"""Stream name -> the tenths of the hash space that belong to it."""

MAX_VALUE = 99  # every intermediate result has one or two digits

HE = ("Tom", "Ben", "Omar", "Leo", "Ivan", "Sam", "Raj", "Paul")
SHE = ("Anna", "Mia", "Lucy", "Nina", "Sara", "Emma", "Yuki", "Rosa")
THINGS = (
    "apples", "pens", "books", "stamps", "coins", "shells", "cards", "marbles",
    "cookies", "balls", "stickers", "eggs", "pears", "buttons", "candles", "toys",
)  # fmt: skip
CONTAINERS = ("bags", "boxes", "baskets", "jars", "trays")

START = (
    "{P} has {n} {things}.",
    "{P} starts with {n} {things}.",
    "There are {n} {things} on the desk of {P}.",
    "In the morning {P} counts {n} {things}.",
)
START_GROUPS = (
    "{P} has {k} {containers} with {n} {things} in each.",
    "{P} fills {k} {containers} and puts {n} {things} into each of them.",
    "There are {k} {containers} of {n} {things} in the room of {P}.",
)
START_PAIR = (
    "{P} has {n} {things} and {Q} has {b}. They give all of them to {P}.",
    "{P} brings {n} {things} and {Q} brings {b}. {P} keeps them all.",
)
GAIN = (
    "{S} buys {b} more.",
    "Then {S} finds {b} {things}.",
    "{Q} gives {b} {things} to {P}.",
    "{S} gets {b} more from {Q}.",
    "{S} wins another {b}.",
    "After that {b} {things} are added.",
)
LOSE = (
    "{S} loses {b}.",
    "{S} gives {b} of them to {Q}.",
    "{S} sells {b} {things}.",
    "Then {b} of them are broken.",
    "{Q} takes {b} away.",
    "{S} leaves {b} at home.",
)
TIMES = (
    "A week later {S} has {k} times as many.",
    "Then the number of {things} grows to {k} times what it was.",
    "{S} works hard and ends up with {k} times as many {things}.",
)
SPLIT = (
    "{S} shares them equally among {k} friends and looks at the part of one friend.",
    "{S} puts them equally into {k} {containers} and keeps only one.",
    "{S} makes {k} equal parts and one part is left with {P}.",
)
MORE = ("{Q} has {b} more than {P}.", "{Q} owns {b} {things} more than {P} does.")
FEWER = ("{Q} has {b} fewer than {P}.", "{Q} owns {b} {things} less than {P} does.")
ASK = (
    "How many {things} does {P} have now?",
    "How many {things} are there in the end?",
    "What is the number of {things} now?",
    "How many are left with {P}?",
)
ASK_OTHER = ("How many {things} does {Q} have?", "What is the number of {things} that {Q} has?")
ASK_BOTH = ("How many {things} do they have together?", "How many {things} is that for both of them?")
ASIDE = (
    "{P} is {d} years old.",
    "It takes {d} minutes.",
    "The room has {d} windows.",
    "{Q} waits for {d} hours.",
)
TEMPLATES = (
    START + START_GROUPS + START_PAIR + GAIN + LOSE + TIMES + SPLIT + MORE + FEWER
    + ASK + ASK_OTHER + ASK_BOTH + ASIDE
)  # fmt: skip

STRICT_ENDING = "#### {answer}"
LOOSE_ENDING = "so the answer is {answer}"


@dataclass(frozen=True)
class Problem:
    """A question, the chain of equations that solves it, and the answer (the last result)."""

    question: str
    equations: tuple[str, ...]
    answer: int

    def solution(self, strict: bool = True) -> str:
        """The worked solution; it ends in `#### N` when strict, else in `so the answer is N`."""
        ending = STRICT_ENDING if strict else LOOSE_ENDING
        return "; ".join(self.equations) + "; " + ending.format(answer=self.answer)

    def careless(self, rng: random.Random, mistakes: float) -> Problem:
        """The problem as somebody solves it who forgets each carry and borrow with probability `mistakes`."""
        equations = careless_equations(self.equations, rng, mistakes)
        return replace(self, equations=equations, answer=int(equations[-1].split()[-1]))

    @property
    def stream(self) -> str:
        digest = hashlib.blake2b("; ".join(self.equations).encode(), digest_size=8).digest()
        tenth = int.from_bytes(digest, "big") % 10
        return next(name for name, tenths in STREAMS.items() if tenth in tenths)


def problems(stream: str, seed: int) -> Iterator[Problem]:
    """Endless problems of one stream, all different, the same for the same seed.

    Raises:
        ValueError: the stream does not exist.
    """
    check_stream(stream)
    return distinct(_write, stream, random.Random(f"{stream} {seed}"))


def check_stream(stream: str) -> None:
    """Raises ValueError if there is no such stream."""
    if stream not in STREAMS:
        near = nearest(stream, STREAMS)
        hint = f"; did you mean {near!r}?" if near else ""
        raise ValueError(f"no stream {stream!r}: there are {', '.join(STREAMS)}{hint}")


def distinct(write: Callable[[random.Random], Problem], stream: str, rng: random.Random) -> Iterator[Problem]:
    """What `write` writes and belongs to the stream, each question once."""
    seen: set[str] = set()
    while True:
        problem = write(rng)
        if problem.stream == stream and problem.question not in seen:
            seen.add(problem.question)
            yield problem


def _write(rng: random.Random) -> Problem:
    """Tell one story and compute along."""
    steps = rng.choice((2, 3))
    names = {"P": rng.choice(HE + SHE), "things": rng.choice(THINGS), "containers": rng.choice(CONTAINERS)}
    names["Q"] = rng.choice([name for name in HE + SHE if name != names["P"]])
    pronoun = "He" if names["P"] in HE else "She"
    sentences: list[str] = []
    equations: list[str] = []

    def tell(templates: tuple[str, ...], **numbers: int) -> None:
        template = rng.choice(templates)
        subject = rng.choice((pronoun, names["P"])) if template.startswith("{S}") else pronoun.lower()
        sentences.append(template.format(S=subject, **names, **numbers))

    def compute(left: int, operator: str, right: int) -> int:
        result = {"+": left + right, "-": left - right, "*": left * right, "/": left // right}[operator]
        equations.append(f"{left} {operator} {right} = {result}")
        return result

    opening = rng.choices(("plain", "groups", "pair"), weights=(6, 2, 2))[0]
    if opening == "plain":
        value = rng.randint(5, 60)
        tell(START, n=value)
    elif opening == "groups":
        n, k = rng.randint(3, 16), rng.randint(2, 5)
        tell(START_GROUPS, n=n, k=k)
        value = compute(n, "*", k)
    else:
        n, b = rng.randint(4, 45), rng.randint(4, 45)
        tell(START_PAIR, n=n, b=b)
        value = compute(n, "+", b)
    if rng.random() < 0.25:
        tell(ASIDE, d=rng.randint(2, 40))

    question: tuple[str, ...] = ASK
    while len(equations) < steps:
        remaining = steps - len(equations)
        move = rng.choices(("gain", "lose", "times", "split", "compare"), weights=(6, 6, 3, 3, 4))[0]
        if move == "gain" and value <= MAX_VALUE - 3:
            b = rng.randint(2, min(45, MAX_VALUE - value))
            tell(GAIN, b=b)
            value = compute(value, "+", b)
        elif move == "lose" and value >= 6:
            b = rng.randint(2, min(45, value - 2))
            tell(LOSE, b=b)
            value = compute(value, "-", b)
        elif move == "times" and value * 2 <= MAX_VALUE:
            k = rng.randint(2, min(5, MAX_VALUE // value))
            tell(TIMES, k=k)
            value = compute(value, "*", k)
        elif move == "split":
            divisors = [k for k in range(2, 6) if value % k == 0 and value // k >= 2]
            if divisors:
                k = rng.choice(divisors)
                tell(SPLIT, k=k)
                value = compute(value, "/", k)
        elif move == "compare" and remaining <= 2:  # a comparison ends the story
            more = rng.random() < 0.5
            b = rng.randint(2, 30)
            other = value + b if more else value - b
            if other < 2 or other > MAX_VALUE or (remaining == 2 and value + other > MAX_VALUE):
                continue
            tell(MORE if more else FEWER, b=b)
            before, value = value, compute(value, "+" if more else "-", b)
            question = ASK_OTHER
            if remaining == 2:
                value = compute(before, "+", value)
                question = ASK_BOTH
    tell(question)
    return Problem(" ".join(sentences), tuple(equations), value)
