"""Prompts: pairing over arms, held-out problems, and files that say where they are broken."""

import json

import pytest
import torch
from huggingface_hub import constants

from benchmarks.recovery.data import Example, load_examples, prompt_ids
from benchmarks.recovery.policy import load_policy
from benchmarks.recovery.presets import GSM8K, TINY_WORDS
from benchmarks.recovery.tokenizer import build_tokenizer


def gsm8k(data, **fields):
    return GSM8K.changed(**{"data": str(data), "steps": 2, "prompts_per_step": 5, "generation_rounds": 1, **fields})


def write(path, count, start=0):
    numbers = range(start, start + count)
    rows = [{"question": f"What is {i} and 1?", "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"} for i in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_word_problems_are_the_same_in_every_arm_and_held_out_ones_in_every_seed():
    preset = TINY_WORDS.changed(steps=2, prompts_per_step=5, eval_problems=30)
    (training, held_out), (other, same) = load_examples(preset, 0), load_examples(preset, 1)
    assert len(training) == 10
    assert training == load_examples(preset.changed(lr=1.0), 0)[0] != other
    assert held_out == same
    assert load_examples(preset.changed(split="dev"), 0)[1] != held_out


def test_a_folder_gives_train_and_test_and_every_epoch_has_its_order(tmp_path):
    write(tmp_path / "train.jsonl", 7)
    write(tmp_path / "test.jsonl", 3, start=100)
    training, held_out = load_examples(gsm8k(tmp_path), 0)
    assert len(training) == 10
    assert len(set(training[:7])) == 7
    assert set(training[7:]) < set(training[:7])
    assert {example.question for example in held_out} == {f"What is {i} and 1?" for i in (100, 101, 102)}
    assert load_examples(gsm8k(tmp_path), 1)[0] != training


def test_one_file_is_divided_and_the_parts_are_disjoint(tmp_path):
    write(tmp_path / "all.jsonl", 200)
    training, held_out = load_examples(gsm8k(tmp_path / "all.jsonl", steps=60), 0)
    assert 5 < len(held_out) < 40
    assert not set(training) & set(held_out)


def test_development_problems_are_taken_from_training(tmp_path):
    write(tmp_path / "train.jsonl", 200)
    write(tmp_path / "test.jsonl", 3, start=1000)
    training, held_out = load_examples(gsm8k(tmp_path, split="dev", steps=60), 0)
    assert not set(training) & set(held_out)
    assert all(int(example.question.split()[2]) < 1000 for example in held_out)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"question": "a", "answer": "#### 1"}\n\n{"question": "b", "ans',
            r"train\.jsonl, line 3: not JSON .*cut off",
        ),
        ('{"question": "a", "answer": "#### 1"}\n[1]\n', r"train\.jsonl, line 2: a list where a JSON object should be"),
        ('{"question": "a", "answer": 3}\n', r"train\.jsonl, record 1: no text in the field 'answer'"),
        ("", r"0 training and 1 evaluation problems"),
    ],
)
def test_a_damaged_file_names_the_line(tmp_path, text, message):
    (tmp_path / "train.jsonl").write_text(text)
    write(tmp_path / "test.jsonl", 1)
    with pytest.raises(ValueError, match=message):
        load_examples(gsm8k(tmp_path), 0)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"train\.jsonl: there is no such file"):
        load_examples(gsm8k(tmp_path), 0)
    with pytest.raises(FileNotFoundError, match=r"nothing\.jsonl: there is no such file"):
        load_examples(gsm8k(tmp_path / "nothing.jsonl"), 0)


@pytest.mark.parametrize("offline", [True, False])
def test_without_the_hub_the_message_says_at_once_what_is_needed(monkeypatch, offline):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(FileNotFoundError, match=r"'nobody/nothing' is no local folder.*Pass --model DIR"):
        load_policy("nobody/nothing", torch.float32)
    with pytest.raises(FileNotFoundError, match=r"Pass --data PATH: a folder with train\.jsonl and test\.jsonl"):
        load_examples(gsm8k("nobody/nothing"), 0)


def test_prompts_go_through_the_chat_template_where_there_is_one():
    tokenizer = build_tokenizer()
    example = Example("Tom has 2 pens.", "#### 2")
    assert tokenizer.decode(prompt_ids(tokenizer, example, "How many?")) == "<bos> Tom has 2 pens. How many?"
    tokenizer.chat_template = "<bos> He {{ messages[0]['content'] }}{% if add_generation_prompt %} has{% endif %}"
    assert tokenizer.decode(prompt_ids(tokenizer, example)) == "<bos> He Tom has 2 pens. has"
