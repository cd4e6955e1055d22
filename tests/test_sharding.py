"""Divided weights in one process: what is seen of writes to a shard, and what is refused by name."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import qnoise
from qnoise.schedules import Constant


@pytest.fixture(scope="module", autouse=True)
def one_process(tmp_path_factory):
    """A process group of this process alone."""
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path_factory.mktemp('group') / 'meet'}", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


class Attention(nn.Module):
    """Siblings that share a per-tensor scale."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(64, 64) for _ in range(3))
        self.norm = nn.RMSNorm(64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(x)
        return self.q_proj(x) + 2 * self.k_proj(x) + 3 * self.v_proj(x)


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("storage", ["auto", "cached", "dynamic"])
def test_writes_to_a_shard_are_seen(storage: str, trained: bool, apart: bool, x: torch.Tensor) -> None:
    """Weights are gathered into the same memory again and again, and torch's version counter stands still."""
    sharded, plain = (
        qnoise.patch_model(Attention().requires_grad_(trained), "nvfp4", storage=storage) for _ in range(2)
    )
    for module in [sharded.q_proj, sharded.k_proj, sharded.v_proj] if apart else []:
        fully_shard(module)
    fully_shard(sharded, reshard_after_forward=True)
    for k in range(4):
        with torch.no_grad():
            assert torch.equal(sharded(x), plain(x))
        if trained:
            assert torch.equal(sharded(x), plain(x))
        sharded.reshard()
        for model in (sharded, plain):
            with torch.no_grad():
                # The largest of the siblings, on which the scale of all depends, is another one each time.
                for place, module in enumerate((model.q_proj, model.k_proj, model.v_proj)):
                    module._parameters["weight"].mul_(2.5 if k % 3 == place else 0.7)


def test_hidden_writes_to_a_shard_are_seen(x: torch.Tensor) -> None:
    """As for other weights: of one that was handed out, nothing is taken for granted."""
    sharded, plain = (qnoise.patch_model(Attention().requires_grad_(False), "nvfp4") for _ in range(2))
    fully_shard(sharded)
    for name in ("q_proj", "k_proj", "v_proj"):
        assert torch.equal(sharded(x), plain(x))
        sharded.reshard()
        sharded.get_submodule(name).weight.to_local().data.mul_(5.0)
        plain.get_submodule(name).weight.data.mul_(5.0)
    assert torch.equal(sharded(x), plain(x))


def test_nothing_is_kept_beside_the_shards(x: torch.Tensor) -> None:
    """Each rank would have the whole model quantized, else."""
    model = qnoise.patch_model(Attention().requires_grad_(False), "nvfp4", storage="cached")
    fully_shard(model)
    model(x)
    model.unshard()
    weight = model.q_proj._parameters["weight"]
    assert type(weight) is nn.Parameter
    assert qnoise.nn.weight_cache.cached_nbytes(weight) == 0


def test_sharded_first_is_refused_by_name() -> None:
    model = Attention()
    fully_shard(model)
    stock = {type(m) for m in model.modules()}
    with pytest.raises(
        ValueError, match=r"q_proj\.weight is sharded already \(DTensor\).*patch_model -> PEFT -> fully"
    ):
        qnoise.patch_model(model, noise="rmsnorm")
    assert {type(m) for m in model.modules()} == stock


def test_patching_again_after_sharding_does_nothing(x: torch.Tensor) -> None:
    model = qnoise.patch_model(Attention(), "nvfp4")
    expected = model(x)
    fully_shard(model)
    assert torch.equal(qnoise.patch_model(model, "nvfp4")(x), expected)


def test_a_shard_is_never_taken_for_the_weight(x: torch.Tensor) -> None:
    model = qnoise.patch_model(Attention(), "nvfp4")
    expected = model.q_proj.effective_weight()
    fully_shard(model)
    with pytest.raises(ValueError, match=r"q_proj\.weight is sharded \(DTensor\) here.*call unshard\(\)"):
        model.q_proj.effective_weight()
    model.unshard()
    assert torch.equal(model.q_proj.effective_weight(), expected)


def test_tensor_parallelism_is_refused_by_name(x: torch.Tensor) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh, plan = init_device_mesh("cpu", (1,)), {"q_proj": ColwiseParallel()}
    model = parallelize_module(Attention(), mesh, plan)
    with pytest.raises(ValueError, match=r"q_proj\.weight is sharded already.*Tensor parallelism is not supported"):
        qnoise.patch_model(model)
    model = parallelize_module(qnoise.patch_model(Attention()), mesh, plan)
    with pytest.raises(ValueError, match=r"q_proj\.weight is sharded.*Tensor parallelism is not supported"):
        model(x)


@pytest.mark.parametrize("original", [True, False])
@pytest.mark.parametrize("noise", [None, "rmsnorm"])
def test_flat_parameters_are_refused_by_name(original: bool, noise: str | None) -> None:
    def flat(model: nn.Module) -> nn.Module:
        return FullyShardedDataParallel(model, use_orig_params=original, device_id=torch.device("cpu"))

    with pytest.raises(ValueError, match=r"the model is a FullyShardedDataParallel \(FSDP1\).*fully_shard"):
        qnoise.patch_model(flat(Attention()), noise=noise)
    with pytest.raises(TypeError, match=r"\w\.weight is set to a tensor that is no parameter.*fully_shard"):
        flat(qnoise.patch_model(Attention(), None if noise else "mxfp4", noise=noise))


def test_partitioned_parameters_are_refused_by_name(x: torch.Tensor) -> None:
    """What DeepSpeed ZeRO-3 makes of a parameter: an empty one, with an id; and what it gathers keeps the id."""
    model = Attention()
    weight = model.k_proj.weight
    whole, weight.ds_id = weight.data, 3
    weight.data = torch.empty(0)
    with pytest.raises(ValueError, match=r"k_proj\.weight is partitioned by DeepSpeed ZeRO-3.*fully_shard"):
        qnoise.patch_model(model)
    model = qnoise.patch_model(Attention())
    model(x)
    model.k_proj._parameters["weight"].ds_id = 3
    model.k_proj._parameters["weight"].data = whole.clone()
    with pytest.raises(ValueError, match=r"k_proj\.weight is partitioned by DeepSpeed ZeRO-3.*fully_shard"):
        model(x)


def test_noise_on_a_sharded_norm(x: torch.Tensor) -> None:
    sharded, plain = (qnoise.patch_model(Attention(), None, noise="rmsnorm") for _ in range(2))
    fully_shard(sharded)
    for model in (sharded, plain):
        scheduler = qnoise.NoiseScheduler(model, Constant(0.2), 3)
        scheduler.step()
    assert torch.equal(sharded(x), plain(x))
    for model in (sharded, plain):
        model(x).square().sum().backward()
    assert torch.equal(sharded.norm.weight.grad.full_tensor(), plain.norm.weight.grad)
