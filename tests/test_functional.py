"""The public door: arguments, gradients, generators, dtypes, outputs, errors."""

import pytest
import torch

from qnoise.formats import FORMATS, QuantSpec
from qnoise.functional import fake_quantize, quantize
from qnoise.philox import seed_from, uniform


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_names_and_specs_mean_the_same():
    x = normal(4, 64)
    for fmt, block in FORMATS.items():
        for mode in block.scale_modes:
            want = fake_quantize(x, QuantSpec(fmt, mode))
            assert torch.equal(fake_quantize(x, fmt, mode), want)
            assert torch.equal(fake_quantize(x, fmt, scale_mode=mode, rounding="even"), want)
        assert torch.equal(fake_quantize(x, fmt), fake_quantize(x, fmt, block.scale_modes[0]))


def test_an_argument_that_agrees_with_the_spec_is_allowed_and_one_that_contradicts_is_not():
    x, spec = normal(2, 32), QuantSpec("mxfp4", "even", "half_away")
    want = fake_quantize(x, spec)
    assert torch.equal(fake_quantize(x, spec, "even", rounding="half_away"), want)
    with pytest.raises(ValueError, match="scale_mode='floor' contradicts.*scale_mode='even'"):
        fake_quantize(x, spec, "floor")
    with pytest.raises(ValueError, match="rounding='nearest' contradicts.*rounding='half_away'"):
        quantize(x, spec, rounding="even")


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_float_dtype_is_computed_in_fp32_and_cast_once(fmt, dtype):
    x = normal(3, 70, dtype=torch.float64).to(dtype)
    y = fake_quantize(x, fmt)
    assert (y.dtype, y.shape, y.device) == (dtype, x.shape, x.device)
    assert torch.equal(y, fake_quantize(x.float(), fmt).to(dtype))
    assert not torch.equal(y, x)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (0, 5), (1,), (2, 3, 40), (1, 1, 1, 1, 33)])
def test_shapes(shape):
    x = normal(*shape)
    for fmt in FORMATS:
        y = fake_quantize(x, fmt)
        assert y.shape == x.shape
        assert quantize(x, fmt).dequantize().shape == x.shape
        if x.numel() == 1:
            # A power of two is on every grid (NVFP4: its own amax, code 6, up to the rounding of the scale).
            torch.testing.assert_close(fake_quantize(torch.ones(shape), fmt), torch.ones(shape), rtol=2e-7, atol=0)


def test_the_input_is_not_changed_and_the_result_does_not_alias_it():
    x = normal(4, 32)
    before = x.clone()
    y = fake_quantize(fake_quantize(x, "mxfp4"), "mxfp4")
    assert torch.equal(x, before)
    fixed = fake_quantize(y, "mxfp4")
    assert torch.equal(fixed, y)
    assert fixed.data_ptr() != y.data_ptr()


def test_the_gradient_is_that_of_the_identity():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = normal(3, 40, dtype=dtype).requires_grad_()
        grad = normal(3, 40, seed=1, dtype=dtype)
        for spec in ("nvfp4", QuantSpec("nvfp4", rotation="hadamard", residual=0.5)):
            y = fake_quantize(x, spec, amax=4.0)
            assert y.requires_grad
            x.grad = None
            y.backward(grad)
            assert torch.equal(x.grad, grad)


def test_the_gradient_function_saves_nothing():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = fake_quantize(normal(64, 64).requires_grad_(), "mxfp4")
    assert not saved
    assert y.grad_fn.saved_tensors == ()


def test_no_graph_without_need():
    assert not fake_quantize(normal(2, 32), "mxfp4").requires_grad
    with torch.no_grad():
        assert not fake_quantize(normal(2, 32).requires_grad_(), "mxfp4").requires_grad
    q = quantize(normal(2, 32).requires_grad_(), "mxfp4")
    assert not q.dequantize().requires_grad


def test_no_gradient_reaches_amax():
    x = normal(2, 32).requires_grad_()
    amax = x.abs().amax()
    fake_quantize(x, "nvfp4", amax=amax).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_torch_func_grad():
    x = normal(2, 32)
    grad = torch.func.grad(lambda t: (3 * fake_quantize(t, "mxfp4")).sum())(x)
    assert torch.equal(grad, torch.full_like(x, 3))


def test_amax_fixes_the_per_tensor_scale():
    x = normal(6, 5, 48)
    assert torch.equal(fake_quantize(x, "nvfp4", amax=x.abs().amax()), fake_quantize(x, "nvfp4"))
    assert torch.equal(fake_quantize(x, "nvfp4", amax=4.0), fake_quantize(x, "nvfp4", amax=torch.tensor(4.0)))
    assert not torch.equal(fake_quantize(x, "nvfp4", amax=4.1), fake_quantize(x, "nvfp4", amax=4.0))
    per_token = x.abs().amax(-1, keepdim=True)
    tokens = [fake_quantize(token, "nvfp4") for token in x.reshape(-1, 48)]
    y = fake_quantize(x, "nvfp4", amax=per_token)
    assert torch.equal(y.reshape(-1, 48), torch.stack(tokens))
    q = quantize(x, "nvfp4", amax=per_token)
    assert q.per_tensor_scale.shape == (6, 5, 1)
    assert torch.equal(q.dequantize(), y)
    # Broadcast over the leading axis, and for another block axis.
    shared = x.abs().amax((0, 2), keepdim=True)
    assert torch.equal(
        fake_quantize(x, "nvfp4", amax=shared[0]), fake_quantize(x, "nvfp4", amax=shared.expand(6, 5, 1))
    )
    columns = x.abs().amax(1, keepdim=True)
    turned = fake_quantize(x.movedim(1, -1), "nvfp4", amax=columns.movedim(1, -1)).movedim(-1, 1)
    assert torch.equal(fake_quantize(x, "nvfp4", axis=1, amax=columns), turned)


@pytest.mark.parametrize("fmt", ["mxfp4", QuantSpec("nvfp4", "single_level")])
def test_amax_without_a_per_tensor_scale_is_an_error(fmt):
    with pytest.raises(ValueError, match="no per-tensor scale"):
        fake_quantize(normal(2, 32), fmt, amax=1.0)


@pytest.mark.parametrize("shape", [(4, 64), (64,), (3, 1), (2, 4, 1)])
def test_amax_of_a_wrong_shape_is_an_error(shape):
    with pytest.raises(ValueError, match=r"does not broadcast to \(4, 1\)"):
        fake_quantize(normal(4, 64), "nvfp4", amax=torch.ones(shape))


def test_out():
    x = normal(4, 40)
    out = torch.empty_like(x)
    assert fake_quantize(x, "nvfp4", out=out) is out
    assert torch.equal(out, fake_quantize(x, "nvfp4"))
    want = fake_quantize(x, "mxfp4", axis=0)
    transposed = torch.empty(40, 4).T
    assert torch.equal(fake_quantize(x, "mxfp4", axis=0, out=transposed), want)
    assert torch.equal(fake_quantize(x, "mxfp4", axis=0, out=x), want)
    assert torch.equal(x, want)


@pytest.mark.parametrize(
    ("out", "message"),
    [
        (torch.empty(4, 32), r"shape \(4, 32\)"),
        (torch.empty(4, 40, dtype=torch.bfloat16), "dtype torch.bfloat16"),
        (torch.empty(4, 40, device="meta"), "device meta"),
    ],
)
def test_an_out_that_does_not_fit_is_an_error(out, message):
    with pytest.raises(ValueError, match=f"out has {message}"):
        fake_quantize(normal(4, 40), "mxfp4", out=out)


def test_out_records_no_gradient():
    x = normal(2, 32).requires_grad_()
    with pytest.raises(ValueError, match="out= cannot record gradients"):
        fake_quantize(x, "mxfp4", out=torch.empty(2, 32))
    with pytest.raises(ValueError, match="out= cannot record gradients"):
        fake_quantize(x.detach(), "mxfp4", out=x)
    with torch.no_grad():
        assert torch.equal(fake_quantize(x, "mxfp4", out=torch.empty(2, 32)), fake_quantize(x, "mxfp4"))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_other_dtypes_are_refused(dtype):
    for function in (fake_quantize, quantize):
        with pytest.raises(TypeError, match=f"{dtype}.*torch.bfloat16"):
            function(torch.zeros(2, 32).to(dtype), "mxfp4")


def test_other_errors():
    x = normal(2, 32)
    with pytest.raises(ValueError, match="Did you mean 'mxfp4'"):
        fake_quantize(x, "mxfp")
    with pytest.raises(ValueError, match="scale_mode for format 'nvfp4'"):
        fake_quantize(x, "nvfp4", "floor")
    with pytest.raises(TypeError, match="got NoneType"):
        fake_quantize(x, None)
    with pytest.raises(TypeError, match=r"torch\.Tensor, got list"):
        fake_quantize([1.0], "mxfp4")
    with pytest.raises(IndexError, match="axis=2 is out of range"):
        fake_quantize(x, "mxfp4", axis=2)
    with pytest.raises(IndexError, match="axis=1 is out of range"):
        fake_quantize(torch.tensor(1.0), "mxfp4", axis=1)


def test_stochastic_rounding_is_reproducible():
    x = normal(64, 64)

    def draw(seed):
        return fake_quantize(x, "mxfp4", rounding="stochastic", generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    generator = torch.Generator().manual_seed(1)
    first = fake_quantize(x, "mxfp4", rounding="stochastic", generator=generator)
    second = fake_quantize(x, "mxfp4", rounding="stochastic", generator=generator)
    assert torch.equal(first, draw(1))
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(fake_quantize(x, "mxfp4", rounding="stochastic"), draw(1))


def test_nearest_rounding_draws_nothing():
    generator = torch.Generator().manual_seed(1)
    state = generator.get_state()
    fake_quantize(normal(2, 32), "mxfp4", generator=generator)
    assert torch.equal(generator.get_state(), state)


def test_which_bits_stochastic_rounding_draws():
    """The uniform number of an element is that of its index in the row-major tensor with the block axis last, and it
    rounds up where that number is below the remainder. Rows of 50 are padded to 64; padding is not counted."""
    x = normal(2, 50, 3).abs().clamp(max=0.999)
    x[:, ::7] = 0.75  # the scale of every block is then 2**-3, in units of which the grid is 0, 0.5, 1, ... 6
    y = fake_quantize(x, "mxfp4", axis=1, rounding="stochastic", generator=torch.Generator().manual_seed(9))
    draws = uniform(torch.arange(300), *seed_from(torch.Generator().manual_seed(9))).reshape(2, 3, 50)
    units = x.movedim(1, -1) * 8
    step = torch.exp2(torch.floor(torch.log2(units.clamp(min=1)))) / 2
    below = torch.floor(units / step) * step
    want = torch.where(draws < (units - below) / step, below + step, below).clamp(max=6) / 8
    assert torch.equal(y.movedim(1, -1), want)


@pytest.mark.parametrize(
    ("fmt", "mode"), [("mxfp4", "rceil"), ("mxfp6_e3m2", "ceil"), ("mxint8", "rceil"), ("nvfp4", None)]
)
def test_stochastic_rounding_is_unbiased(fmt, mode):
    count = 1 << 14
    row = normal(32, seed=4)
    row[[0, 16]] = 4.0  # the maximum of both blocks, whatever the block size
    x = row.expand(count, 32)
    y = fake_quantize(x, fmt, mode, rounding="stochastic", generator=torch.Generator().manual_seed(0)).double()
    deviation = (y.mean(0) - row).abs()
    assert (deviation <= 5 * y.std(0) / count**0.5 + 1e-6).all()
    assert (y.std(0) > 0).sum() >= 20
    for column in range(32):
        values = y[:, column].unique()
        assert len(values) <= 2  # the two neighbours on the grid
        assert values[0] <= row[column] + 1e-6
        assert values[-1] >= row[column] - 1e-6


def test_inference_mode_gives_the_same_values():
    x = normal(2, 32)
    with torch.inference_mode():
        y = fake_quantize(x, "nvfp4")
    assert torch.equal(y, fake_quantize(x, "nvfp4"))


def test_results_do_not_depend_on_the_number_of_threads():
    x = normal(512, 512)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = fake_quantize(x, "nvfp4", "mse")
        torch.set_num_threads(2)
        assert torch.equal(fake_quantize(x, "nvfp4", "mse"), one)
    finally:
        torch.set_num_threads(threads)
