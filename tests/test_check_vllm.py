"""scripts/check_vllm.py, against a stand-in for vLLM: the same checkpoint, loaded by transformers."""

from __future__ import annotations

import math
import sys
import types
from pathlib import Path

import pytest
import torch

import qnoise
from qnoise.integrations.export import export
from scripts.check_vllm import Answer, Opinion, Row, compare, main
from tests.test_export import stock


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    pytest.importorskip("compressed_tensors")
    path = tmp_path_factory.mktemp("export") / "x"
    export(qnoise.patch_model(stock(), fmt="nvfp4"), path)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(99)}, unk_token="w3"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w3").save_pretrained(path.parent / "tokenizer")
    return path


class Engine:
    """The two calls of `vllm.LLM` that the script makes, with the layout of what they give."""

    heat = 1.0
    asked: dict

    def __init__(self, **asked) -> None:
        from transformers import AutoModelForCausalLM

        Engine.asked = asked
        self.model = AutoModelForCausalLM.from_pretrained(asked["model"], dtype="auto").eval()

    def scores(self, ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return torch.log_softmax(self.model(torch.tensor([ids])).logits[0].float() * self.heat, -1)

    def generate(self, prompts: list[dict], params) -> list:
        results = []
        for prompt in prompts:
            ids = list(prompt["prompt_token_ids"])
            rated = None
            if getattr(params, "prompt_logprobs", None):
                scores = self.scores(ids)
                rated = [None]
                for place, token in enumerate(ids[1:]):
                    both = {token, int(scores[place].argmax())}
                    rated.append({t: types.SimpleNamespace(logprob=float(scores[place, t])) for t in both})
            for _ in range(params.max_tokens):
                ids.append(int(self.scores(ids)[-1].argmax()))
            written = ids[len(prompt["prompt_token_ids"]) :]
            results.append(
                types.SimpleNamespace(prompt_logprobs=rated, outputs=[types.SimpleNamespace(token_ids=tuple(written))])
            )
        return results


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch) -> type[Engine]:
    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = Engine, types.SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", module)
    return Engine


def test_an_engine_that_agrees_and_one_that_does_not(
    checkpoint, vllm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = str(checkpoint.parent / "tokenizer")
    asked = [str(checkpoint), "--tokenizer", tokenizer, "--prompt", "w5 w9 w11", "--prompt", "w8 w20", "--tokens", "5"]
    assert main(asked) == 0
    printed = capsys.readouterr().out
    assert printed.count("5/5") == 2
    assert "DISAGREE" not in printed
    assert [vllm.asked[key] for key in ("model", "tokenizer", "dtype")] == [str(checkpoint), tokenizer, "bfloat16"]
    assert vllm.asked["max_model_len"] == 3 + 5 + 1
    # Greedy tokens stay what they are; how likely they are does not.
    monkeypatch.setattr(vllm, "heat", 3.0)
    assert main(asked) == 1
    printed = capsys.readouterr().out
    assert printed.count("5/5") == 2
    assert printed.count("   DISAGREES") == 2


def test_what_is_compared() -> None:
    reference = Answer([5, 6, 7], [-0.5, -1.0, -2.0])
    row = compare(reference, [5, 9, 7], Opinion([-0.5, -1.25, -1.5], [-0.5, -1.0, -1.5]))
    assert row == Row(same=1, tokens=3, mean=0.25, largest=0.5, gap=0.25)
    assert row.agrees(0.25, 0.25)
    assert not row.agrees(0.24, 0.25)
    assert not row.agrees(0.25, 0.24)
    for place in range(3):
        log_probs = [-1.0] * 3
        log_probs[place] = math.nan
        row = compare(reference, [5], Opinion(log_probs, [-1.0] * 3))
        assert (row.same, row.tokens) == (1, 3)
        assert not row.agrees(math.inf, math.inf)
    with pytest.raises(ValueError, match="rated 2 tokens of an answer of 3"):
        compare(reference, [5, 6, 7], Opinion([-1.0] * 2, [-1.0] * 2))


def test_what_cannot_be_done_says_why(
    tmp_path, checkpoint, vllm, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path)]) == 2
    assert "holds no config.json" in capsys.readouterr().err
    (tmp_path / "config.json").write_text((checkpoint / "config.json").read_text())
    assert main([str(tmp_path)]) == 2
    assert "no tokenizer" in capsys.readouterr().err
    assert main([str(checkpoint), "--tokens", "0"]) == 2
    monkeypatch.setitem(sys.modules, "vllm", None)
    assert main([str(tmp_path / "none")]) == 2
    assert "run this where it is installed: pip install vllm" in capsys.readouterr().err


def test_help_needs_no_engine(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "Exit status: 0 they agree; 1 they do not" in capsys.readouterr().out
