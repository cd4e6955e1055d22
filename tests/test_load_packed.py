"""`load_packed`: an exported checkpoint as packed linears, to train an adapter on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import qnoise
from qnoise.integrations.export import export
from qnoise.integrations.load_packed import load_packed
from qnoise.nn.packed import PackedLinear
from tests.test_export import stock
from tests.tiny_models import tiny_model

pytest.importorskip("compressed_tensors")
IDS = torch.randint(3, 99, (2, 12), generator=torch.Generator().manual_seed(3))
STEPS = 6


def adapted(path: Path):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(7)
    return get_peft_model(load_packed(path), LoraConfig(r=4, target_modules="all-linear"))


def train(model, optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def adamw(model) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def test_an_adapter_is_trained_on_it_saved_and_resumed(tmp_path) -> None:
    """The losses are those of training on the patched model it was made of, and those of a run that was resumed too."""
    from peft import LoraConfig, PeftModel, get_peft_model

    patched = qnoise.patch_model(stock(), fmt="nvfp4")
    export(patched, tmp_path / "x")
    torch.manual_seed(7)
    reference = get_peft_model(patched, LoraConfig(r=4, target_modules="all-linear"))
    want = train(reference, adamw(reference), STEPS)
    assert want[-1] < want[0] - 0.05

    model = adapted(tmp_path / "x")
    optimizer = adamw(model)
    losses = train(model, optimizer, 3)
    model.save_pretrained(tmp_path / "run")
    torch.save(optimizer.state_dict(), tmp_path / "run" / "optimizer.pt")
    assert not any("codes" in name for name in torch.load(tmp_path / "run" / "optimizer.pt"))
    assert (tmp_path / "run" / "adapter_model.safetensors").stat().st_size < 200_000
    model = PeftModel.from_pretrained(load_packed(tmp_path / "x"), tmp_path / "run", is_trainable=True)
    optimizer = adamw(model)
    optimizer.load_state_dict(torch.load(tmp_path / "run" / "optimizer.pt"))
    assert losses + train(model, optimizer, STEPS - 3) == want
    assert sum(isinstance(m, PackedLinear) for m in model.modules()) == 14


def test_it_is_of_the_class_that_was_exported(tmp_path) -> None:
    config = tiny_model("qwen2").config
    config.num_labels = 5
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)
    qnoise.patch_model(model, "mxfp4", exclude=["score"])
    assert export(model, tmp_path / "x").ignored == ("score",)
    packed = load_packed(tmp_path / "x")
    assert type(packed) is type(model)
    assert torch.equal(packed(IDS).logits, model(IDS).logits)


def test_a_damaged_checkpoint_is_named(tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    export(qnoise.patch_model(stock(), fmt="mxfp4"), tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    whole, lost = dict(tensors), dict(tensors)
    del lost["model.layers.0.mlp.up_proj.weight_scale"]
    save_file(lost, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks codes or scales of model.layers.0.mlp.up_proj"):
        load_packed(tmp_path)
    save_file({**tensors, "other.weight": torch.zeros(1)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"has 'other.weight', for which Qwen2ForCausalLM has no place"):
        load_packed(tmp_path)
    del tensors["model.norm.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"has no tensor 'model.norm.weight'"):
        load_packed(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../other.safetensors"}}))
    with pytest.raises(FileNotFoundError, match="not complete"):
        load_packed(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    save_file({**whole, "model.layers.0.mlp.up_proj.weight_scale": torch.zeros(3, 2, dtype=torch.uint8)}, file)
    with pytest.raises(
        ValueError, match=r"up_proj: the checkpoint has codes of shape \(96, 32\) and scales of \(3, 2\)"
    ):
        load_packed(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    for change, message in [
        ({"architectures": ["OtherForCausalLM"]}, "is of OtherForCausalLM, which transformers"),
        ({"quantization_config": None}, "load_packed reads what qnoise.export wrote"),
        ({"quantization_config": {"quant_method": "fp8"}}, "has method 'fp8'"),
    ]:
        (tmp_path / "config.json").write_text(json.dumps({**settings, **change}))
        with pytest.raises(ValueError, match=message):
            load_packed(tmp_path)


SIZED = """
import sys, torch, qnoise
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

def memory():
    return {line.split(":")[0]: int(line.split()[1]) * 1024 for line in open("/proc/self/status") if "kB" in line}

def forward(model):
    return model(torch.tensor([[1, 2, 3]])).logits

sizes = dict(vocab_size=256, num_attention_heads=8, num_key_value_heads=8, tie_word_embeddings=False)
def build(**more):
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **sizes, **more), dtype=torch.bfloat16)
    return model.eval().requires_grad_(False)

if sys.argv[1] == "write":
    model = build(hidden_size=1024, intermediate_size=4096, num_hidden_layers=14)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.linspace(-0.02, 0.03, parameter.shape[-1]))
    qnoise.export(qnoise.patch_model(model, "nvfp4", storage="packed"), sys.argv[2])
else:
    # Everything that is imported or set up at first use is there before the count begins.
    small = build(hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    forward(qnoise.patch_model(small, "nvfp4", storage="packed"))
    from accelerate import init_empty_weights
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    before = memory()["VmRSS"]
    model = qnoise.load_packed(sys.argv[2])
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.float().sum() if tensor.numel() < 1e6 else tensor.view(torch.uint8).max()  # read from the file
    loaded = memory()["VmHWM"] - before
    forward(model)
    tensors = [*model.parameters(), *model.buffers()]
    print(loaded, memory()["VmHWM"] - before, sum(tensor.nbytes for tensor in tensors))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak memory from Linux's /proc")
def test_peak_memory_is_that_of_the_packed_weights(tmp_path) -> None:
    """133 MB packed, 470 MB in bfloat16: loaded, all of it read, and used in a forward."""
    arguments = [sys.executable, "-c", SIZED]
    subprocess.run([*arguments, "write", str(tmp_path / "x")], check=True, cwd=Path(__file__).parents[1])
    done = subprocess.run(
        [*arguments, "read", str(tmp_path / "x")],
        check=True,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    loading, forward, packed = map(int, done.stdout.split())
    layer = 2 * (4 * 1024 * 1024 + 3 * 1024 * 4096)  # bytes in bfloat16
    assert packed > 120e6
    assert packed < loading < 1.3 * packed + layer
    assert forward < 1.3 * packed + layer
