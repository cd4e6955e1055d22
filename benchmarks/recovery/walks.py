"""Walks on a grid: the second task. No carrying; a place and a direction have to be kept in mind at once.

Somebody stands on a grid of 9 by 9 fields, faces north, east, south or west, and is told where to turn and to walk. The
solution repeats every command and writes place and direction after it; the answer is the last place, column and row as
one number. As
with the word problems, streams share no chain of solutions.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmarks.recovery.problems import Problem, check_stream, distinct

SIZE = 9
DIRECTIONS = ("north", "east", "south", "west")
_MOVES = {"north": (0, 1), "east": (1, 0), "south": (0, -1), "west": (-1, 0)}

START = (
    "You stand at {x} {y} and face {d}.",
    "The robot is on field {x} {y} and looks {d}.",
    "Start at {x} {y} , facing {d}.",
)
AHEAD = ("Walk {n} ahead.", "Go {n} fields on.", "Take {n} steps forward.")
BACK = ("Go {n} back.", "Take {n} steps backwards.", "Step back by {n} fields.")
LEFT = ("Turn left.", "Turn to the left.")
RIGHT = ("Turn right.", "Turn to the right.")
AROUND = ("Turn around.", "Face the other way.")
SIDE = ("Move {n} to the {d}.", "Jump {n} fields to the {d}.")
ASK = ("Where is that?", "Which field is it now?", "Where do you end?", "On which field does it end?")
TEMPLATES = START + AHEAD + BACK + LEFT + RIGHT + AROUND + SIDE + ASK

_PHRASES = {"ahead": AHEAD, "back": BACK, "left": LEFT, "right": RIGHT, "around": AROUND, "side": SIDE}
_WEIGHTS = {"ahead": 5, "back": 3, "left": 3, "right": 3, "around": 1, "side": 4}

Place = tuple[int, int, str]  # column, row, direction
Command = tuple[str, int, str]  # what, how far, where to


@dataclass(frozen=True)
class Walk(Problem):
    """A problem whose steps are places."""

    start: Place = (1, 1, "north")
    commands: tuple[Command, ...] = ()

    def careless(self, rng: random.Random, mistakes: float) -> Problem:
        """As somebody walks who takes each command for its opposite, or one field short, with that probability."""
        place, steps = self.start, []
        for command in self.commands:
            place = obey(place, mistaken(command, rng) if rng.random() < mistakes else command)
            steps.append(_step(command, place))
        return replace(self, equations=tuple(steps), answer=_answer(place))


def obey(place: Place, command: Command) -> Place:
    """The place after a command; who walks off the grid stays at its edge."""
    x, y, direction = place
    what, n, to = command
    if what in ("left", "right", "around"):
        turn = {"left": -1, "right": 1, "around": 2}[what]
        return x, y, DIRECTIONS[(DIRECTIONS.index(direction) + turn) % 4]
    dx, dy = _MOVES[to if what == "side" else direction]
    n = -n if what == "back" else n
    return min(max(x + n * dx, 1), SIZE), min(max(y + n * dy, 1), SIZE), direction


def mistaken(command: Command, rng: random.Random) -> Command:
    """What is easily done instead."""
    what, n, to = command
    opposite = {"left": "right", "right": "left", "around": "left", "ahead": "back", "back": "ahead"}
    if what == "side":
        return what, n, DIRECTIONS[(DIRECTIONS.index(to) + 2) % 4]
    if what in ("ahead", "back") and n > 1 and rng.random() < 0.5:
        return what, n - 1, to
    return opposite[what], n, to


def walks(stream: str, seed: int) -> Iterator[Problem]:
    """Endless problems of one stream, all different, the same for the same seed. Raises as `problems` does."""
    check_stream(stream)
    return distinct(_write, stream, random.Random(f"walks {stream} {seed}"))


def _write(rng: random.Random) -> Walk:
    start = place = (rng.randint(1, SIZE), rng.randint(1, SIZE), rng.choice(DIRECTIONS))
    sentences = [rng.choice(START).format(x=start[0], y=start[1], d=start[2])]
    commands: list[Command] = []
    steps: list[str] = []
    count = rng.choice((2, 3, 4))
    while len(commands) < count:
        what = rng.choices(list(_WEIGHTS), weights=list(_WEIGHTS.values()))[0]
        n, to = rng.randint(1, 6), rng.choice(DIRECTIONS)
        turned = what in ("left", "right", "around")
        if turned and commands and commands[-1][0] in ("left", "right", "around"):
            continue
        if not turned and not _room(place, (what, n, to)):
            continue
        command = (what, n, to)
        place = obey(place, command)
        commands.append(command)
        steps.append(_step(command, place))
        sentences.append(rng.choice(_PHRASES[what]).format(n=n, d=to))
    question = " ".join([*sentences, rng.choice(ASK)])
    return Walk(question, tuple(steps), _answer(place), start, tuple(commands))


def _room(place: Place, command: Command) -> bool:
    """Whether the command can be obeyed to the end on the grid."""
    there = obey(place, command)
    return abs(there[0] - place[0]) + abs(there[1] - place[1]) == command[1]


def _step(command: Command, place: Place) -> str:
    what, n, to = command
    told = {"ahead": f"ahead {n}", "back": f"back {n}", "side": f"{to} {n}"}.get(what, what)
    return f"{told} = {place[0]} {place[1]} {place[2]}"


def _answer(place: Place) -> int:
    return 10 * place[0] + place[1]
