from __future__ import annotations

import copy
import multiprocessing
import pickle

import pytest
import torch
from torch import nn

from qnoise.nn import NoisyRMSNorm
from qnoise.nn.norm import is_rms_norm
from qnoise.noise import Noise, unit_normal


def stock_norms() -> dict[str, nn.Module]:
    """One of each kind: w after a cast, w in fp32, 1 + w, torch's own, gated with two arguments."""
    from transformers.models.bamba.modeling_bamba import BambaRMSNormGated
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    norms = {
        "qwen2": Qwen2RMSNorm(64),
        "gpt_oss": GptOssRMSNorm(64),
        "gemma2": Gemma2RMSNorm(64),
        "torch": nn.RMSNorm(64),
        "gated": BambaRMSNormGated(64, 32),
    }
    generator = torch.Generator().manual_seed(0)
    for norm in norms.values():
        with torch.no_grad():
            norm.weight.add_(0.3 * torch.randn(64, generator=generator))
    return norms


KINDS = ("qwen2", "gpt_oss", "gemma2", "torch", "gated")


def noisy(stock: nn.Module, sigma: float = 0.1, name: str = "") -> NoisyRMSNorm:
    norm = NoisyRMSNorm.from_norm(stock)
    norm._qnoise.noise = Noise(sigma, seed=5, step=6)
    norm._qnoise.name = name
    return norm


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(2, 7, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_sigma_zero_is_the_stock_norm(kind, dtype, x) -> None:
    stock = stock_norms()[kind].to(dtype)
    x = x.to(dtype)
    y = noisy(stock, sigma=0.0)(x)
    assert y.dtype == stock(x).dtype
    assert torch.equal(y, stock(x))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_noise_is_that_of_a_stock_norm_with_a_noisy_weight(kind, dtype, x) -> None:
    stock = stock_norms()[kind].to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    reference = copy.deepcopy(stock).to(wide)
    with torch.no_grad():
        reference.weight.add_(0.1 * torch.from_numpy(unit_normal(5, 6, "n", (64,))))
    norm = noisy(stock, name="n")
    y = norm(x.to(dtype))
    expected = reference(x.to(dtype).to(wide)).to(dtype)
    assert y.dtype == dtype
    tolerance = {torch.bfloat16: 2**-7, torch.float32: 1e-6, torch.float64: 1e-6}[dtype]
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    assert not torch.equal(y, stock(x.to(dtype)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_noisy_weight_is_fp32(dtype) -> None:
    norm = noisy(stock_norms()["qwen2"].to(dtype), name="n")
    z = torch.from_numpy(unit_normal(5, 6, "n", (64,)))
    assert torch.equal(norm.effective_weight(), norm.weight.float() + 0.1 * z)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_small_noise_survives_bf16(kind) -> None:
    """sigma = 1e-3 on a bf16 weight near 1 would be rounded away; in fp32 it reaches the output."""
    torch.manual_seed(0)
    stock = stock_norms()[kind].to(torch.bfloat16)
    x = torch.randn(512, 64).bfloat16()
    norm = noisy(stock, sigma=1e-3, name="n")
    difference = (norm(x).double() - stock(x).double()) / stock(x).double()
    scale = stock.weight.double() + (1.0 if kind == "gemma2" else 0.0)
    z = 1e-3 * torch.from_numpy(unit_normal(5, 6, "n", (64,))).double() / scale
    assert torch.corrcoef(torch.stack([difference.mean(0), z]))[0, 1] > 0.9


def test_mixed_dtypes_keep_the_stock_output_dtype(x) -> None:
    for kind in KINDS:
        stock = stock_norms()[kind]  # fp32 weight
        norm = noisy(stock)
        for dtype in (torch.bfloat16, torch.float32):
            assert norm(x.to(dtype)).dtype == stock(x.to(dtype)).dtype, (kind, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_reaches_weight_and_input(kind, x) -> None:
    stock = stock_norms()[kind]
    norm = noisy(stock)
    x.requires_grad_()
    norm(x).square().sum().backward()
    got = norm.weight.grad, x.grad
    reference = copy.deepcopy(stock)
    reference.weight.grad = None
    with torch.no_grad():
        reference.weight.copy_(norm.effective_weight())
    z = x.detach().requires_grad_()
    reference(z).square().sum().backward()
    torch.testing.assert_close(got[0], reference.weight.grad)
    torch.testing.assert_close(got[1], z.grad)


def test_weight_outside_the_forward_is_the_clean_parameter(x) -> None:
    stock = stock_norms()["qwen2"]
    norm = noisy(stock)
    clean = norm.weight.detach().clone()
    for _ in range(3):
        norm(x)
    assert norm.weight is stock.weight
    assert torch.equal(norm.weight, clean), "noise never accumulates"
    with torch.no_grad():
        norm.weight.fill_(2.0)
    norm(x)
    assert torch.equal(norm.weight, torch.full((64,), 2.0)), "a write is not lost"
    assert list(norm.state_dict()) == ["weight"]
    assert torch.equal(norm.state_dict()["weight"], norm.weight)
    assert dict(norm.named_buffers()) == {}


def test_a_failing_forward_leaves_the_clean_weight(x) -> None:
    norm = noisy(stock_norms()["qwen2"])
    norm(x)
    with pytest.raises(RuntimeError):
        norm(x[..., :32])
    assert isinstance(norm.weight, nn.Parameter)


def test_noise_depends_on_the_phase(x) -> None:
    stock = stock_norms()["qwen2"]
    norm = noisy(stock)
    record = norm._qnoise
    for during, phase, acts in [
        (("rollout", "training"), "rollout", True),
        (("rollout", "training"), "training", True),
        (("rollout", "training"), "evaluation", False),
        (("rollout",), "training", False),
        (("rollout",), "rollout", True),
    ]:
        record.noise_during, record.phase = during, phase
        for mode in (True, False):
            norm.train(mode)  # plays no part
            assert torch.equal(norm(x), stock(x)) is not acts
        assert norm.noise_state()["active"] is acts


def _spawned(norm: nn.Module, x: torch.Tensor, queue) -> None:
    queue.put(norm(x).detach().numpy())


@pytest.mark.parametrize("kind", KINDS)
def test_pickle_and_deepcopy(kind, x) -> None:
    norm = noisy(stock_norms()[kind])
    y = norm(x)
    for twin in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert type(twin) is type(norm)
        assert torch.equal(twin(x), y)
        assert twin.weight is not norm.weight


def test_spawn(x) -> None:
    norm = noisy(stock_norms()["qwen2"])
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_spawned, args=(norm, x, queue))
    process.start()
    result = queue.get(timeout=120)
    process.join()
    assert torch.equal(torch.from_numpy(result), norm(x))


def test_to_norm(x) -> None:
    stock = stock_norms()["gemma2"]
    norm = noisy(stock)
    norm(x)
    back = norm.to_norm()
    assert type(back) is type(stock)
    assert back.weight is stock.weight
    assert back.__dict__.keys() == stock.__dict__.keys()
    assert torch.equal(back(x), stock(x))
    assert isinstance(norm, type(stock)), "isinstance checks on the stock class go on holding"


def test_what_is_an_rms_norm() -> None:
    assert all(is_rms_norm(norm) for norm in stock_norms().values())
    assert not is_rms_norm(nn.LayerNorm(4))
    assert not is_rms_norm(nn.RMSNorm(4, elementwise_affine=False))
    with pytest.raises(TypeError, match="RMSNorm with a one-dimensional weight, not LayerNorm"):
        NoisyRMSNorm.from_norm(nn.LayerNorm(4))
