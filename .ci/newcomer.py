"""What a newcomer writes in Python; `.ci/newcomer` runs it. `train`, then `check`; `readme FILE`."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
from pathlib import Path

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Trainer, TrainingArguments

import qnoise
from qnoise.integrations.transformers import NoiseCallback
from qnoise.schedules import StagedExponential

WORDS = ["the", "a", "cat", "dog", "bird", "sees", "hears", "likes", "one", "two", "three", "old", "young", "and"]


def make_model() -> None:
    """A small model of a kind that nothing here names, saved as anybody's is: config, weights, tokenizer."""
    torch.manual_seed(0)
    config = transformers.SeedOssConfig(
        vocab_size=len(WORDS) + 2, hidden_size=96, intermediate_size=224, num_hidden_layers=3,
        num_attention_heads=6, num_key_value_heads=2, head_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained("model")
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<pad>", "<end>", *WORDS])}, "<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<end>", eos_token="<end>"
    )
    wrapped.save_pretrained("model")
    lines = [" ".join(WORDS[(5 * line + 3 * word) % len(WORDS)] for word in range(8)) for line in range(32)]
    Path("texts.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def train() -> None:
    make_model()
    tokenizer = AutoTokenizer.from_pretrained("model")
    model = AutoModelForCausalLM.from_pretrained("model", dtype="auto")
    model = qnoise.patch_model(model, fmt="nvfp4", noise="rmsnorm")
    print(qnoise.summary(model))
    model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear"))
    rows = [tokenizer(line)["input_ids"] for line in Path("texts.txt").read_text(encoding="utf-8").splitlines()]
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir="run", max_steps=10, per_device_train_batch_size=8, learning_rate=1e-2, logging_steps=1,
            save_steps=10, report_to=[], use_cpu=True, seed=0,
        ),
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        callbacks=[NoiseCallback(StagedExponential(1e-2, 1e-4, num_stages=5))],
    )  # fmt: skip
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    print("loss:", losses)
    assert len(losses) == 10, "ten steps were asked for"
    assert losses[-1] < losses[0] - 0.3, "nothing was learnt"
    save_file({"logits": logits(model)}, "trained.safetensors")


def logits(model: torch.nn.Module) -> torch.Tensor:
    """Without noise and dropout, on fixed tokens."""
    ids = torch.arange(2, 14).reshape(2, 6)
    with torch.no_grad(), qnoise.quiet(model):
        return model.eval()(input_ids=ids).logits


def check() -> None:
    """What was exported is what was trained, bit for bit, in transformers and here."""
    trained = load_file("trained.safetensors")["logits"]
    served = AutoModelForCausalLM.from_pretrained("exported", dtype="auto")
    assert not torch.equal(logits(served), trained), "the adapter did nothing"
    assert torch.equal(logits(PeftModel.from_pretrained(served, "exported/adapter")), trained)
    packed = qnoise.load_packed("exported")
    assert torch.equal(logits(PeftModel.from_pretrained(packed, "exported/adapter")), trained)

    planned = AutoModelForCausalLM.from_pretrained("planned", dtype="auto")
    own = AutoModelForCausalLM.from_pretrained("model", dtype="auto")
    plan = qnoise.ScanReport.from_json(Path("scan.json").read_text(encoding="utf-8")).plan(6, ["nvfp4", None])
    assert {None} < set(plan.values()), "the plan should leave some linears as they are"
    assert torch.equal(logits(planned), logits(qnoise.patch_model(own, plan)))

    # Its inputs are quantized by compressed-tensors, in bfloat16: not the same bits as here.
    inputs_too = AutoModelForCausalLM.from_pretrained("inputs-too", dtype="auto")
    config = json.loads(Path("inputs-too", "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"]["config_groups"]["group_0"]["input_activations"] is not None
    assert logits(inputs_too).isfinite().all()

    words = AutoTokenizer.from_pretrained("exported")("the cat sees a dog")["input_ids"]
    assert words == AutoTokenizer.from_pretrained("model")("the cat sees a dog")["input_ids"]
    for name in ("report.html", "report.json", "ranking.md"):
        assert Path(name).stat().st_size > 500, name
    print("equal logits: trained, exported, loaded by transformers and packed")


def readme(path: str) -> None:
    """Its samples, in one namespace, as somebody pastes them; each prints what stands under it."""
    text = Path(path).read_text(encoding="utf-8").split("## Formats")[0]
    names: dict = {"__name__": "readme"}
    samples = re.findall(r"```python\n(.*?)```(?:\n```text\n(.*?)```)?", text, re.DOTALL)
    assert len(samples) >= 4
    for code, shown in samples:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, "README.md", "exec"), names)
        assert printed.getvalue() == shown, f"{code}\nprinted:\n{printed.getvalue()}\nand not:\n{shown}"
    print(len(samples), "samples print what stands under them")


def main() -> None:
    command, *rest = sys.argv[1:]
    {"train": train, "check": check, "readme": readme}[command](*rest)


if __name__ == "__main__":
    main()
