"""Self-distillation: the loss against a plain one, what moves and what does not, the teacher, errors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F

import qnoise
from patching import logits
from qnoise.repairs.distill import distill
from qnoise.repairs.self_teacher import SelfTeacher
from tiny_models import tiny_model, with_lora


def text(rows: int = 4, width: int = 12, seed: int = 5) -> dict[str, torch.Tensor]:
    """Right-padded ids with an attention mask and labels that leave the first three tokens out."""
    ids = torch.randint(3, 99, (rows, width), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[0, 8:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def fresh_lora(model, **overrides):
    """LoRA with B = 0, as PEFT makes it."""
    adapted = with_lora(model, **overrides)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    return adapted


def loud(model, scale: float = 8.0):
    """A tiny random model predicts nearly nothing; with a larger head it does, and quantization shows."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(scale)
    return model


def optimizer_of(model, lr: float = 1e-3) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)


def plain_loss(student_logits, teacher_logits, batch, temperature):
    """Mean over the predicted tokens of T^2 KL, written down once more, in fp64."""
    counts = (batch["labels"][:, 1:] != -100) & (batch["attention_mask"][:, 1:] == 1)
    p = (teacher_logits[:, :-1][counts].double() / temperature).log_softmax(-1)
    q = (student_logits[:, :-1][counts].double() / temperature).log_softmax(-1)
    return temperature**2 * F.kl_div(q, p, log_target=True, reduction="batchmean")


@pytest.mark.parametrize("model_type", ["qwen2", "gemma2"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_loss_and_gradient_are_those_of_the_plain_one(model_type, temperature) -> None:
    """Through the head in chunks (qwen2), and from whole logits where they are capped behind the head (gemma2)."""
    capped = {"final_logit_softcapping": 2.0} if model_type == "gemma2" else {"tie_word_embeddings": False}
    model = with_lora(loud(tiny_model(model_type, **capped)), target_modules=["q_proj", "down_proj", "lm_head"])
    qnoise.patch_model(model, "mxfp4", act_fmt="mxfp8_e4m3", noise="rmsnorm")
    qnoise.NoiseScheduler(model, qnoise.schedules.Constant(0.1), 10).step()
    batch = text()
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad(), qnoise.full_precision(model), model.disable_adapter():
        expected_teacher = model(**inputs).logits
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    trained = {n: p.requires_grad_() for n, p in model.named_parameters() if "lora_" in n}
    with qnoise.quiet(model):
        loss = plain_loss(model(**inputs).logits, expected_teacher, batch, temperature)
    expected = torch.autograd.grad(loss, list(trained.values()))
    teacher = SelfTeacher(model, False, (), temperature, chunk_rows=7)
    total, tokens = teacher.kl(batch, backward=True)
    assert (teacher._head is None) == (model_type == "gemma2")
    assert tokens == int(((batch["labels"][:, 1:] != -100) & (batch["attention_mask"][:, 1:] == 1)).sum()) == 32
    assert total / tokens * temperature**2 == pytest.approx(loss.item(), rel=1e-5)
    for (name, parameter), gradient in zip(trained.items(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=2e-4, atol=2e-7, msg=name)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(side) -> None:
    """Nor does what stands in it: the sum over a padded batch is that over its rows without padding."""
    model = qnoise.patch_model(loud(tiny_model()), "mxfp4")
    ids = torch.randint(3, 99, (2, 9), generator=torch.Generator().manual_seed(6))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    short = ids[:1, 4:]
    if side == "right":
        ids, mask = torch.cat([ids[:, 4:], ids[:, :4]], 1), torch.cat([mask[:, 4:], mask[:, :4]], 1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    teacher = SelfTeacher(model, False, ())
    with torch.no_grad():
        total, tokens = teacher.kl({"input_ids": ids, "attention_mask": mask, "position_ids": positions})
        parts = [teacher.kl(each) for each in (short, ids[1:])]
    assert tokens == sum(count for _, count in parts) == 12
    assert total == pytest.approx(sum(kl for kl, _ in parts), rel=1e-4)


def test_it_repairs_and_moves_the_adapters_alone() -> None:
    model = fresh_lora(loud(tiny_model()), r=8).train()
    qnoise.patch_model(model, "mxfp4", noise="rmsnorm")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    modes = [(m, m.training) for m in model.modules()]
    torch.manual_seed(11)
    random_state = torch.get_rng_state()
    report = distill(
        model, [text(seed=s) for s in range(3)], optimizer_of(model), steps=12, holdout=text(seed=9), every=4
    )
    assert report.steps == 12
    assert report.stopped == "steps"
    assert len(report.kl) == 12
    assert report.kl[-1] < 0.5 * report.kl[0]
    assert report.after < report.before
    assert report.after == min(kl for _, kl in report.history) == dict(report.history)[report.kept_step]
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(p.grad is None for p in model.parameters())
    assert modes == [(m, m.training) for m in model.modules()]
    assert not qnoise.state(model)["full_precision"]
    assert model.base_model.model.model.layers[0].self_attn.q_proj.active_adapters
    assert torch.equal(random_state, torch.get_rng_state())
    assert "KL" in str(report)


def test_it_is_deterministic_with_dropout_too() -> None:
    results = []
    for draws in (0, 3):
        model = fresh_lora(loud(tiny_model()), lora_dropout=0.2).train()
        qnoise.patch_model(model, "nvfp4")
        torch.rand(draws)
        distill(model, text(), optimizer_of(model), steps=3, seed=4)
        results.append(torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]))
    assert torch.equal(*results)


def test_a_trained_adapter_asks_for_the_teacher() -> None:
    """Base or adapted: the start is measured against the one that was named, also while the adapter moves."""
    model = qnoise.patch_model(with_lora(loud(tiny_model())), "mxfp4")
    batch = text()
    with pytest.raises(ValueError, match="teacher='adapted'.*teacher='base'"):
        distill(model, batch, optimizer_of(model), steps=2)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        student = model(**inputs).logits
        with qnoise.full_precision(model):
            adapted = model(**inputs).logits
            with model.disable_adapter():
                base = model(**inputs).logits
    for name, logits_of_teacher in (("adapted", adapted), ("base", base)):
        again = copy.deepcopy(model)
        report = distill(again, batch, optimizer_of(again), steps=8, teacher=name)
        assert report.before == pytest.approx(plain_loss(student, logits_of_teacher, batch, 1.0).item(), rel=1e-4)
        with torch.no_grad():
            trained = again(**inputs).logits
        assert report.after == pytest.approx(plain_loss(trained, logits_of_teacher, batch, 1.0).item(), rel=1e-4)
        assert report.after < report.before


def test_full_fine_tuning_learns_from_its_start() -> None:
    """Without adapters the weights themselves move, and the teacher keeps those it had."""
    model = qnoise.patch_model(loud(tiny_model()), "mxfp4")
    stock = loud(tiny_model())
    batch = text()
    report = distill(model, batch, optimizer_of(model, lr=2e-5), steps=8)
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        expected = plain_loss(model(**inputs).logits, stock(**inputs).logits, batch, 1.0).item()
    assert report.after == pytest.approx(expected, rel=1e-4)
    assert report.after < report.before


def test_early_stop_keeps_the_best() -> None:
    model = fresh_lora(loud(tiny_model()))
    qnoise.patch_model(model, "mxfp4")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=30.0)
    stock = logits(model, text()["input_ids"])
    report = distill(
        model, text(), optimizer, steps=50, holdout=[text(seed=2)], every=1, patience=3, max_grad_norm=None
    )
    assert report.stopped == "patience"
    assert report.steps == report.kept_step + 3
    if report.kept_step == 0:
        assert torch.equal(logits(model, text()["input_ids"]), stock)
    generator = (text(seed=s) for s in range(2))
    assert distill(model, generator, optimizer_of(model), steps=5, teacher="base").stopped == "batches"


def test_errors_leave_everything_as_it_was(ids) -> None:
    model = qnoise.patch_model(fresh_lora(loud(tiny_model())), "mxfp4")
    values = copy.deepcopy(model.state_dict())
    optimizer = optimizer_of(model)

    def bad():
        yield ids
        yield ids
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        distill(model, bad(), optimizer, steps=5)
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())
    assert not optimizer.state_dict()["state"]
    assert all(p.grad is None for p in model.parameters())
    optimizer.param_groups[0]["lr"] = float("nan")
    with pytest.raises(ValueError, match="step 2"):
        distill(model, ids, optimizer, steps=5)
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())


def test_bad_calls_name_the_cure(ids) -> None:
    model = fresh_lora(tiny_model())
    optimizer = optimizer_of(model)
    with pytest.raises(ValueError, match="not patched.*patch_model"):
        distill(model, ids, optimizer, steps=1)
    qnoise.patch_model(model, "mxfp4")
    stranger = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    with pytest.raises(ValueError, match="optimizer holds none of"):
        distill(model, ids, stranger, steps=1)
    for arguments, match in (
        ({"steps": 0}, "steps is 0"),
        ({"steps": 1, "temperature": 0.0}, "temperature is 0.0"),
        ({"steps": 1, "patience": 2}, "patience needs holdout="),
        ({"steps": 1, "teacher": "bse"}, "base"),
    ):
        with pytest.raises(ValueError, match=match):
            distill(model, ids, optimizer, **arguments)
    with pytest.raises(ValueError, match="batches is empty"):
        distill(model, [], optimizer, steps=1)
    with pytest.raises(ValueError, match="no token counts"):
        distill(model, {"input_ids": ids, "attention_mask": torch.zeros_like(ids)}, optimizer, steps=1)
    with pytest.raises(TypeError, match="'input_ids'"):
        distill(model, [(ids,)], optimizer, steps=1)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged.*unmerge_adapter"):
        distill(model, ids, optimizer, steps=1)
    frozen = qnoise.patch_model(tiny_model().requires_grad_(False), "mxfp4")
    with pytest.raises(ValueError, match="nothing to train: add an adapter"):
        distill(frozen, ids, stranger, steps=1)
    packed = fresh_lora(qnoise.patch_model(tiny_model().requires_grad_(False), "mxfp4", storage="packed"))
    with pytest.raises(ValueError, match="packed"):
        distill(packed, ids, optimizer_of(packed), steps=1)
