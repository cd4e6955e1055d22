"""storage="packed": codes and scales instead of the weight."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qnoise
from patching import assert_same, logits, manually_quantized, snapshot
from qnoise.nn import FakeQuantLinear
from qnoise.nn.packed import PackedLinear, PackedWeight
from tiny_models import tiny_model, with_lora


def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


def packed_model(fmt="mxfp4", **kwargs) -> nn.Module:
    return qnoise.patch_model(frozen(tiny_model(**kwargs)), fmt, storage="packed")


def pair(fmt, storage="dynamic", dtype=torch.float32, in_features=96, bias=True, act_fmt=None):
    """One frozen linear, packed and with another storage."""
    torch.manual_seed(0)
    stock = frozen(nn.Linear(in_features, 48, bias=bias, dtype=dtype))
    return tuple(FakeQuantLinear.from_linear(stock, fmt, act_fmt, storage=s) for s in ("packed", storage))


def codes_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: b.clone() for name, b in model.named_buffers() if ".weight_" in f".{name}"}


def packed_linears(model: nn.Module) -> dict[str, PackedLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear)}


@pytest.mark.parametrize("fmt", qnoise.FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("in_features", "act_fmt"), [(96, None), (90, "nvfp4")])
def test_computes_what_the_other_storages_compute(fmt, dtype, in_features, act_fmt) -> None:
    packed, dynamic = pair(fmt, dtype=dtype, in_features=in_features, act_fmt=act_fmt)
    for module in (packed, dynamic):
        module.bias = nn.Parameter(module.bias.detach().clone())
    x = torch.randn(3, 5, in_features).to(dtype)
    g = torch.randn(3, 5, 48).to(dtype)
    results = []
    for module in (packed, dynamic):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y.backward(g)
        results.append((y, leaf.grad, module.bias.grad, module.effective_weight()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.equal(packed(x[0, 0]), dynamic(x[0, 0]))


@pytest.mark.parametrize(("fmt", "share"), [("mxfp4", 0.27), ("nvfp4", 0.29), ("mxfp8_e4m3", 0.52)])
def test_memory(fmt, share) -> None:
    """What is held is the share of bf16 the format promises, and the weight itself is gone."""
    model = frozen(nn.Sequential(nn.Linear(512, 256, bias=False, dtype=torch.bfloat16)))
    storage = weakref.ref(model[0].weight.untyped_storage())
    parameter = weakref.ref(model[0].weight)
    qnoise.patch_model(model, fmt, storage="packed")
    gc.collect()
    assert parameter() is None
    assert storage() is None
    assert list(model.parameters()) == []
    assert {b.dtype for b in model.buffers()} == {torch.uint8}
    assert sum(b.untyped_storage().nbytes() for b in model.buffers()) <= share * 512 * 256 * 2
    before, after = qnoise.summary(model).nbytes
    assert before == 512 * 256 * 2
    assert after <= share * before
    assert "packed weights replace the weights" in str(qnoise.summary(model))
    assert qnoise.summary(model).parameters == 512 * 256


def test_nothing_dense_is_kept_for_the_backward() -> None:
    packed, _ = pair("nvfp4")
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = packed(torch.randn(4, 96, requires_grad=True))
    assert {t.data_ptr() for t in saved} == {
        packed._buffers[f"weight_{n}"].data_ptr() for n in ("codes", "scales", "divisor")
    }
    y.sum().backward()
    y = packed(torch.randn(4, 96, requires_grad=True))
    packed._buffers["weight_codes"].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_the_input_may_need_a_second_derivative_or_a_batch_of_its_own() -> None:
    packed, dynamic = pair("mxfp4", bias=False)
    x = torch.randn(4, 96, requires_grad=True)
    (first,) = torch.autograd.grad(packed(x).pow(2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    w = dynamic.effective_weight()
    torch.testing.assert_close(second, (2 * (w.T @ w).sum(0)).expand(4, -1))
    torch.testing.assert_close(torch.func.vmap(packed)(x), packed(x))


def large(spec="mxfp4", dtype=torch.float32, outputs=128 * 3 + 50) -> PackedLinear:
    """More rows than are taken at a time for a few tokens; ragged blocks."""
    torch.manual_seed(0)
    stock = frozen(nn.Linear(90, outputs, dtype=dtype))
    return FakeQuantLinear.from_linear(stock, spec, storage="packed")


@pytest.fixture
def pieces(monkeypatch) -> list[int]:
    """Rows of each piece of a weight that is dequantized on its own."""
    monkeypatch.setattr("qnoise.nn.packed._PIECE_BYTES", 1)
    rows: list[int] = []
    real = qnoise.nn.packed.dequantize_rows
    monkeypatch.setattr("qnoise.nn.packed.dequantize_rows", lambda *a: rows.append(len(a[-1])) or real(*a))
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", ["mxfp6_e2m3", "nvfp4", qnoise.QuantSpec("mxfp4", rotation="hadamard")], ids=str)
def test_a_few_tokens_are_multiplied_piece_by_piece(spec, dtype, pieces) -> None:
    """The whole weight is never dense, and the bits are those of the product with it."""
    packed = large(spec, dtype)
    weight = packed.effective_weight()
    for shape in ((90,), (1, 90), (2, 4, 90), (64, 90), (3, 90, 9)):
        x = torch.randn(shape).to(dtype)
        x = x.movedim(1, -1) if shape[-1] == 9 else x
        with torch.no_grad():
            assert torch.equal(packed(x), F.linear(x, weight, packed.bias))
        assert pieces == [128, 128, 178]
        pieces.clear()
    leaf = torch.randn(2, 90).to(dtype).requires_grad_()
    y = packed(leaf)
    assert torch.equal(y, F.linear(leaf, weight, packed.bias))
    assert torch.equal(torch.autograd.grad(y.sum(), leaf)[0], torch.ones_like(y) @ weight)
    assert len(pieces) == 3


def test_what_is_multiplied_at_once(pieces) -> None:
    """Many tokens, none, a small weight, fp64 (whose products sum in another order by pieces)."""
    with torch.no_grad():
        for module, tokens in ((large(), 65), (large(), 0), (large(outputs=255), 1), (large().double(), 1)):
            x = torch.randn(tokens, 90, dtype=module.weight.dtype)
            assert torch.equal(module(x), F.linear(x, module.effective_weight(), module.bias))
    assert pieces == []


def test_a_few_tokens_under_transforms_autocast_and_the_compiler(pieces) -> None:
    packed = large("nvfp4")
    x, t = torch.randn(4, 90), torch.randn(4, 90)
    dense = packed.effective_weight()
    torch.testing.assert_close(torch.func.vmap(packed)(x), packed(x))
    torch.testing.assert_close(torch.func.jvp(packed, (x,), (t,))[1], t @ dense.T)
    assert pieces == [128, 128, 178], "only where nothing is transformed"
    torch.testing.assert_close(torch.func.grad(lambda x: packed(x).sum())(x), torch.ones(4, len(dense)) @ dense)
    with torch.autograd.forward_ad.dual_level():
        y = packed(torch.autograd.forward_ad.make_dual(x, t))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(y).tangent, t @ dense.T)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = packed(x)
    assert torch.equal(y, F.linear(x.bfloat16(), dense.bfloat16(), packed.bias.bfloat16()))
    q = packed.quantized_weight
    how = (q.fmt, q.spec.scale_mode, None, list(q.shape), q.dtype)
    operands = (x, q.codes, q.scale_codes, q.per_tensor_scale, packed.bias, *how)
    torch.library.opcheck(torch.ops.qnoise.packed_linear.default, operands)
    fast = torch.compile(packed, backend="aot_eager", fullgraph=True)
    results = []
    for function in (fast, packed):
        pieces.clear()
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        results.append((y, *torch.autograd.grad(y.square().sum(), leaf)))
        assert len(pieces) == 3
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


CASTS = {
    "bfloat16": lambda m: m.to(torch.bfloat16),
    "half and back": lambda m: m.half().float(),
    "double": lambda m: m.double(),
    "type": lambda m: m.type(torch.bfloat16),
    "share_memory": lambda m: m.share_memory(),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4"])
def test_casts_do_not_touch_the_codes(fmt, cast) -> None:
    """The module's dtype follows, as a weight's would; the numbers that are stored do not."""
    packed, _ = pair(fmt)
    codes, before = codes_of(packed), copy.deepcopy(packed.quantized_weight)
    dtype = CASTS[cast](packed.to_linear(dequantize=True)).weight.dtype
    assert CASTS[cast](packed) is packed
    assert {name: torch.equal(b, codes[name]) for name, b in packed.named_buffers()} == dict.fromkeys(codes, True)
    assert packed.weight.dtype == dtype
    assert torch.equal(packed.effective_weight(), before.dequantize(dtype))
    assert packed(torch.randn(2, 96).to(dtype)).dtype == dtype


def test_prepared_for_training_on_few_bits(ids) -> None:
    """PEFT casts parameters to fp32 and leaves the function alone: Q(W) in bf16, as it was, on fp32 activations."""
    from peft import prepare_model_for_kbit_training

    model = packed_model("nvfp4", dtype=torch.bfloat16).to(torch.bfloat16)
    codes = codes_of(model)
    weights = {name: m.effective_weight() for name, m in packed_linears(model).items()}
    prepare_model_for_kbit_training(model)
    assert all(torch.equal(b, codes[name]) for name, b in codes_of(model).items())
    up = model.model.layers[0].mlp.up_proj
    x = torch.randn(3, 64)
    assert torch.equal(up(x), F.linear(x, weights["model.layers.0.mlp.up_proj"].float()))
    assert logits(model, ids).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype) -> None:
    packed, dynamic = pair("nvfp4", dtype=dtype)
    x = torch.randn(4, 96, requires_grad=True)
    gradients = []
    for module in (packed, dynamic):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = module(x)
        assert y.dtype == torch.bfloat16
        gradients.append((y, *torch.autograd.grad(y.float().square().sum(), x)))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4"])
def test_round_trip_through_safetensors(fmt, ids, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    model = packed_model(fmt)
    expected = logits(model, ids)
    assert "model.layers.0.mlp.up_proj.weight" not in model.state_dict()
    save_file(model.state_dict(), tmp_path / "packed.safetensors")
    stored = load_file(tmp_path / "packed.safetensors")
    other = packed_model(fmt, seed=1)
    assert not torch.equal(logits(other, ids), expected)
    other.load_state_dict(stored)
    assert torch.equal(logits(other, ids), expected)


def test_a_checkpoint_is_loaded_into_a_model_without_memory(ids) -> None:
    """Patched on the meta device, then filled: the full-precision weights never exist."""
    expected = logits(packed_model("nvfp4"), ids)
    with torch.device("meta"):
        empty = packed_model("nvfp4")
    empty.load_state_dict(packed_model("nvfp4").state_dict(), assign=True)
    # What a checkpoint never holds:
    empty.model.rotary_emb = copy.deepcopy(tiny_model().model.rotary_emb)
    assert torch.equal(logits(empty, ids), expected)


def test_what_does_not_fit_is_not_loaded() -> None:
    model = packed_model("mxfp6_e2m3")
    before = codes_of(model)
    with pytest.raises(RuntimeError, match=r"q_proj\.weight is a full-precision weight and this linear is packed"):
        model.load_state_dict(tiny_model(seed=1).state_dict(), strict=False)
    with pytest.raises(RuntimeError, match=r"q_proj\.weight_codes are 'mxfp6_e3m2' .* patched with 'mxfp6_e2m3'"):
        model.load_state_dict(packed_model("mxfp6_e3m2", seed=1).state_dict())
    as_float = packed_model("mxfp6_e2m3", seed=1).state_dict()
    as_float = {k: v.view(torch.float8_e8m0fnu) if k.endswith("weight_scales") else v for k, v in as_float.items()}
    with pytest.raises(RuntimeError, match=r"weight_scales as torch\.float8_e8m0fnu; packed tensors are torch\.uint8"):
        model.load_state_dict(as_float)
    after = codes_of(model)
    assert all(torch.equal(after[name], codes) for name, codes in before.items())


def test_copies_are_independent(ids) -> None:
    model = packed_model("nvfp4")
    expected = logits(model, ids)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin, ids), expected)
        own = twin.model.layers[0].self_attn
        assert own.q_proj._qnoise.scale_group[1] is own.k_proj
        twin.load_state_dict(packed_model("nvfp4", seed=1).state_dict())
        assert not torch.equal(logits(twin, ids), expected)
        assert torch.equal(logits(model, ids), expected)


def test_shown_as_torch_dtypes() -> None:
    packed, dynamic = pair("nvfp4")
    shown = packed.quantized_weight
    assert (shown.codes.dtype, shown.scales.dtype) == (torch.uint8, torch.float8_e4m3fn)
    assert shown.per_tensor_scale.dtype == torch.float32
    assert shown.per_tensor_scale.data_ptr() == packed.weight_divisor.data_ptr(), "a view, no copy"
    amax = dynamic.weight.detach().abs().max()
    assert shown.per_tensor_scale == torch.tensor(448.0 * 6) / amax
    assert torch.equal(shown.dequantize(), dynamic.effective_weight())
    assert pair("mxfp4")[0].quantized_weight.scales.dtype == torch.float8_e8m0fnu
    assert "storage=packed" in repr(packed)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("fmt", ["mxfp4", "nvfp4"])
def test_adapters_on_top(options, fmt, ids) -> None:
    """An adapter on a packed base is that adapter on the baked base, gradients included."""
    packed = with_lora(packed_model(fmt), **options)
    baked = with_lora(qnoise.bake(packed_model(fmt)), **options)
    assert len(packed_linears(packed)) == 14
    for model in (packed, baked):
        model.train()
        model(ids, labels=ids).loss.backward()
    gradients = [{n: p.grad for n, p in m.named_parameters() if p.requires_grad} for m in (packed, baked)]
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(g, gradients[1][name]) for name, g in gradients[0].items())


def test_peft_first(ids) -> None:
    model = qnoise.patch_model(with_lora(tiny_model()), "nvfp4", storage="packed")
    assert torch.equal(logits(model, ids), logits(with_lora(packed_model("nvfp4")), ids))


def test_merging_is_refused_and_works_once_unpacked(ids) -> None:
    model = with_lora(packed_model())
    expected = logits(model, ids)
    for merge in (model.merge_adapter, lambda: model.merge_adapter(safe_merge=True), model.merge_and_unload):
        with pytest.raises(ValueError, match=r"q_proj: its weight is stored as codes.*dequantize=True"):
            merge()
    assert torch.equal(logits(model, ids), expected)
    qnoise.unpatch_model(model, dequantize=True)
    assert torch.equal(logits(model, ids), expected)
    torch.testing.assert_close(logits(model.merge_and_unload(), ids), expected, rtol=1e-4, atol=1e-5)


def test_the_weight_reads_as_a_tensor_and_refuses_writes() -> None:
    packed, dynamic = pair("mxfp4")
    dense = dynamic.effective_weight()
    w = packed.weight
    assert isinstance(w, PackedWeight)
    assert (w.shape, w.dtype, w.device, w.requires_grad) == ((48, 96), torch.float32, torch.device("cpu"), False)
    for read in (torch.clone, torch.Tensor.numpy, torch.Tensor.tolist, torch.t, lambda t: t[3], lambda t: t.data + 1):
        got, expected = read(w), read(dense)
        assert type(got) is type(expected)
        assert (got == expected).all() if not isinstance(got, list) else got == expected
    assert "mxfp4" in repr(w)

    def assign_data() -> None:
        w.data = dense

    def assign_module() -> None:
        packed.weight = nn.Parameter(dense)

    def add_in_place() -> None:
        packed.weight.data += 1

    def assign_item() -> None:
        w[0] = 1

    for write in (
        assign_data, assign_module, add_in_place, assign_item, w.zero_, w.requires_grad_,
        lambda: torch.add(w, w, out=w), lambda: w.data.copy_(dense), lambda: nn.init.zeros_(w),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="stored as codes and scales"):
            write()
    assert torch.equal(packed.weight.dequantize(), dense)


def test_siblings_share_their_scale_from_the_joint_amax(ids) -> None:
    def model(config: qnoise.PatchConfig) -> nn.Module:
        stock = frozen(tiny_model())
        stock.model.layers[0].self_attn.q_proj.weight.mul_(8)
        return qnoise.patch_model(stock, config=config)

    packed, dynamic = (model(qnoise.PatchConfig("nvfp4", storage=s)) for s in ("packed", "dynamic"))
    assert torch.equal(logits(packed, ids), logits(dynamic, ids))
    scales = {n: m.quantized_weight.per_tensor_scale.item() for n, m in packed_linears(packed).items()}
    assert len({scales[f"model.layers.0.self_attn.{p}_proj"] for p in "qkv"}) == 1
    assert "packed; per-tensor scale shared by 3" in qnoise.summary(packed).patched["model.layers.0.self_attn.v_proj"]
    alone = model(qnoise.PatchConfig("nvfp4", storage="packed", share_scales=False))
    scales = {n: m.quantized_weight.per_tensor_scale.item() for n, m in packed_linears(alone).items()}
    assert len({scales[f"model.layers.0.self_attn.{p}_proj"] for p in "qkv"}) == 3


def test_taking_it_off_again(ids) -> None:
    for undo in (qnoise.bake, lambda m: qnoise.unpatch_model(m, dequantize=True)):
        model = packed_model("nvfp4")
        expected = logits(model, ids)
        keys = list(tiny_model().state_dict())
        for refused, cure in (
            (qnoise.unpatch_model, "dequantize=True"),
            (lambda m: qnoise.full_precision(m).__enter__(), "stock model beside it"),
        ):
            with pytest.raises(ValueError, match=rf"14 linears are packed \(model\.layers\.0.*{cure}"):
                refused(model)
        assert len(packed_linears(model)) == 14
        assert undo(model) is model
        assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
        assert list(model.state_dict()) == keys
        assert not any(name.startswith("_qnoise") for m in model.modules() for name in m.__dict__)
        assert torch.equal(logits(model, ids), expected)
    twin = pair("mxfp4")[0]
    with pytest.raises(ValueError, match=r"to_linear\(dequantize=True\) gives Q\(W\)"):
        twin.to_linear()
    x = torch.randn(3, 96)
    assert torch.equal(twin.to_linear(dequantize=True)(x), twin(x))


def refused(model: nn.Module, message: str, **kwargs) -> None:
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        qnoise.patch_model(model, storage="packed", **kwargs)
    assert_same(before, snapshot(model))


def test_what_cannot_be_packed_is_refused_by_name() -> None:
    from accelerate import cpu_offload

    refused(tiny_model(), r"q_proj\.weight needs gradient.*requires_grad_\(False\).*storage='auto'")
    refused(frozen(tiny_model()), "noise on linear weights is relative", noise="linear")
    refused(frozen(tiny_model()), "fmt is None; give fmt a format", fmt=None, noise="rmsnorm")
    tied = frozen(tiny_model(tie_word_embeddings=True))
    refused(tied, r"embed_tokens\.weight and lm_head\.weight are one parameter", include=["*", "lm_head"])
    offloaded = cpu_offload(frozen(tiny_model()), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"q_proj\.weight is offloaded; pack the model before"):
        qnoise.patch_model(offloaded, storage="packed")
    assert not packed_linears(offloaded)
    for make in (
        lambda: FakeQuantLinear.from_linear(nn.Linear(8, 8), storage="packed"),
        lambda: FakeQuantLinear.from_linear(frozen(nn.Linear(8, 8)), None, storage="packed"),
        lambda: FakeQuantLinear(8, 8, storage="packed"),
    ):
        with pytest.raises(ValueError, match="packed"):
            make()
    with pytest.raises(TypeError, match="from_linear"):
        PackedLinear(8, 8)


@pytest.mark.parametrize("failing", ["pack", "convert_packed"])
def test_a_failure_half_way_leaves_the_model_as_it_was(failing, monkeypatch, ids) -> None:
    model = frozen(tiny_model())
    before, stock = snapshot(model), logits(model, ids)
    real, calls = getattr(qnoise.patch, failing), []

    def fails(*args):
        calls.append(args)
        if len(calls) == 6:
            raise RuntimeError("half way")
        return real(*args)

    monkeypatch.setattr(qnoise.patch, failing, fails)
    with pytest.raises(RuntimeError, match="half way"):
        qnoise.patch_model(model, "nvfp4", noise="rmsnorm", storage="packed")
    assert len(calls) == 6
    assert_same(before, snapshot(model))
    assert torch.equal(logits(model, ids), stock)


def test_patching_again_packs_what_was_added(ids) -> None:
    model = packed_model("nvfp4")
    before = codes_of(model)
    model.model.layers[0].mlp.up_proj = frozen(nn.Linear(64, 96, bias=False))
    qnoise.patch_model(model, "nvfp4", storage="packed")
    assert len(packed_linears(model)) == 14
    after = codes_of(model)
    assert {n for n in before if not torch.equal(before[n], after[n])} == {
        f"model.layers.0.mlp.up_proj.weight_{part}" for part in ("codes", "scales", "divisor")
    }


def test_with_everything_else(ids) -> None:
    """Norm noise, the switches, checkpointing, generation."""
    model = qnoise.patch_model(frozen(tiny_model()), noise="rmsnorm", storage="packed").train()
    stock = manually_quantized(tiny_model(), "mxfp4")
    assert torch.equal(logits(model, ids), logits(stock, ids))
    assert torch.equal(
        model.generate(ids, max_new_tokens=4, do_sample=False), stock.generate(ids, max_new_tokens=4, do_sample=False)
    )
    qnoise.NoiseScheduler(model, qnoise.schedules.Constant(0.1), 10).step()
    assert not torch.equal(logits(model, ids), logits(stock, ids))
    with qnoise.quiet(model):
        assert torch.equal(logits(model, ids), logits(stock, ids))
    assert qnoise.state(model)["formats"] == {"mxfp4": 14}
    model.get_input_embeddings().requires_grad_(True)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append(model.get_input_embeddings().weight.grad.clone())
        model.zero_grad()
    assert torch.equal(*gradients)


def test_save_pretrained_writes_the_codes(tmp_path, ids) -> None:
    """A stock loader cannot read them, and says which weights it misses."""
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    model = packed_model()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored["model.layers.0.mlp.up_proj.weight_codes"].dtype == torch.uint8
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert "model.layers.0.mlp.up_proj.weight" in info["missing_keys"]
    qnoise.patch_model(frozen(loaded.eval()), storage="packed").load_state_dict(stored)
    assert torch.equal(logits(loaded, ids), logits(model, ids))
