"""Careless arithmetic: the worked solution of a word problem as somebody writes it who often forgets to carry.

Policies that learn from such solutions hold the right rule and the wrong one side by side. Reinforcement learning then
has something to select, and accuracy can rise beyond the format of the answer.
"""

from __future__ import annotations

import random


def careless_equations(equations: tuple[str, ...], rng: random.Random, mistakes: float) -> tuple[str, ...]:
    """The chain of equations with each carry and borrow forgotten with probability `mistakes`; errors go on down it."""
    written: list[str] = []
    before: list[tuple[int, int]] = []  # (right, as written) of each result so far, and of the first number
    for equation in equations:
        left, operator, right, _, result = equation.split()
        a, b = int(left), int(right)
        if not before:
            before.append((a, a))
        elif a == before[-1][0]:
            a = before[-1][1]
        else:  # "together": the number before the last one, and the last one
            a, b = before[-2][1], before[-1][1]
        c = _compute(a, operator, b, rng, mistakes)
        before.append((int(result), c))
        written.append(f"{a} {operator} {b} = {c}")
    return tuple(written)


def _compute(a: int, operator: str, b: int, rng: random.Random, mistakes: float) -> int:
    if operator == "+":
        return _add(a, b, rng, mistakes)
    if operator == "-":
        return _subtract(a, b, rng, mistakes)
    if operator == "*":
        total = 0
        carry = 0
        for place, digit in enumerate(reversed(str(a))):
            product = int(digit) * b + carry
            carry = 0 if product >= 10 and rng.random() < mistakes else product // 10
            total += product % 10 * 10**place
        return total + carry * 10 ** len(str(a))
    return a // b


def _add(a: int, b: int, rng: random.Random, mistakes: float) -> int:
    total = carry = place = 0
    while a or b or carry:
        digit = a % 10 + b % 10 + carry
        carry = 1 if digit >= 10 and not rng.random() < mistakes else 0
        total += digit % 10 * 10**place
        a, b, place = a // 10, b // 10, place + 1
    return total


def _subtract(a: int, b: int, rng: random.Random, mistakes: float) -> int:
    if b > a:  # only after an earlier mistake
        return b - a
    total = borrow = place = 0
    while a or b:
        digit = a % 10 - b % 10 - borrow
        borrow = 0
        if digit < 0:
            digit += 10
            borrow = 0 if rng.random() < mistakes else 1
        total += digit * 10**place
        a, b, place = a // 10, b // 10, place + 1
    return total
