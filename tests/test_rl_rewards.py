import json
import time
from pathlib import Path

import pytest
import torch

from qnoise.rl import gsm8k_reward, soft_overlong_punishment

GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k"
PROBLEMS = {"train.jsonl": 7473, "test.jsonl": 1319}


def reads(text, mode):
    """What the reward reads in ``text``, found by asking it about every candidate."""
    candidates = ["42", "-42", "1234", "-1234", "1234567", "1/2", "-1/2", "2.75", "18.5", "0", "5", "3", "-3", "7"]
    hits = [c for c in candidates if gsm8k_reward([text], [c], mode).item() == 1]
    assert len(hits) <= 1
    return hits[0] if hits else None


STRICT = [
    ("#### 42", "42"),
    ("so 6*7=42\n#### 42", "42"),
    ("####42", "42"),
    ("#### 42.00", "42"),
    ("#### 42 apples, not 7", "42"),
    ("#### 42.", "42"),
    ("#### $42", "42"),
    ("#### 42%", "42"),
    ("#### -42", "-42"),
    ("#### −42", "-42"),
    ("#### -$42", "-42"),
    ("#### $-42", "-42"),
    ("#### +42", "42"),
    ("#### 1,234", "1234"),
    ("#### $1,234.00", "1234"),
    ("#### 1,234,567", "1234567"),
    ("#### 1/2", "1/2"),
    ("#### .5", "1/2"),
    ("#### -.5", "-1/2"),
    ("#### 2 3/4", "2.75"),
    ("#### 0", "0"),
    ("#### \\frac{1}{2}", "1/2"),
    ("#### 7\n\nQ: again\n#### 42", "42"),  # the last one counts
    ("#### 42 #### none", "42"),
    ("#### €42", "42"),
    ("#### £1,234.00", "1234"),
    ("#### 42% of 84", "42"),
    ("16 eggs, 3 eaten, 4 baked.\n#### 42\n16 eggs, 3 eaten, 4 baked.", "42"),  # the question again
    ("the answer is 42", None),
    ("### 42", None),
    ("#### forty-two", None),
    ("####\n42", None),
    ("#### - 42", None),
    ("#### ٤٢", None),  # digits of another script
    ("#### 42٢", None),
    ("", None),
]
FLEXIBLE = [
    ("first 7, then 3, so the answer is 42.", "42"),
    ("A: 42", "42"),
    ("the total is $1,234", "1234"),
    ("the total is $1,234.00!", "1234"),
    ("it is 42%", "42"),
    ("42 €", "42"),
    ("€1,234.00", "1234"),
    ("a loss of -42%", "-42"),
    ("**42**", "42"),
    ("\\boxed{42}", "42"),
    ("Q: 16 eggs, 3 eaten, 4 baked? 16 - 3 - 4 = 9. A: 42", "42"),  # the question again
    ("that is 42kg", "42"),
    ("that is 42 km/h", "42"),
    ("it fell to -3", "-3"),
    ("it fell to −3 °C", "-3"),
    ("a debt of -$1,234", "-1234"),
    ("10-3=7", "7"),
    ("45-3", "3"),  # an operator, not a sign
    ("(7)-3", "3"),
    ("- 3 apples", "3"),  # a bullet, not a sign
    ("one half: 1/2", "1/2"),
    ("-1/2", "-1/2"),
    ("2 3/4 cups", "2.75"),
    ("37/2", "18.5"),
    ("it is .5", "1/2"),
    ("so...42", "42"),
    ("\\boxed{\\frac{1}{2}}", "1/2"),  # TeX, as models write it
    ("-\\dfrac{1}{2}", "-1/2"),
    ("\\(2\\frac{3}{4}\\)", "2.75"),
    ("\\tfrac{37}{2} cups", "18.5"),
    ("\\boxed{1{,}234}", "1234"),
    ("$1{,}234{,}567$", "1234567"),
    ("\\frac{5}{0}", None),
    ("\\frac12", None),
    ("#### 7 and then 42", "42"),
    ("1,2,3", "3"),  # a list
    ("12,34,5", "5"),
    ("x2 = H2O", None),
    ("no number", None),
    ("half: 5/0", None),
    ("٤٢ 42", "42"),
    ("42٢", None),
    ("٢42", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "number"), STRICT)
def test_strict(text, number):
    assert reads(text, "strict") == number


@pytest.mark.parametrize(("text", "number"), FLEXIBLE)
def test_flexible(text, number):
    assert reads(text, "flexible") == number


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("42", "42"),
        ("#### 42", "42"),
        ("He has 40+2=<<40+2=42>>42 apples.\nNot 41.\n#### 42", "42"),
        ("#### 1,450,000", "1450000"),
        ("1,200", "1200"),
        ("$18.50", "18.5"),
        ("25%", "25"),
        ("#### -3", "-3"),
        ("-1/2", "-0.5"),
        ("2 3/4", "2.75"),
        ("5 apples", "5"),
        (" 42 ", "42"),
    ],
)
def test_shapes_of_gold_answers(gold, answer):
    assert gsm8k_reward([f"#### {answer}", "#### 99", answer], [gold] * 3).tolist() == [1, 0, 0]
    assert gsm8k_reward([f"#### {answer}", "#### 99", answer], [gold] * 3, "flexible").tolist() == [1, 0, 1]


@pytest.mark.parametrize("gold", ["", "no idea", "#### none", "5 apples and 3 pears", "42\n####", "1/0"])
def test_an_unreadable_gold_answer_is_named(gold):
    with pytest.raises(ValueError, match=r"answers\[1\] cannot be read as a gold answer: ") as error:
        gsm8k_reward(["a", "b"], ["42", gold])
    assert repr(gold) in str(error.value)


def test_comparison_is_exact():
    """Numbers a float cannot tell apart, and decimals it cannot hold."""
    big = 2**53
    assert gsm8k_reward([f"#### {big + 1}"], [str(big)]).item() == 0
    assert gsm8k_reward([f"#### {big + 1}"], [str(big + 1)]).item() == 1
    assert gsm8k_reward(["#### 0.10000000000000000001"], ["0.1"]).item() == 0
    assert gsm8k_reward(["#### 1/3"], ["0.3333333333333333"]).item() == 0


@pytest.mark.parametrize(
    "text",
    [
        "1" * 100_000,
        "1," * 50_000,
        "1,234" * 20_000,
        "11," * 33_000,
        "1 " * 50_000,
        "1/" * 50_000,
        "1 1/2 " * 16_000,
        "1." * 50_000,
        "-" * 100_000 + "1",
        "#" * 100_000,
        "#### " * 20_000,
        "####" + " " * 100_000 + "1",
        "#### 1" * 16_000,
        "1" * 50_000 + "٢",
        "$" * 100_000,
        "," * 100_000,
        "\\frac{" * 16_000,
        "\\frac{1}{1}" * 9_000,
        "1{,}" * 25_000,
        "\\frac{" + "1" * 100_000,
    ],
    ids=lambda text: repr(text[:8]),
)
@pytest.mark.parametrize("mode", ["strict", "flexible"])
def test_hostile_text_in_bounded_time(text, mode):
    start = time.process_time()
    gsm8k_reward([text], ["1"], mode)
    assert time.process_time() - start < 2.0


def test_a_number_of_thousands_of_digits_is_no_answer():
    assert gsm8k_reward(["#### " + "9" * 10_000], ["42"]).item() == 0
    with pytest.raises(ValueError, match="cannot be read"):
        gsm8k_reward(["42"], ["9" * 10_000])


def test_result_and_bad_input():
    got = gsm8k_reward(["#### 1", "#### 2"], ["1", "1"])
    assert got.dtype == torch.float32
    assert got.shape == (2,)
    assert gsm8k_reward([], []).shape == (0,)
    with pytest.raises(ValueError, match="2 completions but 1 answers"):
        gsm8k_reward(["a", "b"], ["1"])
    with pytest.raises(ValueError, match="mode is 'stric'; it must be one of .* Did you mean 'strict'"):
        gsm8k_reward(["a"], ["1"], "stric")
    with pytest.raises(TypeError, match="completions must be a list of strings, got one string"):
        gsm8k_reward("a", ["1"])
    with pytest.raises(TypeError, match=r"answers\[0\] must be a string, got int"):
        gsm8k_reward(["a"], [1])


def problems(name):
    """(answers, damaged): the answer of every line that is JSON, the numbers of the lines that are not."""
    if not (GSM8K / name).is_file():
        pytest.skip(f"{name} is not beside the repository (../shared/data/gsm8k)")
    answers, damaged = [], []
    with open(GSM8K / name, encoding="utf-8", newline="\n") as file:
        for number, line in enumerate(file, 1):
            try:
                answers.append(json.loads(line)["answer"])
            except json.JSONDecodeError:
                damaged.append(number)
    return answers, damaged


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_real_gold_answer_is_read(name):
    """And the worked solution earns its own reward, in both modes; another problem's does not."""
    answers, damaged = problems(name)
    assert len(answers) + len(damaged) == PROBLEMS[name]
    numbers = [answer.rsplit("####", 1)[1].strip() for answer in answers]
    for mode in ("strict", "flexible"):
        assert gsm8k_reward(answers, answers, mode).all()
        assert gsm8k_reward(answers, numbers, mode).all()
        shifted = gsm8k_reward(answers, numbers[1:] + numbers[:1], mode)
        equal = torch.tensor([a == b for a, b in zip(numbers, numbers[1:] + numbers[:1], strict=True)])
        assert torch.equal(shifted.bool(), equal)


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_copy_of_the_data_is_whole(name):
    answers, damaged = problems(name)
    if damaged:
        pytest.skip(f"{name} is damaged on line {damaged}; {len(answers)} of {PROBLEMS[name]} answers were checked")
    assert len(answers) == PROBLEMS[name]


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_soft_overlong_punishment(factor):
    lengths = torch.tensor([0, 16384, 16385, 18432, 20480, 30000])
    got = soft_overlong_punishment(lengths, 20480, 4096, factor)
    want = torch.tensor([0.0, 0.0, -1 / 4096, -0.5, -1.0, -1.0]) * factor
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    falling = soft_overlong_punishment(lengths, 20480, 4096, factor, floored=False)
    assert torch.equal(falling[:5], got[:5])
    assert falling[5].item() == pytest.approx(-factor * (30000 - 16384) / 4096)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 0), "buffer_length must be between 1 and max_length=10, got 0"),
        ((10, 11), "buffer_length must be between 1 and max_length=10, got 11"),
        ((10, 5, -1.0), "penalty_factor must be at least 0 and finite, got -1.0"),
        ((10, 5, float("inf")), "penalty_factor must be at least 0 and finite, got inf"),
    ],
)
def test_soft_overlong_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        soft_overlong_punishment(torch.tensor([1]), *arguments)


def test_soft_overlong_takes_a_tensor():
    with pytest.raises(TypeError, match=r"lengths must be a tensor, got list; torch\.tensor\(lengths\) makes one"):
        soft_overlong_punishment([1, 2], 10, 5)
