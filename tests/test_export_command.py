"""`qnoise export`: what it writes is what the library writes of the same model, and nothing half."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import qnoise
from qnoise import cli
from qnoise.commands import export as export_command
from qnoise.commands.texts_argument import encoded
from qnoise.config_file import write_config

CHECKPOINT = Path(__file__).parents[1] / "benchmarks" / "recovery" / "checkpoints" / "words-0"
IDS = torch.tensor([[5, 6, 7, 8, 9, 10, 11]])


def base():
    return AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.bfloat16).eval()


def logits(model):
    with torch.no_grad(), qnoise.quiet(model):
        return model.eval()(IDS).logits


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model that was patched, wrapped and changed, with the folder a training run leaves of it."""
    folder = tmp_path_factory.mktemp("run") / "checkpoint-10"
    torch.manual_seed(0)
    model = get_peft_model(
        qnoise.patch_model(base(), "nvfp4", noise="rmsnorm"), LoraConfig(r=2, target_modules="all-linear")
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    model.save_pretrained(folder)
    write_config(model, folder)
    return model, folder


def same_files(one: Path, other: Path) -> bool:
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return first.keys() == second.keys() and all(torch.equal(t, second[name]) for name, t in first.items())


def test_a_model_as_codes(tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    assert cli.main(["export", str(CHECKPOINT), "--fmt", "nvfp4:four_over_six", "--out", str(out), "--json"]) == 0
    shown = capsys.readouterr()
    told = json.loads(shown.out)
    assert shown.err == ""
    assert (told["path"], told["preset"], told["ignored"], told["adapter"]) == (str(out), "NVFP4A16", ["lm_head"], None)
    assert told["converted_from"] is None
    patched = qnoise.patch_model(base(), qnoise.QuantSpec("nvfp4", "four_over_six"))
    assert len(told["quantized"]) == 21
    assert torch.equal(logits(qnoise.load_packed(out)), logits(patched))
    assert AutoTokenizer.from_pretrained(out)("Tom has 3 pens.") == AutoTokenizer.from_pretrained(CHECKPOINT)(
        "Tom has 3 pens."
    )
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_what_a_run_left_is_exported_as_it_was_trained(trained, tmp_path, capsys):
    """Format, base model and adapter are all read from the folder."""
    model, folder = trained
    assert cli.main(["export", str(folder), "--out", str(tmp_path / "out")]) == 0
    assert f"adapter, to be used on top: {tmp_path / 'out' / 'adapter'}" in capsys.readouterr().out
    again = PeftModel.from_pretrained(qnoise.load_packed(tmp_path / "out"), str(tmp_path / "out" / "adapter"))
    assert torch.equal(logits(again), logits(model))


def test_merged_says_that_it_is_another_model(trained, tmp_path, capsys):
    model, folder = trained
    command = ["export", str(folder), "--adapters", "merged", "--out"]
    assert cli.main([*command, str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    report = qnoise.export(model, tmp_path / "expected", adapters="merged")
    name = max(report.merge_error, key=report.merge_error.__getitem__)
    assert f"up to {100 * report.merge_error[name]:.3g} % from the Q(W) + BA that was trained ({name})" in shown
    assert same_files(tmp_path / "out", tmp_path / "expected")
    assert not (tmp_path / "out" / "adapter").exists()


def test_a_plan_from_a_scan(tmp_path, capsys):
    """Within the budget some linears stay as they are; the plan and the scan it is made of give one checkpoint."""
    report = qnoise.scan(CHECKPOINT, "mxfp4")
    plan = report.plan(9, ["mxfp4", None])
    (tmp_path / "scan.json").write_text(report.to_json())
    (tmp_path / "plan.json").write_text(plan.to_json())
    command = ["export", str(CHECKPOINT), "--json", "--plan"]
    assert cli.main([*command, str(tmp_path / "scan.json"), "--bits", "9", "--out", str(tmp_path / "a")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert cli.main([*command, str(tmp_path / "plan.json"), "--out", str(tmp_path / "b")]) == 0
    kept = {name for name, spec in plan.items() if spec is None}
    assert 0 < len(kept) < len(plan)
    assert set(told["quantized"]) == set(plan) - kept
    assert same_files(tmp_path / "a", tmp_path / "b")


def test_input_scales_are_measured_on_texts(tmp_path, capsys):
    """The static scales are those of the library's own calibration on the same texts; without texts it is refused."""
    (tmp_path / "texts.txt").write_text("Tom has 3 pens.\nShe buys 12 more pens and gives away 4.\n")
    command = ["export", str(CHECKPOINT), "--fmt", "nvfp4", "--act-fmt", "nvfp4", "--out", str(tmp_path / "out")]
    assert cli.main(command) == 2
    assert "act_amax" in capsys.readouterr().err
    assert cli.main([*command, "--inputs", str(tmp_path / "texts.txt")]) == 0
    assert "NVFP4," in capsys.readouterr().out
    model = qnoise.patch_model(base(), "nvfp4", act_fmt="nvfp4")
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    texts = (tmp_path / "texts.txt").read_text().splitlines()
    amaxes = qnoise.calibrate_activations(model, encoded(tokenizer, texts, 128, 8, "cpu"))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert len(amaxes) == 21
    for name, amax in amaxes.items():
        assert torch.equal(stored[f"{name}.input_global_scale"], torch.tensor([2688.0]) / torch.tensor([amax])), name


def test_another_dtype_is_told(tmp_path, capsys):
    AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).save_pretrained(tmp_path / "model")
    assert cli.main(["export", str(tmp_path / "model"), "--fmt", "mxfp4", "--out", str(tmp_path / "out")]) == 0
    assert "rounded from float32 to bfloat16" in capsys.readouterr().out


MISTAKES = {
    "no format": ([], "give --fmt"),
    "two of them": (["--fmt", "mxfp4", "--plan", "x.json"], "give one"),
    "bits alone": (["--fmt", "mxfp4", "--bits", "5"], "--plan"),
    "no plan": (["--plan", "none.json", "--bits", "5"], "no such file"),
    "no plan in it": (["--plan", "{model}/config.json"], "neither a plan nor"),
    "no place in the layout": (["--fmt", "mxfp4:hadamard"], "rotation"),
    "no preset": (["--fmt", "mxint8"], "mxint8"),
    "no such module": (["--fmt", "mxfp4", "--exclude", "q_prj"], "q_prj"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_leave_nothing(case, tmp_path, capsys):
    arguments, match = MISTAKES[case]
    arguments = [word.replace("{model}", str(CHECKPOINT)) for word in arguments]
    assert cli.main(["export", str(CHECKPOINT), *arguments, "--out", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr()
    assert match in shown.err
    assert shown.err.startswith("qnoise export: ")
    assert len(shown.err.splitlines()) == 1
    assert shown.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_full_folder_is_left_alone(tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("kept")
    assert cli.main(["export", str(CHECKPOINT), "--fmt", "mxfp4", "--out", str(tmp_path)]) == 2
    assert "the folder is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch, capsys):
    def interrupted(model, path, **_):
        (path / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(export_command, "export", interrupted)
    assert cli.main(["export", str(CHECKPOINT), "--fmt", "mxfp4", "--out", str(tmp_path / "out")]) == 130
    assert "interrupted" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_whole_is_refused(tmp_path, capsys):
    """transformers would fill in random weights with a warning; a damaged file and a lost base are named as well."""
    model = tmp_path / "model"
    shutil.copytree(CHECKPOINT, model)
    tensors = load_file(model / "model.safetensors")
    lost = next(name for name in tensors if "q_proj" in name)
    save_file({k: t for k, t in tensors.items() if k != lost}, model / "model.safetensors", {"format": "pt"})
    command = ["export", str(model), "--fmt", "mxfp4", "--out", str(tmp_path / "out")]
    assert cli.main(command) == 2
    assert f"lacks 1 parameters of Qwen2ForCausalLM, such as {lost}" in capsys.readouterr().err
    (model / "model.safetensors").write_bytes(b"12345678")
    assert cli.main(command) == 2
    assert f"{model} cannot be loaded by transformers" in capsys.readouterr().err
    (model / "config.json").unlink()
    assert cli.main(command) == 2
    assert "has no config.json" in capsys.readouterr().err
    (model / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/gone/base"}))
    assert cli.main(command) == 2
    assert "/gone/base does not exist" in capsys.readouterr().err
