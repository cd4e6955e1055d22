"""Rewards that a program can verify: the number a completion ends with, and the length it took."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterator, Sequence
from fractions import Fraction

import torch
from torch import Tensor

from ..spelling import check_choice

REWARD_MODES = ("strict", "flexible")

# A run of digits is consumed whole and never entered again from its middle, so searching hostile text is
# linear. Digits are ASCII, and a digit of another script beside them makes the run no number. A letter before
# a digit hides it (x2, H2O), a letter after it is a unit (42kg).
_NUMBER = re.compile(
    r"(?:(?<!\w)(?P<whole>[0-9]{1,3}(?:,[0-9]{3}){1,12}|[0-9]+)(?P<decimals>\.[0-9]+)?"
    r"|(?<![\w.])(?P<bare>\.[0-9]+))(?!\d)"
    r"(?: ?/ ?(?P<denominator>[0-9]{1,30})(?![\d.,]?\d))?"
)
# A minus is a sign when it touches the number (a currency symbol may stand between) and no operand is before.
_MINUS_BEFORE = re.compile(r"(?:^|[^\w.)\]}%\-−–])(?:[-−–](?:[$€£¥₹] ?)?|[$€£¥₹] ?[-−–])$")
_FINAL = re.compile(r"####[ \t\xa0]{0,8}(?:[-−–+](?:[$€£¥₹] ?)?|[$€£¥₹] ?[-−–]?)?(?=[.0-9])")
# TeX: a fraction, and the comma between thousands.
_TEX_FRACTION = re.compile(r"(\w?)\\[dt]?frac ?\{([0-9]{1,30})\} ?\{([0-9]{1,30})\}")
_TEX_COMMA = re.compile(r"(?<=[0-9])\{,\}(?=[0-9])")
_LONGEST = 400  # digits; a longer number is not an answer, and Python refuses to read one of 4,300


def gsm8k_reward(completions: Sequence[str], answers: Sequence[str], mode: str = "strict") -> Tensor:
    """1 for a completion whose final number equals the gold answer, else 0 (GSM8K, arXiv 2110.14168).

    Numbers are compared exactly, as fractions: 18, 18.00 and 36/2 are equal, 0.1 + 0.2 and 0.3 would be too.

    Args:
        completions: N texts.
        answers: N gold answers: a number ("42", "$1,200", "2/3"), "#### 42", or a whole worked solution that
            ends with "#### 42".
        mode: "strict": the number of the last ``#### N`` of the completion, on the same line; without one the
            reward is 0. "flexible": the last number of the completion. Both read thousands commas, decimals
            (also ``.5``), negatives, fractions and mixed numbers (2 3/4), these also in TeX (``\\frac{1}{2}``,
            ``1{,}234``), and ignore currency symbols, percent signs and units.

    Returns:
        (N,) fp32 tensor of 0.0 and 1.0 on the CPU.

    Raises:
        ValueError: different numbers of completions and answers; a gold answer that cannot be read or,
            without ``####``, holds more than one number (its index and text are named); an unknown mode.
        TypeError: a completion or an answer that is not a string, or a single string in place of a list.
    """
    check_choice("mode", mode, REWARD_MODES)
    for name, texts in (("completions", completions), ("answers", answers)):
        if isinstance(texts, str):
            raise TypeError(f"{name} must be a list of strings, got one string")
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise TypeError(f"{name}[{index}] must be a string, got {type(text).__name__}")
    if len(completions) != len(answers):
        raise ValueError(f"{len(completions)} completions but {len(answers)} answers; there must be one answer each")
    read = _final_number if mode == "strict" else _last_number
    golds = [_gold_number(index, answer) for index, answer in enumerate(answers)]
    return torch.tensor(
        [float(read(completion) == gold) for completion, gold in zip(completions, golds, strict=True)],
        dtype=torch.float32,
    )


def soft_overlong_punishment(
    lengths: Tensor,
    max_length: int,
    buffer_length: int,
    penalty_factor: float = 1.0,
    *,
    floored: bool = True,
) -> Tensor:
    """What to add to the reward of a long response (DAPO, arXiv 2503.14476, eq. 13).

    0 up to ``max_length − buffer_length`` tokens, then falling linearly to ``−penalty_factor`` at
    ``max_length``.

    Args:
        lengths: (N,) response lengths in tokens, any dtype.
        max_length: L_max, tokens.
        buffer_length: L_cache, tokens, 1 … max_length.
        penalty_factor: the largest punishment, ≥ 0.
        floored: stay at −penalty_factor beyond ``max_length`` (the paper, TRL); False keeps falling (verl).

    Returns:
        (N,) fp32, ≤ 0, on the device of ``lengths``.

    Raises:
        ValueError: a buffer outside 1 … max_length, a factor that is negative or not finite.
        TypeError: lengths that are no tensor.
    """
    if not 1 <= buffer_length <= max_length:
        raise ValueError(f"buffer_length must be between 1 and max_length={max_length}, got {buffer_length}")
    if not 0 <= penalty_factor < float("inf"):
        raise ValueError(f"penalty_factor must be at least 0 and finite, got {penalty_factor}")
    if not isinstance(lengths, Tensor):
        raise TypeError(f"lengths must be a tensor, got {type(lengths).__name__}; torch.tensor(lengths) makes one")
    excess = (lengths.to(torch.float32) - (max_length - buffer_length)).clamp_min(0.0)
    punishment = -excess / buffer_length * penalty_factor
    return punishment.clamp_min(-penalty_factor) if floored else punishment


def _gold_number(index: int, answer: str) -> Fraction:
    if "####" in answer:
        value = _final_number(answer)
    else:
        plain = _without_tex(answer)
        found = list(_numbers(plain))
        value = _value(plain, found[0]) if len(found) == 1 else None
    if value is None:
        shown = answer if len(answer) <= 200 else "…" + answer[-200:]
        raise ValueError(
            f"answers[{index}] cannot be read as a gold answer: {shown!r}; it must end with '#### <number>' "
            "or hold exactly one number"
        )
    return value


def _final_number(text: str) -> Fraction | None:
    """The number of the last ``#### N``, None if there is none."""
    text, value = _without_tex(text), None
    for lead in _FINAL.finditer(text):
        match = _NUMBER.match(text, lead.end())
        if match:
            value = _value(text, match)
    return value


def _last_number(text: str) -> Fraction | None:
    text = _without_tex(text)
    last = deque(_numbers(text), maxlen=1)
    return _value(text, last[0]) if last else None


def _without_tex(text: str) -> str:
    r"""``\frac{1}{2}`` as 1/2, what stands before it kept apart (2\frac{3}{4} is 2 3/4), and ``1{,}234`` as 1,234."""
    text = _TEX_FRACTION.sub(lambda match: f"{match[1]}{' ' if match[1] else ''}{match[2]}/{match[3]}", text)
    return _TEX_COMMA.sub(",", text)


def _numbers(text: str) -> Iterator[re.Match[str]]:
    """Every number of the text in order; the match of a mixed number is its whole part."""
    start = 0
    while match := _NUMBER.search(text, start):
        start = match.end()
        mixed = _mixed(text, match)
        if mixed:
            start = mixed.end()
        yield match


def _mixed(text: str, whole: re.Match[str]) -> re.Match[str] | None:
    """The proper fraction of a mixed number (the 3/4 of "2 3/4") whose whole part is ``whole``."""
    if whole["decimals"] or whole["bare"] or whole["denominator"] or text[whole.end() : whole.end() + 1] != " ":
        return None
    part = _NUMBER.match(text, whole.end() + 1)
    if part is None or not part["denominator"] or part["decimals"] or part["bare"]:
        return None
    if len(part["whole"]) > _LONGEST or not int(part["whole"].replace(",", "")) < int(part["denominator"]):
        return None
    return part


def _value(text: str, match: re.Match[str]) -> Fraction | None:
    """The number at ``match``, its sign and the fraction of a mixed number included.

    None for one too long to be an answer or with denominator 0.
    """
    value = _magnitude(match)
    mixed = _mixed(text, match)
    if value is not None and mixed:
        part = _magnitude(mixed)
        value = value + part if part is not None else None
    if value is None:
        return None
    return -value if _MINUS_BEFORE.search(text, max(0, match.start() - 4), match.start()) else value


def _magnitude(match: re.Match[str]) -> Fraction | None:
    whole = (match["whole"] or "").replace(",", "")
    decimals = (match["decimals"] or match["bare"] or ".")[1:]
    if len(whole) + len(decimals) > _LONGEST:
        return None
    value = Fraction(int(whole + decimals), 10 ** len(decimals))
    if match["denominator"]:
        denominator = int(match["denominator"])
        return value / denominator if denominator else None
    return value
