"""The counter-based generator: published known answers, and how counter and key are filled."""

import pytest
import torch

from qnoise.philox import philox4x32, seed_from, uniform

# Known answers of the Random123 distribution for philox4x32, ten rounds: counter, key, output.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text):
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN_ANSWERS)
def test_known_answers(counter, key, output):
    got = philox4x32(tuple(torch.tensor(word) for word in words(counter)), tuple(words(key)))
    assert [int(word) for word in got] == words(output)


def test_uniform_fills_counter_and_key_low_word_first():
    seed, offset, index = 0x299F31D0A4093822, 0x1234567, 0x85A308D3243F6A88 - 2**64 - 0x1234567
    counter = (0x243F6A88, 0x85A308D3, 0, 0)
    first = philox4x32(tuple(torch.tensor(word) for word in counter), (0xA4093822, 0x299F31D0))[0]
    assert uniform(torch.tensor(index), seed, offset).item() == (int(first) >> 8) / 2**24


def test_a_slice_draws_the_bits_of_the_whole():
    whole = uniform(torch.arange(1000), seed=7)
    assert torch.equal(uniform(torch.arange(400), seed=7, offset=600), whole[600:])
    # The sum is one 64-bit number: it carries into the high word, and wraps at the top.
    assert torch.equal(uniform(torch.arange(1000), 7, 2**32 - 500)[500:], uniform(torch.arange(500), 7, 2**32))
    assert torch.equal(uniform(torch.arange(1000), 7, 2**64 - 500)[500:], whole[:500])


def test_seeds_are_64_bits_and_negative_ones_wrap():
    index = torch.arange(64)
    assert torch.equal(uniform(index, -1), uniform(index, 2**64 - 1))
    assert not torch.equal(uniform(index, 1), uniform(index, 1 + 2**32))


def test_uniform_is_uniform():
    draws = uniform(torch.arange(1 << 18), seed=3).double()
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = torch.histc(draws, bins=64, min=0, max=1)
    chi2 = ((counts - 4096) ** 2 / 4096).sum().item()
    assert 25 < chi2 < 115  # 63 degrees of freedom; outside has a probability below 1e-4
    assert abs(torch.corrcoef(torch.stack([draws[:-1], draws[1:]]))[0, 1]) < 0.01


def test_seed_from_a_generator_is_reproducible_and_advances():
    generator = torch.Generator().manual_seed(5)
    first, second = seed_from(generator), seed_from(generator)
    assert first != second
    assert seed_from(generator.manual_seed(5)) == first
    torch.manual_seed(5)
    assert seed_from(None) == first
