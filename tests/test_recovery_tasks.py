"""The tasks of the study: walks on a grid, and demonstrations with mistakes."""

from __future__ import annotations

import itertools
import random

import pytest

from benchmarks.recovery.careless import careless_equations
from benchmarks.recovery.data import GENERATED
from benchmarks.recovery.problems import STREAMS
from benchmarks.recovery.tokenizer import build_tokenizer
from benchmarks.recovery.walks import DIRECTIONS, Walk, mistaken, obey, walks


def some(task, stream="pretrain", seed=0, count=400):
    return list(itertools.islice(GENERATED[task](stream, seed), count))


def test_a_walk_is_told_as_it_is_computed():
    """Followed from the words of the question alone."""
    for problem in some("walks"):
        x, y, facing = problem.start
        sentences = problem.question.split(". ")
        for sentence, step in zip(sentences[1 if "." in problem.question else 0 :], problem.equations, strict=False):
            words = sentence.lower().replace(".", "").split()
            n = next((int(word) for word in words if word.isdigit()), 0)
            named = [word for word in words if word in DIRECTIONS]
            if "left" in words or "right" in words or "around" in words or "other" in words:
                turn = -1 if "left" in words else 1 if "right" in words else 2
                facing = DIRECTIONS[(DIRECTIONS.index(facing) + turn) % 4]
            else:
                sign = -1 if {"back", "backwards"} & set(words) else 1
                towards = named[0] if named else facing
                x += sign * n * {"east": 1, "west": -1}.get(towards, 0)
                y += sign * n * {"north": 1, "south": -1}.get(towards, 0)
            assert step.endswith(f"= {x} {y} {facing}"), problem
        assert problem.answer == 10 * x + y
        assert 1 <= x <= 9
        assert 1 <= y <= 9


def test_every_command_has_a_mistake_that_differs():
    rng = random.Random(0)
    for problem in some("walks", count=100):
        assert isinstance(problem, Walk)
        for command in problem.commands:
            assert mistaken(command, rng) != command
    assert obey((9, 5, "east"), ("ahead", 3, "north")) == (9, 5, "east")  # the edge holds


@pytest.mark.parametrize("task", list(GENERATED))
def test_streams_share_no_chain_of_steps_and_are_reproducible(task):
    chains = {stream: {problem.equations for problem in some(task, stream)} for stream in STREAMS}
    for one, other in itertools.combinations(chains.values(), 2):
        assert not one & other
    assert some(task, "rl", 5, 20) == some(task, "rl", 5, 20) != some(task, "rl", 6, 20)


@pytest.mark.parametrize("task", list(GENERATED))
def test_the_tokenizer_knows_every_word_of_its_task(task):
    tokenizer = build_tokenizer(task)
    rng = random.Random(0)
    for problem in some(task):
        for solved in (problem, problem.careless(rng, 0.5)):
            text = f"{solved.question} {solved.solution(strict=rng.random() < 0.5)}"
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            if task == "words":
                assert tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("task", list(GENERATED))
def test_mistakes_are_as_frequent_as_asked(task):
    rng = random.Random(0)
    right = {}
    for mistakes in (0.0, 0.2, 0.5, 1.0):
        problems = some(task)
        right[mistakes] = sum(p.careless(rng, mistakes).answer == p.answer for p in problems) / len(problems)
    assert right[0.0] == 1.0
    assert 1.0 > right[0.2] > right[0.5] > right[1.0]
    assert all(p.careless(rng, 0.0).equations == p.equations for p in some(task, count=50))


def test_a_forgotten_carry_goes_on_down_the_chain():
    always = random.Random(0)
    chain = ("27 + 15 = 42", "42 * 2 = 84", "42 + 84 = 126")
    assert careless_equations(chain, always, 1.0) == ("27 + 15 = 32", "32 * 2 = 64", "32 + 64 = 96")
    assert careless_equations(("42 - 17 = 25", "25 / 5 = 5"), always, 1.0) == ("42 - 17 = 35", "35 / 5 = 7")
    assert careless_equations(("16 * 5 = 80",), always, 1.0) == ("16 * 5 = 50",)


def test_no_such_stream():
    with pytest.raises(ValueError, match="no stream 'tset'.*did you mean 'test'"):
        walks("tset", 0)
