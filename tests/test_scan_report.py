"""What a report makes of its rows: layers, multipliers, plan, the classic schema, comparison, pages."""

from __future__ import annotations

import copy
import html.parser
import itertools
import json
import math

import pytest
import torch

import qnoise
from qnoise.formats import QuantSpec
from qnoise.sensitivity import Plan, ScanReport, scan
from qnoise.sensitivity.figures import Figures
from qnoise.sensitivity.html import grid
from qnoise.sensitivity.plan import _bound, _choose, _Unit
from qnoise.sensitivity.rows import ScanRow
from tiny_models import tiny_model

MXFP4, NVFP4, MXFP8 = QuantSpec("mxfp4"), QuantSpec("nvfp4"), QuantSpec("mxfp8_e4m3")
EMPTY = Figures(MXFP4).result()


def row(name: str, spec: QuantSpec = MXFP4, kind: str = "weight", shape=(32, 32), issues=(), **figures) -> ScanRow:
    values = {**EMPTY, "sqnr_db": 18.0, "pooled_sqnr_db": 18.0, "norm": 1.0, "relative_rms": 10**-0.9, **figures}
    return ScanRow(name, kind, spec, shape, "bfloat16", values, {}, {**EMPTY, "sqnr_db": 18.7}, tuple(issues))


def report_of(*rows: ScanRow, **arguments) -> ScanReport:
    return ScanReport("a model", "gaussian", rows, **arguments)


def errors_by_layer(errors: dict[int, float], stack: str = "model.layers", kind: str = "output") -> list[ScanRow]:
    return [row(f"{stack}.{layer}", kind=kind, mean_relative_error=error) for layer, error in errors.items()]


# The published errors of three layers of 28, in percent; the others are made to give the published mean, 36.41.
PUBLISHED = dict.fromkeys(range(28), 36.58) | {14: 41.99, 15: 42.65, 16: 41.89, 17: 40.77, 26: 28.52, 12: 40.55}
_REST = [layer for layer in PUBLISHED if PUBLISHED[layer] == 36.58]
_SHARE = (28 * 36.41 - sum(v for k, v in PUBLISHED.items() if k not in _REST)) / len(_REST)
PUBLISHED |= dict.fromkeys(_REST, _SHARE)


def test_multipliers_have_the_published_values() -> None:
    report = report_of(*errors_by_layer(PUBLISHED))
    targeted = report.multipliers("targeted")
    assert [layer for layer in range(28) if targeted[layer] == 1.0] == [14, 15, 16, 17]
    assert targeted["*"] == targeted[0] == 0.0
    variable = report.multipliers("variable")
    assert [layer for layer in range(28) if variable[layer] == 1.5] == [14, 15, 16, 17]
    assert sorted(variable.values()) == [1.0] * 16 + [1.2] * 8 + [1.5] * 4
    assert variable[12] == 1.2
    for kind, least, most in (("proportional", 0.783, 1.171), ("inverse", 0.829, 1.217), ("ceiling", 0.681, 1.0)):
        values = report.multipliers(kind)
        assert min(values.values()) == pytest.approx(least, abs=1e-3), kind
        assert max(values.values()) == pytest.approx(most, abs=1e-3), kind
    assert report.multipliers("inverse")[15] == min(report.multipliers("inverse").values())
    zones = report.multipliers("zones")
    assert [layer for layer in range(28) if callable(zones[layer])] == list(range(6, 23))
    middle = zones[10]
    assert callable(middle)
    assert (middle(0.0), middle(0.49), middle(0.5), middle(1.0)) == (1.0, 1.0, 0.5, 0.5)
    assert zones[0] == zones[27] == 1.0


def test_multipliers_drive_a_scheduler() -> None:
    model = qnoise.patch_model(tiny_model(), "mxfp4", noise="rmsnorm")
    report = scan(model, "mxfp4")
    for kind in ("targeted", "variable", "proportional", "inverse", "ceiling", "zones"):
        factors = report.multipliers(kind)
        scheduler = qnoise.NoiseScheduler(model, qnoise.schedules.Constant(0.01), 4, multipliers=factors)
        for _ in range(3):
            scheduler.step()
        sigmas = qnoise.state(model)["noise"]["modules"]
        for layer in (0, 1):
            factor = factors[layer]
            expected = 0.01 * (factor(0.5) if callable(factor) else factor)
            assert sigmas[f"model.layers.{layer}.input_layernorm"] == pytest.approx(expected), kind
        assert sigmas["model.norm"] == (0.0 if kind == "targeted" else 0.01)


def test_multipliers_of_two_stacks_and_of_none() -> None:
    both = report_of(*errors_by_layer({0: 0.1, 1: 0.3}), *errors_by_layer({0: 0.2}, stack="vision.blocks"))
    assert both.multipliers("proportional") == {
        "model.layers.0.*": pytest.approx(0.5), "model.layers.1.*": pytest.approx(1.5), "vision.blocks.0.*": 1.0,
    }  # fmt: skip
    assert set(report_of(*errors_by_layer({0: 0.0, 1: 0.0})).multipliers("inverse").values()) == {1.0}
    with pytest.raises(ValueError, match="inside numbered layers"):
        report_of(row("fc")).multipliers("zones")
    with pytest.raises(ValueError, match="Did you mean 'targeted'"):
        both.multipliers("target")
    with pytest.raises(ValueError, match="of is 'input'"):
        both.multipliers("zones", of="input")
    with pytest.raises(ValueError, match="nvfp4 was not scanned"):
        both.multipliers("zones", fmt="nvfp4")


def test_layers_take_their_tensors_together() -> None:
    model = tiny_model()
    report = scan(model, ["mxfp4", "nvfp4"])
    assert [(each.layer, each.spec.fmt, each.modules) for each in report.layers] == [
        (0, "mxfp4", 7), (1, "mxfp4", 7), (0, "nvfp4", 7), (1, "nvfp4", 7),
    ]  # fmt: skip
    weights = [m.weight.detach() for m in model.model.layers[1].modules() if isinstance(m, torch.nn.Linear)]
    x = torch.cat([w.flatten() for w in weights])
    e = torch.cat([(qnoise.fake_quantize(w, "mxfp4") - w).flatten() for w in weights])
    figures = report.layers[1].figures
    assert figures["sqnr_db"] == pytest.approx(20 * math.log10(x.norm() / e.norm()), rel=1e-5)
    assert figures["norm"] == pytest.approx(x.norm().item(), rel=1e-5)
    assert figures["max_abs_error"] == pytest.approx(e.abs().max().item())
    assert figures["mean_relative_error"] == pytest.approx((e / x).abs().mean().item(), rel=1e-5)
    assert figures["deadzone"] == pytest.approx(((x + e) == 0).float().mean().item(), rel=1e-5)
    rows = [r for r in report.select(fmt="mxfp4") if r.layer == 1]
    assert report.layers[1].worst == min(rows, key=lambda r: r.figures["sqnr_db"]).name


def test_the_classic_schema() -> None:
    model = tiny_model(num_hidden_layers=4)
    ids = torch.arange(3, 23).reshape(2, 10)
    values = json.loads(scan(model, "mxfp4", inputs=ids).to_srdd_json())
    assert set(values) == {"config", "report", "recommendations", "timestamp"}
    assert {"model_path", "quant_type", "num_layers", "thresholds"} <= set(values["config"])
    assert set(values["config"]["thresholds"]) == {"sqnr_db", "deadzone", "saturation", "relative_error"}
    assert set(values["report"]) == {"summary", "statistics", "per_layer"}
    summary = values["report"]["summary"]
    assert summary["total_layers"] == summary["problematic_layers"] + summary["healthy_layers"] == 4
    layers = values["report"]["per_layer"]
    assert set(layers[0]) == {
        "layer_id", "sqnr_db", "deadzone_ratio", "saturation_ratio", "relative_error", "mean_abs_error",
        "max_abs_error", "output_norm", "is_problematic", "issues",
    }  # fmt: skip
    assert summary["problematic_layer_ids"] == [0, 1, 2, 3]  # by these limits any layer of any model is
    assert values["recommendations"]["strategy"] == "reconsider_quantization"
    outputs = {}
    for at, layer in enumerate(model.model.layers):
        layer.register_forward_hook(
            lambda m, args, out, at=at: outputs.update({at: out[0] if isinstance(out, tuple) else out})
        )
    with torch.no_grad():
        model(ids)
    x = outputs[2].reshape(-1, 64)
    x_hat = qnoise.fake_quantize(x, "mxfp4")
    error = x_hat - x
    assert layers[2]["sqnr_db"] == pytest.approx(20 * math.log10(x.norm() / error.norm()), rel=1e-4)
    assert layers[2]["output_norm"] == pytest.approx(x.norm().item(), rel=1e-4)
    assert layers[2]["mean_abs_error"] == pytest.approx(error.abs().mean().item(), rel=1e-4)
    top = x_hat.abs()
    assert layers[2]["saturation_ratio"] == pytest.approx((top >= 0.99 * top.max()).float().mean().item(), rel=1e-4)
    statistics = values["report"]["statistics"]["sqnr_db"]
    by_layer = torch.tensor([layer["sqnr_db"] for layer in layers], dtype=torch.float64)
    assert statistics["mean"] == pytest.approx(by_layer.mean().item())
    assert statistics["std"] == pytest.approx(by_layer.std(unbiased=False).item())


@pytest.mark.parametrize(
    ("sqnrs", "strategy", "mixed", "noisy"),
    [
        ([25.0] * 20, "no_action", [], []),
        ([25.0] * 19 + [17.0], "targeted_mitigation", [19], []),
        ([25.0] * 16 + [14.0, 17.0, 17.0, 17.0], "mixed_approach", [16], [17, 18, 19]),
        ([25.0] * 10 + [17.0] * 10, "reconsider_quantization", list(range(10, 20)), []),
    ],
)
def test_classic_strategies(sqnrs, strategy, mixed, noisy) -> None:
    rows = [row(f"layers.{at}", kind="output", relative_rms=10 ** (-db / 20)) for at, db in enumerate(sqnrs)]
    advice = json.loads(report_of(*rows).to_srdd_json())["recommendations"]
    assert (advice["strategy"], advice["mixed_precision_layers"], advice["aqn_layers"]) == (strategy, mixed, noisy)


def test_a_layer_without_error_has_100_db_in_the_classic_schema() -> None:
    values = json.loads(report_of(row("layers.0", kind="output", relative_rms=0.0)).to_srdd_json())
    assert values["report"]["per_layer"][0]["sqnr_db"] == 100.0


def brute_force(units: list[_Unit], budget: float) -> float:
    best = math.inf
    for chosen in itertools.product(*(range(len(unit.bits)) for unit in units)):
        if sum(unit.bits[at] for unit, at in zip(units, chosen, strict=True)) <= budget:
            best = min(best, sum(unit.costs[at] for unit, at in zip(units, chosen, strict=True)))
    return best


@pytest.mark.parametrize("seed", range(8))
def test_a_plan_is_the_best_there_is(seed) -> None:
    """Against every combination, on small cases; and the bound is below it, and tight where nothing need be split."""
    generator = torch.Generator().manual_seed(seed)
    units = [
        _Unit((str(at),), tuple(float(b) for b in torch.randint(1, 40, (4,), generator=generator)),
              tuple(torch.rand(4, generator=generator).tolist()))
        for at in range(6)
    ]  # fmt: skip
    least, most = sum(min(u.bits) for u in units), sum(max(u.bits) for u in units)
    for share in (0.0, 0.2, 0.5, 0.8, 1.0):
        budget = least + share * (most - least)
        chosen = _choose(units, budget)
        assert sum(u.bits[at] for u, at in zip(units, chosen, strict=True)) <= budget
        cost = sum(u.costs[at] for u, at in zip(units, chosen, strict=True))
        best = brute_force(units, budget)
        assert cost == pytest.approx(best)
        assert _bound(units, budget) <= best + 1e-12
    assert _bound(units, most) == pytest.approx(sum(min(u.costs) for u in units))


def test_a_long_plan_is_thinned_and_stays_near_the_bound() -> None:
    generator = torch.Generator().manual_seed(0)
    units = [
        _Unit((str(at),), tuple((torch.rand(3, generator=generator) + torch.arange(3)).tolist()),
              tuple((torch.rand(3, generator=generator) / torch.arange(1, 4) ** 2).tolist()))
        for at in range(120)
    ]  # fmt: skip
    budget = 170.0
    chosen = _choose(units, budget)
    cost = sum(u.costs[at] for u, at in zip(units, chosen, strict=True))
    assert sum(u.bits[at] for u, at in zip(units, chosen, strict=True)) <= budget
    assert cost <= _bound(units, budget) * 1.01


def test_a_plan_is_applied_as_it_says() -> None:
    ids = torch.arange(3, 23).reshape(2, 10)
    model = tiny_model()
    report = scan(model, ["mxfp4", "nvfp4", "mxfp8_e4m3"], inputs=ids)
    plan = report.plan(bits=6.0)
    assert plan.bits <= 6.0
    assert plan.measured_on == "outputs"
    assert Plan.from_json(plan.to_json()) == plan
    by_name = {(r.name, r.spec): r for r in report.select("weight") + report.select("weight", "nvfp4")
               + report.select("weight", "mxfp8_e4m3")}  # fmt: skip
    cost = sum(by_name[name, spec].figures["output_relative_rms"] ** 2 for name, spec in plan.items())
    assert plan.cost == pytest.approx(cost)
    assert plan.bound <= plan.cost
    total = sum(r.numel for r in report.select("weight"))
    used = sum(by_name[name, spec].numel * spec.block_format.bits_per_element for name, spec in plan.items())
    assert (plan.bits, plan.nbytes) == (pytest.approx(used / total), math.ceil(used / 8))
    patched = qnoise.patch_model(copy.deepcopy(model), plan)
    formats = {
        name: m.effective_weight() for name, m in patched.named_modules() if isinstance(m, qnoise.FakeQuantLinear)
    }
    assert set(formats) == set(plan)
    for name, weight in formats.items():
        stock = model.get_submodule(name).weight.detach()
        if plan[name] != NVFP4:  # whose scale siblings share
            assert torch.equal(weight, qnoise.fake_quantize(stock, plan[name])), name
    # Engines keep q, k and v, and gate and up, in one matrix.
    for layer in (0, 1):
        for group in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")):
            assert len({plan[f"model.layers.{layer}.{name}"] for name in group}) == 1
    shown = str(plan)
    assert "gap to that bound" in shown
    assert "bits per weight" in shown


def test_plan_budgets() -> None:
    rows = [row(f"layers.{at}.w", spec, relative_rms=error)
            for at, scale in enumerate((1.0, 2.0, 3.0, 4.0))
            for spec, error in ((MXFP4, 0.11 * scale), (MXFP8, 0.03 * scale))]  # fmt: skip
    report = report_of(*rows)
    assert set(report.plan(bits=4.25).values()) == {MXFP4}
    assert set(report.plan(bits=8.25).values()) == {MXFP8}
    half = report.plan(bits=6.25)
    assert {name for name, spec in half.items() if spec == MXFP8} == {"layers.2.w", "layers.3.w"}
    assert 0 <= half.gap < 1e-10  # the budget is met up to one part in 10^12
    assert report.plan(memory=4 * 1024 * 6.25 / 8).choices == half.choices
    assert report.plan(bits=8.25, memory=4 * 1024 * 6.25 / 8).choices == half.choices
    stored = report.plan(bits=16, candidates=["mxfp4", None])
    assert (set(stored.values()), stored.cost) == ({None}, 0.0)
    assert set(report.plan(bits=9, candidates="mxfp4").values()) == {MXFP4}
    with pytest.raises(ValueError, match=r"4.2 bits.*smallest candidates, 4.25"):
        report.plan(bits=4.2)
    with pytest.raises(ValueError, match="give a budget"):
        report.plan()
    with pytest.raises(ValueError, match="nvfp4 was not scanned"):
        report.plan(bits=5, candidates=["nvfp4"])
    with pytest.raises(ValueError, match="candidates is empty"):
        report.plan(bits=5, candidates=[])
    for text, match in (('{"schema": 1}', "no plan"), ('{"schema": "qnoise-plan-1"}', "damaged")):
        with pytest.raises(ValueError, match=match):
            Plan.from_json(text)


def test_what_engines_fuse_gets_one_format() -> None:
    rows = [row(f"layers.0.{name}", spec, relative_rms=error)
            for name, errors in {"q_proj": (0.5, 0.01), "k_proj": (0.1, 0.09), "v_proj": (0.1, 0.09),
                                 "o_proj": (0.4, 0.01)}.items()
            for spec, error in zip((MXFP4, MXFP8), errors, strict=True)]  # fmt: skip
    assert [name for name, spec in report_of(*rows).plan(bits=6.25).items() if spec == MXFP8] == ["layers.0.o_proj"]


def test_a_name_that_ends_like_another_is_not_caught_by_it() -> None:
    class Inner(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = torch.nn.Sequential()
            self.block.add_module("fc", torch.nn.Linear(32, 32))
            self.fc = torch.nn.Linear(32, 32)

    model = Inner()
    rows = [row(name, spec, relative_rms=error)
            for name, errors in (("block.fc", (0.1, 0.09)), ("fc", (0.5, 0.01)))
            for spec, error in zip((MXFP4, MXFP8), errors, strict=True)]  # fmt: skip
    plan = report_of(*rows).plan(bits=6.25)
    assert dict(plan) == {"block.fc": MXFP4, "fc": MXFP8}
    patched = qnoise.patch_model(model, plan)
    assert patched.block.fc._qnoise.weight_spec == MXFP4
    assert patched.fc._qnoise.weight_spec == MXFP8


def test_recommendations() -> None:
    good = report_of(row("layers.0.w"), row("layers.0.w", NVFP4, relative_rms=10**-1.02, sqnr_db=20.4)).recommendation
    assert (good.action, good.spec, good.modules) == ("quantize", NVFP4, ())
    assert any("nvfp4 20.40 dB, mxfp4 18.00 dB" in reason for reason in good.reasons)
    rows = [row(f"layers.{at}.w") for at in range(9)] + [row("layers.9.w", issues=["low_sqnr"], sqnr_db=12.0)]
    few = report_of(*rows).recommendation
    assert (few.action, few.modules) == ("mixed", ("layers.9.w",))
    assert any("12.00 dB (a gaussian has 18.70 dB)" in reason for reason in few.reasons)
    many = report_of(*(row(f"layers.{at}.w", issues=["low_sqnr"]) for at in range(4))).recommendation
    assert many.action == "reconsider"
    with pytest.raises(ValueError, match="no rows"):
        _ = report_of().recommendation


def test_comparisons() -> None:
    before = report_of(row("a", sqnr_db=18.0), row("b", sqnr_db=19.0), row("gone"))
    after = report_of(row("a", sqnr_db=20.0), row("b", sqnr_db=12.0), row("new"))
    comparison = before.compare(after)
    assert [(a.name, b.figures["sqnr_db"]) for a, b in comparison.pairs] == [("b", 12.0), ("a", 20.0)]
    assert [r.name for r in comparison.only_before] == ["gone"]
    assert [r.name for r in comparison.only_after] == ["new"]
    assert comparison.changed
    assert not before.compare(before).changed
    text = comparison.to_markdown()
    assert "-7.00" in text
    assert "+2.00" in text
    other = report_of(row("a", NVFP4, sqnr_db=20.0))
    assert "mxfp4 → nvfp4" in report_of(row("a")).compare(other).to_markdown()


class Page(html.parser.HTMLParser):
    """Tags in their order, and a check that each that opens closes."""

    VOID = ("meta", "br", "rect", "line", "circle")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict]] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing() -> None:
    ids = torch.arange(3, 23).reshape(2, 10)
    report = scan(tiny_model(), ["mxfp4", "nvfp4", "mxint8"], inputs=ids)
    text = report.to_html()
    page = Page(text)
    tags = {tag for tag, _ in page.seen}
    assert not tags & {"script", "link", "img", "iframe", "object", "form", "base"}
    for tag, attributes in page.seen:
        assert not any(name.startswith("on") or name in ("href", "src") for name in attributes), tag
    assert "url(" not in text
    assert "@import" not in text
    policy = next(a["content"] for tag, a in page.seen if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")
    cells = sum(tag == "title" for tag, _ in page.seen) - 1
    assert cells == len(report.rows)  # every row is inside a layer, and each has its cell
    assert report.recommendation.reasons[0] in html.unescape(text)
    Page(report.compare(scan(tiny_model(seed=1), ["mxfp4", "nvfp4"])).to_html())
    baked = scan(qnoise.bake(qnoise.patch_model(tiny_model())), "mxfp4")
    Page(baked.to_html())
    Page(baked.compare(baked).to_html())


def test_the_number_line_has_the_values_of_the_element() -> None:
    assert grid(qnoise.FORMATS["mxfp4"].element) == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    for fmt in qnoise.FORMATS.values():
        points = grid(fmt.element)
        assert points[-1] == fmt.element.max
        assert len(points) == {4: 8, 6: 32, 8: 128}[fmt.element.bits] - {"e4m3": 1, "e5m2": 4}.get(fmt.element.name, 0)
    values = torch.randn(4096, 32, generator=torch.Generator().manual_seed(0))
    values[:, 0] = 6.0
    rounded = qnoise.fake_quantize(values.clamp(-6, 6), "mxfp4").abs()
    assert set(rounded.unique().tolist()) == set(grid(qnoise.FORMATS["mxfp4"].element))


def test_markdown_says_what_is_there() -> None:
    report = scan(tiny_model(), ["mxfp4", "nvfp4"])
    text = report.to_markdown(top=3)
    assert text.startswith("# What quantization does to Qwen2ForCausalLM\n")
    assert "## Worst tensors (3 of 28)" in text
    assert "- `lm_head`: output head" in text
    assert str(report) == report.to_markdown()
    assert "(28 of 28)" in report.to_markdown(top=None)
