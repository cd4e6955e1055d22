import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from qnoise.rl import Rollout
from qnoise.rl.rollouts import collect_noise_state

TENSORS = (
    "prompt_ids",
    "prompt_mask",
    "response_ids",
    "response_mask",
    "rollout_log_probs",
    "finished",
    "lengths",
    "group_ids",
)


def rollout(samples=6, prompt=3, tokens=4):
    lengths = torch.arange(samples) % tokens + 1
    mask = torch.arange(tokens) < lengths[:, None]
    return Rollout(
        prompt_ids=torch.arange(samples * prompt).view(samples, prompt),
        prompt_mask=torch.tensor([[i % 2 == 0] + [True] * (prompt - 1) for i in range(samples)]),
        response_ids=torch.where(mask, 7, 0),
        response_mask=mask,
        rollout_log_probs=torch.where(mask, -torch.rand(samples, tokens), 0.0),
        finished=lengths < tokens,
        lengths=lengths,
        group_ids=torch.arange(samples) // 2,
        texts=tuple(f"text {i} 漢 \n \ud83d" for i in range(samples)),
        noise={"sigma": 0.01, "seed": 3, "step": 5, "num_modules": 1, "modules": {"norm": 0.01}},
        sampling={"temperature": 0.7, "seed": 11},
    )


def same(a, b):
    return (
        all(torch.equal(getattr(a, n), getattr(b, n)) and getattr(a, n).dtype == getattr(b, n).dtype for n in TENSORS)
        and a.texts == b.texts
        and a.noise == b.noise
        and a.sampling == b.sampling
    )


def test_derived_tensors():
    r = rollout()
    assert len(r) == 6
    assert r.truncated.tolist() == [False, False, False, True, False, False]
    assert r.input_ids.shape == r.attention_mask.shape == r.position_ids.shape == (6, 7)
    assert r.attention_mask[1].tolist() == [0, 1, 1, 1, 1, 0, 0]
    assert r.position_ids[1].tolist() == [0, 0, 1, 2, 3, 3, 3]
    with pytest.raises(AttributeError):
        r.lengths = None


def test_select_and_split():
    r = rollout()
    mask = torch.tensor([True, False, True, False, False, True])
    some = r.select(mask)
    assert len(some) == 3
    assert some.texts == (r.texts[0], r.texts[2], r.texts[5])
    for name in TENSORS:
        assert torch.equal(getattr(some, name), getattr(r, name)[mask])
    assert some.noise == r.noise
    assert some.group_ids.tolist() == [0, 1, 2]
    swapped = r.select(torch.tensor([5, 0]))
    assert swapped.texts == (r.texts[5], r.texts[0])
    assert torch.equal(swapped.rollout_log_probs, r.rollout_log_probs[[5, 0]])
    assert len(r.select(torch.zeros(6, dtype=torch.bool))) == 0

    parts = r.split(4)
    assert [len(part) for part in parts] == [2, 2, 1, 1]
    for name in TENSORS:
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(r, name))
    assert sum((part.texts for part in parts), ()) == r.texts
    assert same(r.to("cpu"), r)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda r: r.select(torch.ones(5, dtype=torch.bool)),
            ValueError,
            r"mask has shape \(5,\) but the rollout holds 6",
        ),
        (lambda r: r.select(torch.tensor([6])), ValueError, "index 6…6 is out of range for 6 samples"),
        (lambda r: r.select(torch.tensor([-1])), ValueError, "out of range"),
        (lambda r: r.select(torch.ones(6)), TypeError, "select takes a .N,. bool mask or integer index"),
        # A mask of 0 and 1 is no mask of bool: as an index it would pick samples 0 and 1 over and over.
        (lambda r: r.select(torch.ones(6, dtype=torch.uint8)), TypeError, r"got \(6,\) torch\.uint8"),
        (lambda r: r.select([0]), TypeError, r"select takes a .N,. bool mask or integer index, got list"),
        (lambda r: r.to(torch.bfloat16), TypeError, r"to\(\) takes a device, got torch\.bfloat16"),
        (lambda r: r.split(2.0), TypeError, r"split\(\) takes a number of parts, got 2\.0"),
        (lambda r: r.split(0), ValueError, "can be split into 1 … 6 parts, not 0"),
        (lambda r: r.split(7), ValueError, "can be split into 1 … 6 parts, not 7"),
    ],
)
def test_select_and_split_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call(rollout())


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "response_mask",
            torch.ones(6, 3, dtype=torch.bool),
            r"response_mask has shape \(6, 3\) but response_ids has shape \(6, 4\)",
        ),
        ("rollout_log_probs", torch.ones(5, 4), r"rollout_log_probs has shape \(5, 4\) but response_ids"),
        (
            "prompt_mask",
            torch.ones(6, 2, dtype=torch.bool),
            r"prompt_mask has shape \(6, 2\) but prompt_ids has shape \(6, 3\)",
        ),
        ("lengths", torch.ones(7), r"lengths has shape \(7,\) but response_ids"),
        ("finished", torch.tensor(True), r"finished has shape \(\) but response_ids"),
        ("response_ids", torch.tensor(7), r"response_ids must have shape \(samples, tokens\), got \(\)"),
        ("texts", ("a",), "1 texts but response_ids"),
    ],
)
def test_tensors_must_fit(name, value, message):
    r = rollout()
    fields = {n: getattr(r, n) for n in TENSORS} | {"texts": r.texts}
    with pytest.raises(ValueError, match=message):
        Rollout(**{**fields, name: value})


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("response_mask", torch.int64, r"response_mask must be bool, got torch\.int64"),
        ("prompt_mask", torch.float32, r"prompt_mask must be bool, got torch\.float32"),
        ("finished", torch.int64, r"finished must be bool, got torch\.int64"),
        ("response_ids", torch.float32, r"response_ids must be integers, got torch\.float32"),
        ("group_ids", torch.bool, r"group_ids must be integers, got torch\.bool"),
        ("rollout_log_probs", torch.int64, r"rollout_log_probs must be floating point, got torch\.int64"),
    ],
)
def test_tensors_of_another_kind(name, dtype, message):
    """A rollout is also made by hand, from another engine's lists: ~finished of integers would be -2 and -1."""
    r = rollout()
    fields = {n: getattr(r, n) for n in TENSORS} | {"texts": r.texts}
    with pytest.raises(TypeError, match=message):
        Rollout(**{**fields, name: fields[name].to(dtype)})


def test_save_and_load(tmp_path):
    path = tmp_path / "rollout.safetensors"
    r = rollout()
    r.save(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert same(Rollout.load(path), r)
    empty = r.select(torch.zeros(6, dtype=torch.bool))
    empty.save(str(path))  # replaces
    assert same(Rollout.load(str(path)), empty)


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "rollout.safetensors"
    r = rollout()
    r.save(path)
    monkeypatch.setattr("os.replace", lambda *a: (_ for _ in ()).throw(OSError("disk is full")))
    with pytest.raises(OSError, match="disk is full"):
        r.select(torch.tensor([0])).save(path)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    assert same(Rollout.load(path), r)


def damage(path, kind):
    data = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(data[:-50])
    elif kind == "header":
        path.write_bytes(b"\xff" * 64 + data[64:])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "other file":
        save_file({"weight": torch.zeros(2)}, path)
    else:
        tensors = load_file(path)
        header = {"schema": 1, "noise": {}, "sampling": {}}
        if kind == "later schema":
            header["schema"] = 99
        elif kind == "missing tensor":
            del tensors["lengths"]
        elif kind == "texts":
            tensors["texts"] = torch.zeros(4, dtype=torch.uint8)
        elif kind == "shapes":
            tensors["lengths"] = tensors["lengths"][1:].clone()
        save_file(tensors, path, metadata={"qnoise_rollout": json.dumps(header)})


@pytest.mark.parametrize(
    "kind", ["truncated", "header", "empty", "other file", "later schema", "missing tensor", "texts", "shapes"]
)
def test_a_damaged_file_is_named(tmp_path, kind):
    path = tmp_path / "rollout.safetensors"
    rollout().save(path)
    damage(path, kind)
    with pytest.raises(ValueError, match=r"rollout\.safetensors is not a readable rollout file"):
        Rollout.load(path)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no rollout at"):
        Rollout.load(tmp_path / "nothing")


class Noisy(torch.nn.Identity):
    def __init__(self, **state):
        super().__init__()
        self.state = state

    def noise_state(self):
        return self.state


def test_noise_state():
    quiet = {"sigma": 0.0, "seed": None, "step": None, "num_modules": 0, "modules": {}}
    assert collect_noise_state(torch.nn.Linear(2, 2)) == quiet
    model = torch.nn.Sequential(
        Noisy(sigma=0.01, seed=3, step=5, active=True),
        torch.nn.Linear(2, 2),
        Noisy(sigma=0.02, seed=3, step=5, active=True, name="canonical"),
        Noisy(sigma=0.5, seed=9, step=9, active=False),
        Noisy(sigma=None, seed=None, step=None, active=False),
    )
    assert collect_noise_state(model) == {
        "sigma": 0.02, "seed": 3, "step": 5, "num_modules": 2, "modules": {"0": 0.01, "canonical": 0.02},
    }  # fmt: skip
    model[0].state["step"] = 6
    assert collect_noise_state(model)["step"] is None
    json.dumps(collect_noise_state(model))
