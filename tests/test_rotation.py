"""The Hadamard rotation: the transform itself, and quantization in the rotated basis through every door."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import qnoise
from qnoise import QuantSpec, fake_quantize, quantize, reference
from qnoise.functional import rotate
from qnoise.rotation import hadamard
from test_chunked import same

SPECS = [
    QuantSpec("mxfp4", rotation="hadamard"),
    QuantSpec("nvfp4", "four_over_six", rotation="hadamard"),
    QuantSpec("mxint8", "even", rotation="hadamard"),
]


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def butterfly(row, stages=None):
    """The definition, one fp32 operation at a time."""
    row = [np.float32(v) for v in row]
    for half in stages or [2**k for k in range(len(row).bit_length() - 1)]:
        for i in range(len(row)):
            if not i & half:
                a, b = row[i], row[i + half]
                row[i], row[i + half] = a + b, a - b
    root = np.float32(1 / np.sqrt(len(row)))
    return np.array([v * root for v in row], np.float32)


@pytest.mark.parametrize("size", [4, 16, 32, 128])
def test_the_order_of_operations(size):
    """Magnitudes over many binades, so that another order of the sums rounds otherwise."""
    x = normal(20, size) * 2.0 ** torch.randint(-12, 12, (20, size), generator=torch.Generator().manual_seed(1))
    want = np.stack([butterfly(row) for row in x.numpy()])
    assert torch.equal(hadamard(x), torch.from_numpy(want))
    backwards = [2**k for k in reversed(range(size.bit_length() - 1))]
    assert not np.array_equal(np.stack([butterfly(row, backwards) for row in x.numpy()]), want), (
        "the test sees no order"
    )


@pytest.mark.parametrize("size", [16, 32])
def test_it_is_sylvesters_matrix_and_its_own_inverse(size):
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), matrix)
    assert torch.equal(hadamard(torch.eye(size)), matrix / matrix.new_tensor(size).sqrt())
    x = normal(50, size)
    torch.testing.assert_close(hadamard(hadamard(x)), x, rtol=0, atol=2e-6)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_quantizes_in_the_rotated_basis_and_returns_to_the_first(spec, dtype):
    """Q of the rotated blocks in fp32, the tail with its padding, rotated back, one cast."""
    x = normal(5, 70).to(dtype)
    size = spec.block_format.block_size
    padded = torch.nn.functional.pad(x.float(), (0, -70 % size))
    turned = hadamard(padded.unflatten(-1, (-1, size))).flatten(-2)
    plain = QuantSpec(spec.fmt, spec.scale_mode)
    want = hadamard(fake_quantize(turned, plain).unflatten(-1, (-1, size))).flatten(-2)[:, :70].to(dtype)
    assert torch.equal(fake_quantize(x, spec), want)
    assert torch.equal(rotate(x, spec), turned)
    assert torch.equal(rotate(x.T, spec, axis=0), turned)
    assert torch.equal(quantize(x, spec).codes, quantize(turned, plain).codes)
    assert torch.equal(quantize(x, spec).dequantize(), want)
    assert torch.equal(reference.dequantize(quantize(x, spec), dtype), want)
    assert not torch.equal(fake_quantize(x, spec), fake_quantize(x, plain))


def test_special_values_stay_in_their_block():
    x = normal(4, 96)
    x[0, :32] = 0
    x[1, 40], x[2, 70], x[3, 0] = torch.nan, -torch.inf, 3e36
    for spec in SPECS:
        size = spec.block_format.block_size
        y, codes = fake_quantize(x, spec), quantize(x, spec)
        bad = torch.zeros(4, 96 // size, dtype=torch.bool)
        bad[1, 40 // size] = bad[2, 70 // size] = True
        assert torch.equal(y.unflatten(-1, (-1, size)).isnan().all(-1), bad)
        assert torch.equal(y.isnan().unflatten(-1, (-1, size)).any(-1), bad)
        assert not y[0, :32].any()
        assert same(codes.dequantize(), y)
    sums_overflow = torch.full((1, 32), 3e38)
    assert not fake_quantize(sums_overflow, SPECS[0]).isfinite().any()


def test_the_per_tensor_scale_is_that_of_the_rotated_tensor():
    x, spec = normal(6, 64), QuantSpec("nvfp4", rotation="hadamard")
    x[2, 5] = 40.0  # the rotated maximum is another number than the maximum
    amax = rotate(x, spec).abs().amax()
    assert amax != x.abs().amax()
    assert reference.amax_of(x, spec) == amax
    assert torch.equal(fake_quantize(x, spec), fake_quantize(x, spec, amax=amax))
    assert quantize(x, spec).per_tensor_scale == torch.tensor(2688.0) / amax
    per_row = rotate(x, spec).abs().amax(-1, keepdim=True)
    rows = torch.stack([fake_quantize(row, spec) for row in x])
    assert torch.equal(fake_quantize(x, spec, amax=per_row), rows)


def test_a_patched_model_shares_the_rotated_maximum_and_keeps_tokens_apart():
    torch.manual_seed(0)
    spec = QuantSpec("nvfp4", "mse", rotation="hadamard")

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(64, 32, bias=False) for _ in range(3))

        def forward(self, x):
            return self.q_proj(x) + self.k_proj(x) * self.v_proj(x)

    model = Attention().requires_grad_(False)
    model.q_proj.weight[3, 7] = 2.0
    stock = [p.detach().clone() for p in model.parameters()]
    weights = {name: module.weight.detach().clone() for name, module in model.named_children()}
    joint = torch.stack([rotate(w, spec).abs().amax() for w in weights.values()]).amax()
    qnoise.patch_model(model, spec, act_fmt=spec)
    for name, module in model.named_children():
        assert torch.equal(module.effective_weight(), fake_quantize(weights[name], spec, amax=joint)), name
    x = normal(2, 5, 64, seed=3)
    x[1] *= 50  # another sequence, whose amax must not reach the first
    alone = torch.cat([model(x[:1, i : i + 1]) for i in range(5)], 1)
    torch.testing.assert_close(model(x)[:1], alone, rtol=1e-5, atol=1e-5)
    q = fake_quantize(x, spec, amax=rotate(x, spec).abs().amax(-1, keepdim=True))
    w = [fake_quantize(weight, spec, amax=joint) for weight in weights.values()]
    torch.testing.assert_close(model(x), q @ w[0].T + (q @ w[1].T) * (q @ w[2].T), rtol=1e-5, atol=1e-5)
    assert qnoise.summary(model).bits_per_weight == 4.5
    qnoise.unpatch_model(model)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), stock, strict=True))


def test_packed_storage_of_a_rotated_weight_and_what_it_refuses():
    torch.manual_seed(0)
    x = normal(3, 64)
    models = {}
    for fmt in (QuantSpec("nvfp4", "mse", rotation="hadamard"), "nvfp4"):
        linear = nn.Sequential(nn.Linear(64, 32)).requires_grad_(False)
        want = qnoise.patch_model(linear, fmt)(x)
        qnoise.unpatch_model(linear)
        models[fmt] = qnoise.patch_model(linear, fmt, storage="packed")
        assert torch.equal(linear(x), want)
    rotated, plain = models.values()
    with pytest.raises(
        RuntimeError, match=r"weight_codes are 'nvfp4\+hadamard' and the linear was patched with 'nvfp4'"
    ):
        plain.load_state_dict(rotated.state_dict())
    other = nn.Sequential(nn.Linear(64, 32)).requires_grad_(False)
    with pytest.raises(ValueError, match=r"0: mxfp4 \(residual=0.5\) cannot be stored packed"):
        qnoise.patch_model(other, QuantSpec("mxfp4", residual=0.5), storage="packed")


def test_it_warns_once_where_a_rotation_hurts_and_it_hurts_there():
    """NVFP4's fine scales isolate outliers; spread over the block these cost accuracy, unless scales are searched."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(128, 512, generator=generator)
    tails = torch.where(torch.rand(x.shape, generator=generator) < 0.002, 30 * x, x)

    def gain(fmt, mode):
        errors = [
            (fake_quantize(tails, QuantSpec(fmt, mode, rotation=r)) - tails).square().sum() for r in (None, "hadamard")
        ]
        return 10 * torch.log10(errors[0] / errors[1]).item()

    assert gain("nvfp4", "two_level") < -1
    assert gain("nvfp4", "mse") > -0.3
    assert gain("mxfp4", "even") > 2

    def patched(fmt, **given):
        return qnoise.patch_model(nn.Sequential(nn.Linear(64, 32)), fmt, **given)

    hurt = QuantSpec("nvfp4", rotation="hadamard")
    plan = {"*": "mxfp4", "0": hurt}
    with pytest.warns(UserWarning, match=r"nvfp4 \(hadamard\).*use scale_mode='mse'") as seen:
        qnoise.patch_model(patched(plan), plan)
    assert len(seen) == 1
    assert seen[0].filename == __file__
    with pytest.warns(UserWarning, match="rotation"):
        patched("mxfp4", act_fmt=hurt)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        patched(QuantSpec("nvfp4", "mse", rotation="hadamard"))
        patched(QuantSpec("mxfp4", rotation="hadamard"), act_fmt="nvfp4")
