"""Ranking repairs: the divergence is the textbook's, the order is by it alone, and the model stays as it was."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import qnoise
from benchmarks.recovery.data import prompt_ids, word_examples
from benchmarks.recovery.policy import load_policy, model_path
from qnoise import QuantSpec, cli
from qnoise.commands.repair import read_texts
from qnoise.repairs import recipe as recipes
from qnoise.repairs.cost import stored_bits
from qnoise.repairs.divergence import divergence, keep
from qnoise.repairs.rank import Ranking, rank
from qnoise.repairs.recipe import Recipe
from qnoise.repairs.text import self_generated
from tests.tiny_models import tiny_model, with_lora

POLICY = model_path("checkpoints/words-{checkpoint}", 0)


@pytest.fixture(scope="module")
def policy():
    model, tokenizer = load_policy(POLICY, torch.float32)
    return model.requires_grad_(False), tokenizer


@pytest.fixture(scope="module")
def texts(policy):
    model, tokenizer = policy
    prompts = [prompt_ids(tokenizer, example) for example in word_examples("rl", 5, 24)]
    return self_generated(model, tokenizer, prompts, max_new_tokens=24, batch_size=12)


def ids(rows=4, length=10, seed=0):
    return torch.randint(3, 99, (rows, length), generator=torch.Generator().manual_seed(seed))


def snapshot(model):
    modules = [(name, type(module), module.training, dict(vars(module))) for name, module in model.named_modules()]
    kinds = [(name, kind, training, sorted(keys)) for name, kind, training, keys in modules]
    return kinds, [(n, p.data_ptr(), p.requires_grad, p.clone()) for n, p in model.state_dict(keep_vars=True).items()]


def same(before, after):
    return before[0] == after[0] and all(
        a[:3] == b[:3] and torch.equal(a[3], b[3]) for a, b in zip(before[1], after[1], strict=True)
    )


def test_the_divergence_is_the_one_of_the_textbook():
    """Against torch's kl_div in fp64, over the positions whose next token counts, counted one by one."""
    model = tiny_model()
    batch = {"input_ids": ids(), "attention_mask": torch.ones(4, 10, dtype=torch.long), "labels": ids()}
    batch["attention_mask"][1, 6:] = 0
    batch["labels"][2, :5] = -100
    reference = keep(model, [batch])
    qnoise.patch_model(model, "mxfp4")
    found = divergence(model, reference)
    with torch.no_grad():
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        now = model(**inputs).logits.double()
        with qnoise.full_precision(model):
            before = model(**inputs).logits.double()
    kl, error, size, agree, count = 0.0, 0.0, 0.0, 0, 0
    for row in range(4):
        for position in range(9):
            if not batch["attention_mask"][row, position + 1] or batch["labels"][row, position + 1] == -100:
                continue
            p, q = before[row, position], now[row, position]
            kl += F.kl_div(q.log_softmax(-1), p.log_softmax(-1), reduction="sum", log_target=True).item()
            error += (q - q.mean() - (p - p.mean())).square().sum().item()
            size += (p - p.mean()).square().sum().item()
            agree += int(q.argmax() == p.argmax())
            count += 1
    assert found.tokens == count == 4 * 9 - 4 - 4
    assert found.kl == pytest.approx(kl / count, rel=1e-4)
    assert found.output_error == pytest.approx((error / size) ** 0.5, rel=1e-5)
    assert found.agreement == agree / count
    qnoise.unpatch_model(model)
    assert divergence(model, reference).kl == pytest.approx(0, abs=1e-7)


def test_what_gives_no_logits_is_refused():
    with pytest.raises(TypeError, match="a KL divergence needs a language model"):
        keep(tiny_model().model, [ids()])
    with pytest.raises(ValueError, match="no token counts"):
        keep(tiny_model(), [{"input_ids": ids(), "labels": torch.full((4, 10), -100)}])
    with pytest.raises(TypeError, match="mapping with 'input_ids'"):
        keep(tiny_model(), [(ids(),)])


def test_texts_are_those_of_the_model_with_the_prompt_and_padding_masked(policy):
    model, tokenizer = policy
    prompts = [prompt_ids(tokenizer, example) for example in word_examples("rl", 5, 5)]
    one, two = (self_generated(model, tokenizer, prompts, max_new_tokens=12, batch_size=n, seed=3) for n in (2, 5))
    assert [len(batch["input_ids"]) for batch in one] == [2, 2, 1]
    rows = [
        row for batch in one for row in zip(*(batch[k] for k in ("input_ids", "attention_mask", "labels")), strict=True)
    ]
    for index, (row, mask, labels) in enumerate(rows):
        length, prompt = int(mask.sum()), prompts[index]
        assert mask[:length].all()
        assert row[: len(prompt)].tolist() == prompt
        assert (labels[: len(prompt)] == -100).all()
        assert (labels[length:] == -100).all()
        assert torch.equal(labels[len(prompt) : length], row[len(prompt) : length])
        assert torch.equal(row[:length], two[0]["input_ids"][index, :length])  # whatever the batches
    started = self_generated(model, tokenizer, count=2, max_new_tokens=4)
    assert started[0]["input_ids"][:, 0].tolist() == [tokenizer.bos_token_id] * 2
    with pytest.raises(ValueError, match="count is 0"):
        self_generated(model, tokenizer, count=0)


def test_ranked_by_the_function_where_the_weights_say_otherwise(policy, texts):
    """GPTQ raises the error of the weights and lowers the divergence: it must come first, on text it has not seen."""
    model, _ = policy
    before = snapshot(model)
    ranking = rank(model, texts, candidates=["nvfp4", Recipe("nvfp4", "gptq"), Recipe(QuantSpec("mxfp4"))])
    assert same(before, snapshot(model))
    assert [str(row.recipe) for row in ranking.rows] == ["nvfp4 + gptq", "nvfp4", "mxfp4"]
    repaired, plain, coarse = ranking.rows
    assert repaired.weight_error > plain.weight_error
    assert repaired.kl < 0.7 * plain.kl
    assert repaired.output_error < plain.output_error < coarse.output_error
    assert coarse.bits == 4.25
    assert plain.bits > 4.5
    assert plain.bits == pytest.approx(4.5 + 32 * 21 / sum(m.weight.numel() for m in linears(model)))
    undo = ranking.apply(model)
    try:
        assert divergence(model, keep_measured(model, texts)).kl == repaired.kl
    finally:
        undo()
    assert same(before, snapshot(model))
    assert Ranking.from_json(ranking.to_json()) == ranking
    assert Recipe.from_dict(json.loads(json.dumps(ranking.best.recipe.to_dict()))) == ranking.best.recipe
    assert ranking.to_markdown().splitlines()[2].startswith("| nvfp4 + gptq | ")


def linears(model):
    return [m for layer in model.model.layers for m in layer.modules() if type(m) is torch.nn.Linear]


def keep_measured(model, texts):
    """The reference of `rank`: the batches it does not calibrate on, in full precision."""
    with qnoise.full_precision(model):
        return keep(model, texts[1::2])


@pytest.mark.parametrize("lora", [False, True])
def test_the_model_is_as_it_was_also_after_an_error(lora):
    model = tiny_model()
    if lora:
        model = with_lora(model)
    else:
        model.requires_grad_(False)
    model.train()
    before = snapshot(model)
    seen = []

    def evaluate(given):
        assert given is model
        seen.append(qnoise.state(model)["formats"])
        if len(seen) == 3:
            raise RuntimeError("the metric is down")
        return 1.0

    candidates = [Recipe("mxfp4", ("fold_scales", "gptq")) if not lora else Recipe("mxfp4", "gptq"), "nvfp4"]
    with pytest.raises(RuntimeError, match="the metric is down"):
        rank(model, ids(), candidates=candidates, evaluate=evaluate)
    assert seen == [{}, {"mxfp4": 14}, {"nvfp4": 14}]
    assert same(before, snapshot(model))


def test_a_repair_that_fails_leaves_nothing_and_is_listed(monkeypatch):
    model = tiny_model()
    before = snapshot(model)

    def fails(given, inputs):
        raise ValueError("layers.0: a singular moment")

    monkeypatch.setitem(recipes.STEPS, "gptq", fails)
    ranking = rank(model, ids(), candidates=[Recipe("mxfp4", "gptq"), "mxfp4", "mxfp6_e2m3"], evaluate=lambda m: 0.5)
    assert dict(ranking.left_out) == {
        "mxfp4 + gptq": "layers.0: a singular moment",
        "mxfp6_e2m3": "6.25 bits per weight",
    }
    assert [str(row.recipe) for row in ranking.rows] == ["mxfp4"]
    assert (ranking.baseline, ranking.best.metric) == (0.5, 0.5)
    assert "Left out: mxfp4 + gptq: layers.0: a singular moment" in ranking.to_markdown()
    assert same(before, snapshot(model))
    with pytest.raises(ValueError, match=r"no candidate could be measured. mxfp4 \+ gptq: layers.0: a singular"):
        rank(model, ids(), candidates=[Recipe("mxfp4", "gptq")])


def test_calibration_and_measurement_are_different_text():
    seen = {}

    class Report:
        def undo(self):
            pass

    def step(given, inputs):
        seen["calibration"] = torch.cat([batch["input_ids"] for batch in inputs])
        return Report()

    model = tiny_model()
    batch = {"input_ids": ids(5), "attention_mask": torch.ones(5, 10, dtype=torch.long), "use_cache": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(recipes.STEPS, "gptq", step)
        found = rank(model, batch, candidates=[Recipe("mxfp4", "gptq")])
        assert torch.equal(seen["calibration"], ids(5)[:2])
        assert found.tokens == 3 * 9
        rank(model, [{"input_ids": ids(2, seed=n)} for n in range(3)], candidates=[Recipe("mxfp4", "gptq")])
        assert torch.equal(seen["calibration"], torch.cat([ids(2, seed=0), ids(2, seed=2)]))
        rank(model, batch, candidates=[Recipe("mxfp4", "gptq")], measure_on=ids(2))
        assert torch.equal(seen["calibration"], ids(5))
    with pytest.raises(ValueError, match="fewer than two sequences"):
        rank(model, ids(1))


def test_the_usual_candidates_fit_the_budget_and_all_bits_are_counted():
    model = tiny_model(num_hidden_layers=1)
    small = rank(model, ids(2, 6), budget=4.25)
    names = {str(row.recipe) for row in small.rows} | set(small.left_out)
    assert {"mxfp4", "mxfp4 (mse)", "mxfp4 (mse) + gptq", "mxfp4 + fold_scales"} <= names
    assert all(row.bits <= 4.25 for row in small.rows)
    assert not any("nvfp4" in name for name in names)
    assert "4.3125 bits" in small.left_out["mxfp4 (mse, macro_block=128)"]
    assert [row.kl for row in small.rows] == sorted(row.kl for row in small.rows)
    qnoise.patch_model(model, QuantSpec("mxfp4", residual=0.5))
    assert stored_bits(model) == 8.5
    with pytest.raises(ValueError, match="patched; rank measures against full precision"):
        rank(model, ids())
    with pytest.raises(ValueError, match=r"nothing fits a budget of 4 bits per weight \(mxfp4: 4.25 bits"):
        rank(tiny_model(), ids(), fmt="mxfp4", budget=4, candidates=["mxfp4"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recipe("mxfp4", "gtpq"), "repair"),
        (lambda: Recipe("mxfp4", ("gptq", "gptq")), "can be applied once"),
        (lambda: Recipe.from_dict({"spec": {"fmt": "mxfp4"}}), "this recipe is damaged: KeyError"),
        (lambda: Recipe("mxfp4", "gptq").apply(tiny_model()), "calibrates on inputs, and got none"),
        (lambda: Ranking.from_json("{}"), "this is no ranking: schema is None"),
        (lambda: Ranking.from_json('{"schema": "qnoise-ranking-1", "rows": [3]}'), "this ranking is damaged"),
    ],
)
def test_mistakes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def run(arguments):
    return cli.main(["repair", *map(str, arguments)])


def test_the_command_ranks_writes_and_saves(tmp_path, capsys, monkeypatch):
    candidates = [Recipe("mxfp4"), Recipe("mxfp4", "gptq")]
    monkeypatch.setattr(sys.modules["qnoise.repairs.rank"], "_candidates", lambda fmt, budget: candidates)
    lines = [json.dumps({"text": f"Tom has {n} pens. He buys 7 more."}) for n in range(8)]
    (tmp_path / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    out, saved = tmp_path / "ranking.json", tmp_path / "repaired"
    given = [POLICY, "--fmt", "mxfp4", "--inputs", tmp_path / "texts.jsonl", "--out", out, "--apply", saved]
    assert run(given) == 0, capsys.readouterr().err
    ranking = Ranking.from_json(out.read_text(encoding="utf-8"))
    assert f"best: {ranking.best.recipe}" in capsys.readouterr().out
    model, _ = load_policy(str(saved), torch.float32)
    stock, _ = load_policy(POLICY, torch.float32)
    tokens = torch.tensor([[5, 6, 7, 8, 9, 10]])
    moved = divergence(model, keep(stock, [tokens])).kl
    assert 0 < moved < 1
    assert json.loads((saved / "qnoise_recipe.json").read_text()) == ranking.best.recipe.to_dict()
    assert run(given) == 2
    assert "the folder is not empty" in capsys.readouterr().err
    assert run([POLICY, "--inputs", tmp_path / "none.txt"]) == 2
    assert "there is no such file of texts" in capsys.readouterr().err


def test_damaged_texts_are_named_by_line(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"txt": "two"}\n', encoding="utf-8")
    with pytest.raises(ValueError, match='a.jsonl, line 3: no object with a string in the field "text"'):
        read_texts(tmp_path / "a.jsonl")
    (tmp_path / "b.txt").write_text("one\n\n", encoding="utf-8")
    with pytest.raises(ValueError, match="b.txt holds 1 texts"):
        read_texts(tmp_path / "b.txt")
    (tmp_path / "b.txt").write_text("one\n\ntwo\n", encoding="utf-8")
    assert read_texts(tmp_path / "b.txt") == ["one", "two"]
