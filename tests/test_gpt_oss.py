"""GPT-OSS holds its experts in MXFP4 already: what it holds is what `mxfp4` makes of them, bit for bit."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, Mxfp4Config
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import qnoise
from qnoise import QuantSpec

EXPERTS, ROWS, WIDTH = 3, 24, 96


def codes_of(values: Tensor, scales_below: int) -> tuple[Tensor, Tensor]:
    """Random bytes as a checkpoint has them: blocks (EXPERTS, ROWS, WIDTH / 32, 16), and a scale for each."""
    generator = torch.Generator().manual_seed(4)
    shape = (EXPERTS, ROWS, WIDTH // 32)
    blocks = values[torch.randint(0, len(values), (*shape, 32), generator=generator)].to(torch.uint8)
    packed = blocks[..., 0::2] | blocks[..., 1::2] << 4
    return packed, torch.randint(127 - scales_below, 127, shape, generator=generator, dtype=torch.uint8)


def test_blocks_that_reach_the_top_of_the_grid_keep_codes_and_scales() -> None:
    """As the OCP rule leaves them: the largest code of a block stands for 4 or 6. -0 keeps its sign."""
    packed, scales = codes_of(torch.arange(16), 100)
    packed[..., 0] = packed[..., 0] & 0xF0 | 6  # 4.0
    weight = convert_moe_packed_tensors(packed, scales)
    assert weight.shape == (EXPERTS, WIDTH, ROWS)  # blocks run along the middle axis
    for expert in range(EXPERTS):
        quantized = qnoise.quantize(weight[expert].T, "mxfp4")
        assert torch.equal(quantized.codes, packed[expert].flatten(-2))
        assert torch.equal(quantized.scale_codes, scales[expert])
    assert torch.equal(bits(qnoise.fake_quantize(weight, "mxfp4", axis=1)), bits(weight))


@pytest.mark.parametrize("mode", ["floor", "rceil", "even", "mse"])
def test_blocks_of_any_bytes_keep_their_values(mode: str) -> None:
    """A block of small codes gets a smaller scale and larger codes for the same values."""
    packed, scales = codes_of(torch.tensor([0, 1, 2, 3, 5, 8, 9, 12, 13]), 100)
    weight = convert_moe_packed_tensors(packed, scales)
    assert torch.equal(bits(qnoise.fake_quantize(weight, QuantSpec("mxfp4", mode), axis=1)), bits(weight))
    assert not torch.equal(qnoise.quantize(weight[0].T, "mxfp4").scale_codes, scales[0])


def bits(weight: Tensor) -> Tensor:
    return weight.view(torch.int16)


def test_a_checkpoint_is_itself_when_it_is_patched(tmp_path) -> None:
    config = AutoConfig.for_model(
        "gpt_oss",
        vocab_size=99,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["full_attention", "sliding_attention"],
        pad_token_id=0,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    # Its experts again, as OpenAI stores them: gate_up_proj (experts, in, out) in blocks along `in`.
    tensors = load_file(tmp_path / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        quantized = [qnoise.quantize(matrix.T.contiguous(), "mxfp4") for matrix in tensors.pop(name)]
        tensors[f"{name}_scales"] = torch.stack([each.scale_codes for each in quantized])
        tensors[f"{name}_blocks"] = torch.stack([each.codes.unflatten(-1, (-1, 16)) for each in quantized])
    assert sum("_blocks" in name for name in tensors) == 4
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]}
    (tmp_path / "config.json").write_text(json.dumps(settings))

    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.bfloat16, quantization_config=Mxfp4Config(dequantize=True)
    ).eval()
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        want = model(ids).logits
        qnoise.patch_model(model, "mxfp4", include=["*experts"])
        experts = model.model.layers[1].mlp.experts
        for name in ("gate_up_proj", "down_proj"):
            assert torch.equal(bits(experts.effective_weight(name)), bits(experts._parameters[name]))
        assert torch.equal(model(ids).logits, want)
