"""The operators: what torch asks of one, compiled code, transforms, and which backend serves."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from qnoise import formats, ops, reference, scales
from qnoise.formats import E2M1, FORMATS, BlockFormat, QuantSpec
from qnoise.functional import fake_quantize, quantize
from qnoise.kernels import chunked, native
from test_chunked import peak_bytes, same
from test_golden import CASES, RULES, mismatches, vectors  # noqa: F401  (vectors is a fixture)

OPS = torch.ops.qnoise
NV = ("nvfp4", "two_level", "nearest")
STOCHASTIC = QuantSpec("mxfp4", rounding="stochastic")
ROTATED = QuantSpec("nvfp4", residual=0.5, rotation="hadamard")


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(native, "available", lambda: False)


@pytest.fixture
def served(monkeypatch):
    """The names of the backends that were called."""
    names = []
    for kind in ("_CHUNKED", "_NATIVE"):
        backend = getattr(ops, kind)
        noted = {
            name: lambda *a, name=name, function=function, kind=kind: (names.append((kind, name)), function(*a))[1]
            for name, function in backend._asdict().items()
        }
        monkeypatch.setattr(ops, kind, ops.Backend(**noted))
    return names


# ---- what torch asks of an operator ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", [("mxfp4", "floor", "nearest"), NV, ("mxfp6_e2m3", "mse", "stochastic")], ids=str)
def test_opcheck(spec, dtype):
    x = normal(6, 70, dtype=dtype)
    amax = x.float().abs().amax(-1, keepdim=True) if spec == NV else None
    for rows in (x, x.clone().requires_grad_()):
        opcheck(OPS.fake_quantize.default, (rows, *spec, -1, amax, 3, 4))
    opcheck(OPS.fake_quantize.default, (x.T, *spec, 0, None, 3, 4))
    opcheck(OPS.fake_quantize_out.default, (x, *spec, -1, amax, 3, 4, torch.empty_like(x)))
    opcheck(OPS.quantize.default, (x, *spec, 1, amax, 3, 4))
    codes, scales, divisor = OPS.quantize.default(x, *spec, -1, amax, 3, 4)
    opcheck(OPS.dequantize.default, (codes, scales, divisor, *spec[:2], [6, 70], -1, torch.bfloat16))


def test_opcheck_of_what_is_done_around():
    x, spec, around = normal(6, 70), ("mxfp4", "floor", "stochastic"), (128, 0.5, "hadamard")
    for rows in (x, x.clone().requires_grad_()):
        opcheck(OPS.fake_quantize.default, (rows, *spec, -1, None, 3, 4, *around))
    opcheck(OPS.fake_quantize_out.default, (x, *spec, -1, None, 3, 4, torch.empty_like(x), *around))
    opcheck(OPS.quantize.default, (x, *NV, 1, None, 3, 4, "hadamard"))
    codes, scales, divisor = OPS.quantize.default(x, *NV, -1, None, 3, 4, "hadamard")
    opcheck(OPS.dequantize.default, (codes, scales, divisor, *NV[:2], [6, 70], -1, torch.bfloat16, "hadamard"))


def test_the_gradient_of_the_operator_is_that_of_the_identity():
    x, grad = normal(3, 40).requires_grad_(), normal(3, 40, seed=1)
    amax = torch.tensor(4.0, requires_grad=True)
    OPS.fake_quantize(x, *NV, -1, amax, 0, 0).backward(grad)
    assert torch.equal(x.grad, grad)
    assert amax.grad is None


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("shape", "axis"), [((), -1), ((0, 5), -1), ((3, 0), 1), ((2, 50, 3), 1)])
def test_meta_tensors_have_the_shapes_of_the_others(fmt, shape, axis):
    x = normal(*shape, dtype=torch.bfloat16)
    meta = x.to("meta")
    assert fake_quantize(meta, fmt, axis=axis).shape == x.shape
    real, shapes = quantize(x, fmt, axis=axis), quantize(meta, fmt, axis=axis)
    for name in ("codes", "scale_codes", "per_tensor_scale"):
        a, b = getattr(real, name), getattr(shapes, name)
        assert (a is None) == (b is None)
        assert a is None or (a.shape, a.dtype, "meta") == (b.shape, b.dtype, b.device.type)
    back = shapes.dequantize()
    assert (back.shape, back.dtype, back.device.type) == (x.shape, x.dtype, "meta")


# ---- compiled code ----


def compiled(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


def into(x, out):
    fake_quantize(x, "mxfp4", out=out)
    return out + 1


@pytest.mark.parametrize(
    "function",
    [
        lambda x: fake_quantize(2 * x, "mxfp4") * x,
        lambda x: fake_quantize(x, QuantSpec("nvfp4", "four_over_six"), axis=0),
        lambda x: fake_quantize(x, "nvfp4", amax=3.0) + fake_quantize(x, "nvfp4", amax=x.abs().amax(-1, keepdim=True)),
        lambda x: into(x, torch.empty_like(x)),
        lambda x: into(x, x.clone()) + into(y := x + 1, y),
        lambda x: fake_quantize(x, QuantSpec("nvfp4", residual=0.5, rotation="hadamard")) * x,
        lambda x: quantize(x, QuantSpec("nvfp4", rotation="hadamard")).dequantize(),
        lambda x: quantize(x, "nvfp4").dequantize() + quantize(x, "mxfp6_e3m2").dequantize(torch.float64),
    ],
    ids=["mx", "axis", "amax", "out", "in place", "around", "packed rotated", "packed"],
)
def test_a_compiled_graph_gives_the_bits_of_eager(function):
    x = normal(6, 70)
    assert torch.equal(compiled(function)(x), function(x))


def test_a_compiled_graph_has_the_gradient_and_any_shape():
    def loss(x):
        return (fake_quantize(x, "nvfp4") * torch.arange(70.0)).sum()

    run = compiled(loss, dynamic=True)
    for rows in (3, 5, 8):
        x = normal(rows, 70, seed=rows).requires_grad_()
        run(x).backward()
        assert torch.equal(x.grad, torch.arange(70.0).expand(rows, 70))


def test_a_compiled_graph_draws_anew():
    x = normal(6, 70)
    run = compiled(lambda x: fake_quantize(x, STOCHASTIC))
    torch.manual_seed(1)
    first, second = run(x), run(x)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(fake_quantize(x, STOCHASTIC), first)
    # A generator that is passed is not for a whole graph, but for a compiled function.
    torch._dynamo.reset()
    broken = torch.compile(lambda x, g: fake_quantize(x, STOCHASTIC, generator=g), backend="aot_eager")
    one, two = (torch.Generator().manual_seed(2) for _ in range(2))
    assert torch.equal(broken(x, one), fake_quantize(x, STOCHASTIC, generator=two))


@pytest.mark.slow
def test_inductor_gives_the_bits_of_eager():
    torch._dynamo.reset()
    x = normal(6, 70)

    def function(x):
        return torch.relu(fake_quantize(2 * x, "nvfp4")) + quantize(x, "mxfp4").dequantize()

    assert torch.equal(torch.compile(function, fullgraph=True)(x), function(x))


# ---- function transforms ----


@pytest.mark.parametrize("spec", [QuantSpec("mxfp4"), QuantSpec("nvfp4"), QuantSpec("mxint8", "mse"), ROTATED], ids=str)
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_vmap_gives_each_example_what_it_gets_alone(spec, dim):
    x = normal(5, 7, 33) * torch.arange(1.0, 6)[:, None, None]
    for axis in (0, -1, 1):
        want = torch.stack([fake_quantize(example, spec, axis=axis) for example in x])
        got = torch.vmap(lambda t, axis=axis: fake_quantize(t, spec, axis=axis), in_dims=dim)(x.movedim(0, dim))
        assert same(got, want)
    numbers = x[:, 0, 0].contiguous()
    assert same(
        torch.vmap(lambda t: fake_quantize(t, spec))(numbers), torch.stack([fake_quantize(t, spec) for t in numbers])
    )


def test_vmap_over_amax():
    x, amax = normal(5, 3, 32), torch.arange(1.0, 6)
    want = torch.stack([fake_quantize(t, "nvfp4", amax=a) for t, a in zip(x, amax, strict=True)])
    run = torch.vmap(lambda t, a: OPS.fake_quantize(t, *NV, -1, a, 0, 0))
    assert same(run(x, amax), want)
    tokens = x.abs().amax(-1, keepdim=True)
    want = fake_quantize(x, "nvfp4", amax=tokens)
    assert same(run(x, tokens), want)
    shared = torch.vmap(lambda t: fake_quantize(t, "nvfp4", amax=tokens[0]))(x)
    assert same(shared, torch.stack([fake_quantize(t, "nvfp4", amax=tokens[0]) for t in x]))


def test_gradients_of_examples():
    x = normal(4, 33)
    for spec in ("nvfp4", QuantSpec("nvfp4", residual=1.0, rotation="hadamard"), QuantSpec("mxfp4", macro_block=128)):
        grads = torch.vmap(torch.func.grad(lambda t, spec=spec: (fake_quantize(t, spec) * t).sum()))(x)
        assert torch.equal(grads, torch.stack([fake_quantize(t, spec) for t in x]) + x)


# ---- backends ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("rule", RULES, ids="-".join)
def test_without_a_compiler_the_golden_vectors_hold(rule, dtype, vectors, no_compiler):  # noqa: F811
    wrong = {}
    for case in CASES:
        x = vectors[case["x"]]
        if (case["fmt"], case["scale_mode"], case["rounding"]) != rule or not same(x.to(dtype), x):
            continue
        got = fake_quantize(x.to(dtype), rule[0], rule[1], rounding=rule[2])
        if count := mismatches(got, case | {"fp32": dtype == torch.float32}, vectors):
            wrong[case["family"]] = count
    assert not wrong


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_the_door_gives_the_bits_of_the_reference(fmt, rounding, monkeypatch):
    """With and without the compiled path, for any axis, layout and dtype."""
    x = normal(3, 50, 5)
    x[0, :3, 0], x[1, 7, 1], x[2, :, 2] = -0.0, torch.nan, 2.0**-130
    layouts = [(x, 1), (x, -1), (x.transpose(0, 2), 1), (x[:, ::2], 1), (x[0, 0, 0], 0)]
    spec = QuantSpec(fmt, rounding=rounding)
    for working in (True, False):
        if not working:
            monkeypatch.setattr(native, "available", lambda: False)
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            for rows, axis in ((layout.to(dtype), axis) for layout, axis in layouts):
                seed = (5, 6) if rounding == "stochastic" else None
                want = reference.fake_quantize(rows, spec, axis=axis, seed=seed)
                arguments = (rows, fmt, spec.scale_mode, rounding, axis, None, 5, 6)
                got, out = OPS.fake_quantize(*arguments), torch.empty_like(rows)
                assert got.is_contiguous()
                assert same(got, want)
                OPS.fake_quantize_out(*arguments, out)
                assert same(out, want)
                q, (codes, scales, divisor) = (
                    reference.quantize(rows, spec, axis=axis, seed=seed),
                    OPS.quantize(*arguments),
                )
                assert torch.equal(codes, q.codes)
                assert torch.equal(scales, q.scale_codes)
                assert (
                    (divisor.shape == (0,)) if q.per_tensor_scale is None else torch.equal(divisor, q.per_tensor_scale)
                )
                assert same(OPS.dequantize(codes, scales, divisor, fmt, spec.scale_mode, rows.shape, axis, dtype), want)


needs_compiler = pytest.mark.skipif(not native.available(), reason=native.status())


@needs_compiler
def test_the_compiled_path_serves_what_it_supports_and_the_chunked_one_the_rest(served):
    x = normal(3, 40)
    for dtype, kind in ((torch.float32, "_NATIVE"), (torch.bfloat16, "_NATIVE"), (torch.float16, "_CHUNKED")):
        served.clear()
        quantize(x.to(dtype), "nvfp4").dequantize()
        fake_quantize(x.to(dtype), "mxfp4")
        names = ("tensor_amax", "quantize_rows", "dequantize_rows", "fake_quantize_rows")
        assert served == [(kind, name) for name in names]
    assert ops.backend("cpu") == f"compiled C ({native.status()})"


def test_without_a_compiler_the_chunked_path_serves(served, no_compiler, monkeypatch):
    monkeypatch.setattr(native, "status", lambda: "off: no compiler")
    fake_quantize(normal(2, 32), "mxfp4")
    assert served == [("_CHUNKED", "fake_quantize_rows")]
    assert ops.backend("cpu") == "chunked PyTorch (off: no compiler)"


def test_other_devices_run_the_chunked_path_where_they_are(monkeypatch):
    spec = QuantSpec("mxfp4")
    for kind in ("mps", "xpu", "privateuseone"):
        assert ops._serving(torch.device(kind), torch.float32, spec) is ops._CHUNKED
        assert ops.backend(kind) == f"chunked PyTorch (no kernels for {kind})"
    assert ops.backend("meta") == "shapes only"
    kernels = ops.Backend(*ops._CHUNKED)
    monkeypatch.setattr(ops, "_triton", lambda: (kernels, ""))
    assert ops._serving(torch.device("cuda:1"), torch.float16, spec) is kernels
    assert ops._serving(torch.device("cuda"), torch.float8_e5m2, spec) is ops._CHUNKED
    assert ops.backend("cuda") == "Triton kernels"
    monkeypatch.setattr(ops, "_triton", lambda: (None, "ModuleNotFoundError: triton"))
    assert ops._serving(torch.device("cuda"), torch.float32, spec) is ops._CHUNKED
    assert ops.backend("cuda") == "chunked PyTorch (ModuleNotFoundError: triton)"


def test_a_scale_mode_that_only_the_reference_has_is_left_to_it(monkeypatch):
    """A branch in scales.py is enough: no backend takes a mode that it has not learned for one that it has."""
    choose = scales._e8m0_codes
    monkeypatch.setattr(scales, "_e8m0_codes", lambda m, p, spec: choose(m, p, spec) + (spec.scale_mode == "next"))
    monkeypatch.setattr(formats, "MX_SCALE_MODES", ("next",))
    block = BlockFormat("test_ops_next", E2M1, 32, "e8m0", False, ("next",))
    monkeypatch.setitem(formats._TABLE, block.name, block)
    spec, x = QuantSpec(block.name), normal(3, 70)
    want = reference.fake_quantize(x, spec)
    assert not torch.equal(want, fake_quantize(x, "mxfp4"))
    assert torch.equal(fake_quantize(x, spec), want)
    assert torch.equal(quantize(x, spec).dequantize(), want)
    assert not native.supports(spec, torch.float32)
    pytest.importorskip("triton")
    assert not ops._triton_supports(spec)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_kernels_that_do_not_run_leave_their_reason():
    assert ops.backend("cuda").startswith("chunked PyTorch (Triton kernels do not run here: ")


@pytest.mark.parametrize("compiler", [True, False])
def test_out_that_overlaps_the_input(compiler, monkeypatch, served):
    if not compiler:
        monkeypatch.setattr(native, "available", lambda: False)
    for shift in (1, 32, 1000):
        memory = normal(5000)
        x, out = memory[: 5000 - shift], memory[shift:]
        want = reference.fake_quantize(x, QuantSpec("mxfp4"))
        fake_quantize(x, "mxfp4", out=out)
        assert same(out, want)
    # An expanded output has one place for many results: torch refuses, whoever serves.
    with pytest.raises(RuntimeError, match="single memory location"):
        fake_quantize(normal(4, 32), "mxfp4", out=torch.zeros(32).expand(4, 32))


@pytest.mark.parametrize("compiler", [pytest.param(True, marks=needs_compiler), False])
@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4"])
def test_nothing_is_allocated_but_the_result(fmt, compiler, monkeypatch):
    if not compiler:
        monkeypatch.setattr(native, "available", lambda: False)
    x = torch.ones(1024, 2048)
    both = torch.empty(2, *x.shape)
    work = 2e4 if compiler else 2.5e6
    assert peak_bytes(lambda: fake_quantize(x, fmt)) <= x.nbytes + work
    assert peak_bytes(lambda: fake_quantize(x, fmt, out=both[0])) <= work
    assert peak_bytes(lambda: fake_quantize(x, fmt, out=x)) <= work
    assert peak_bytes(lambda: fake_quantize(both[0], fmt, out=both[1])) <= work  # neighbours in one memory
    q = quantize(x, fmt)
    assert peak_bytes(lambda: quantize(x, fmt)) <= q.nbytes + work
    assert peak_bytes(q.dequantize) <= x.nbytes + work
    # One copy where the blocks do not lie in a row: a strided input is copied into the result.
    strided = torch.ones(1024, 4096)[:, ::2]
    assert peak_bytes(lambda: fake_quantize(strided, fmt)) <= x.nbytes + work
    assert peak_bytes(lambda: fake_quantize(x, fmt, axis=0)) <= 2 * x.nbytes + work


@pytest.mark.parametrize("compiler", [True, False])
def test_the_default_device_does_not_matter(compiler, monkeypatch):
    if not compiler:
        monkeypatch.setattr(native, "available", lambda: False)
    chunked._values.cache_clear()
    chunked._pair_values.cache_clear()
    x = normal(3, 40)
    for fmt in FORMATS:
        want = fake_quantize(x, fmt, rounding="stochastic", generator=torch.Generator().manual_seed(1))
        with torch.device("meta"):
            generator = torch.Generator("cpu").manual_seed(1)
            q = quantize(x, fmt, rounding="stochastic", generator=generator)
            assert same(q.dequantize(), want)
            assert same(reference.dequantize(q, x.dtype), want)
