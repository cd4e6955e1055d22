"""`calibrate_activations`: the largest |input| of each linear, as `act_amax` takes it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import qnoise
from qnoise import PatchConfig, QuantSpec
from qnoise.rotation import hadamard
from tests.tiny_models import tiny_model, with_lora

LAYER = "model.layers.1"


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(3, 99, (4, 9), generator=torch.Generator().manual_seed(3))


def largest_inputs(model: nn.Module, batches: list[dict], names: dict[str, str]) -> dict[str, float]:
    """max |input| over the tokens that are no padding, seen without the code under test; `names`: key -> path."""
    largest = dict.fromkeys(names, 0.0)
    for batch in batches:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        for key, path in names.items():
            seen: list[Tensor] = []
            handle = model.get_submodule(path).register_forward_pre_hook(
                lambda _, args, seen=seen: seen.append(args[0])
            )
            with torch.no_grad():
                model(**batch)
            handle.remove()
            largest[key] = max(largest[key], seen[0][mask].abs().max().item())
    return largest


def test_the_largest_input_of_each_linear_without_padding(ids) -> None:
    model = tiny_model()
    with torch.no_grad():
        # The padding token's norm gives 8 in one channel: it decides the scales if it counts.
        model.model.embed_tokens.weight[0] = 100 * torch.eye(64)[5]
    mask = torch.ones_like(ids)
    mask[1, 5:] = mask[3, 2:] = 0
    batches = [{"input_ids": ids[:2]}, {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}]
    model.train()
    amaxes = qnoise.calibrate_activations(model, iter(batches))
    assert model.training
    assert not any(m._forward_pre_hooks for m in model.modules())
    model.eval()
    names = [f"{name}.{leaf}" for name in ("model.layers.0", LAYER) for leaf in ("self_attn.q_proj", "mlp.down_proj")]
    wanted = largest_inputs(model, batches, {name: name for name in names})
    assert {name: amaxes[name] for name in names} == wanted
    assert len(amaxes) == 14  # not the head
    assert len({amaxes[f"{LAYER}.self_attn.{leaf}_proj"] for leaf in "qkv"}) == 1
    counted = qnoise.calibrate_activations(model, [{"input_ids": batch["input_ids"]} for batch in batches])
    assert counted["model.layers.0.self_attn.q_proj"] == pytest.approx(8, abs=0.01)
    assert amaxes["model.layers.0.self_attn.q_proj"] < 5
    # What it gives is what a patch takes.
    qnoise.patch_model(model, config=PatchConfig("nvfp4", act_fmt="nvfp4", act_amax=amaxes))
    for module in model.modules():
        if isinstance(module, qnoise.FakeQuantLinear):
            assert module._qnoise.act_amax == amaxes[module._qnoise.name]


def test_patched_and_wrapped_models_are_measured_as_they_run(ids) -> None:
    model = with_lora(qnoise.patch_model(tiny_model(), "nvfp4", noise="rmsnorm"))
    qnoise.NoiseScheduler(model, qnoise.schedules.Constant(0.5), 1).step()
    amaxes = qnoise.calibrate_activations(model, ids)
    leaf = f"{LAYER}.mlp.down_proj"
    path = {leaf: f"base_model.model.{leaf}.base_layer"}
    with qnoise.quiet(model):
        assert {leaf: amaxes[leaf]} == largest_inputs(model, [{"input_ids": ids}], path)
    assert amaxes[leaf] != largest_inputs(model, [{"input_ids": ids}], path)[leaf]
    assert amaxes[leaf] != qnoise.calibrate_activations(tiny_model(), ids)[leaf]
    assert not any("lora" in name or "base" in name for name in amaxes)


def test_the_config_says_which_linears_and_in_which_basis(ids) -> None:
    model = tiny_model()
    rotated = PatchConfig("nvfp4", QuantSpec("nvfp4", "mse", rotation="hadamard"), include=("*.down_proj", "lm_head"))
    amaxes = qnoise.calibrate_activations(model, ids, rotated)
    assert list(amaxes) == ["lm_head", "model.layers.0.mlp.down_proj", f"{LAYER}.mlp.down_proj"]
    seen = []
    model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(ids)
    turned = hadamard(seen[0].unflatten(-1, (-1, 16)).float())
    assert amaxes["lm_head"] == pytest.approx(turned.abs().max().item(), rel=1e-6)
    assert amaxes["lm_head"] != qnoise.calibrate_activations(model, ids, PatchConfig(include=("lm_head",)))["lm_head"]


class Mixture(nn.Module):
    """Flattens its tokens, as mixtures of experts do, and sends them all to the first expert."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)])
        # A name that is also a glob for every `up` below it.
        self.inner = nn.ModuleDict({"up": nn.Linear(64, 64)})
        self.up = nn.Linear(64, 64)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, other: bool = True) -> Tensor:
        rows = self.inner["up"](3 * self.up(x).flatten(0, -2))
        return self.experts[0](rows) + (self.experts[1](rows[:1]) if other else 0)


def test_flattened_tokens_and_names_that_end_alike() -> None:
    model = Mixture()
    x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(5))
    x[1, 1:] *= 1000
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    amaxes = qnoise.calibrate_activations(model, {"x": x, "attention_mask": mask})
    with torch.no_grad():
        rows = 3 * model.up(x)[mask.bool()]
    assert amaxes["up"] == x[mask.bool()].abs().max().item()
    assert amaxes["inner.up"] == pytest.approx(rows.abs().max().item(), rel=1e-5)
    config = PatchConfig("nvfp4", "nvfp4", act_amax=amaxes)
    assert {name: config.static_amax(name) for name in amaxes} == amaxes


def test_what_fixes_no_scale_is_named() -> None:
    model, x = Mixture(), torch.randn(2, 3, 64)
    with pytest.raises(ValueError, match=r"experts.1 got no input on the calibration data"):
        qnoise.calibrate_activations(model, {"x": x, "other": False})
    assert not model.experts[1]._forward_pre_hooks
    with pytest.raises(ValueError, match="up: NaN or Inf in its input"):
        qnoise.calibrate_activations(model, [{"x": x}, {"x": x.masked_fill(x > 1, torch.nan)}, {"x": x}])
    with pytest.raises(ValueError, match="up: its input was zero throughout"):
        qnoise.calibrate_activations(model, {"x": torch.zeros_like(x)})
    with pytest.raises(ValueError, match="holds no batch"):
        qnoise.calibrate_activations(model, [])
    with pytest.raises(ValueError, match="no linear that would quantize its input"):
        qnoise.calibrate_activations(nn.Sequential(nn.ReLU()), x)
