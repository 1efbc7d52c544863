"""`python -m benchmarks.runtimes`: each runtime's time, with how well it answers; what is missing is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import benchmarks.compile
from benchmarks import runtimes
from tests.helpers import tiny
from tomevit.deploy.programs import LEAST_TORCH

pytestmark = pytest.mark.skipif(torch.__version__ < LEAST_TORCH, reason="needs a newer torch")


@pytest.mark.soak
def test_each_runtime_with_its_error_and_agreement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runtimes, "RESULTS", tmp_path)
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None if name == "nncf" else True)
    names = ["torch", "onnxruntime", "int8", "int8_calibrated", "openvino_int8"]
    model = "digits_p1.tome_r16"
    runtimes.main(["--model", model, "--batch", "72", "--r", "16", "--rounds", "6", "--store", "--runtimes", *names])
    out = capsys.readouterr().out
    assert "openvino_int8 is left out: nncf is not installed\n" in out
    assert "the weights are fresh" not in out
    stored = json.loads((tmp_path / f"runtimes_{model}_b72_cpu.json").read_text())
    assert (stored["weights"], stored["compared_images"]) == ("trained", 360)
    assert "onnxruntime" in stored
    rows = {(row["runtime"], row["r"]): row for row in stored["rows"]}
    assert rows.keys() == {(name, r) for name in names[:-1] for r in (0, 16)}
    for (name, _), row in rows.items():
        assert row["error"] < (0.05 if "int8" in name else 1e-5)
        assert row["same_top1"] > 0.98
        lower, upper = row["over_torch_interval"]
        assert lower <= row["over_torch"] <= upper
    assert rows["int8", 0]["error"] != rows["int8_calibrated", 0]["error"]
    assert rows["torch", 0]["over_torch"] == 1


def test_an_r_may_be_words(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    runtimes.main(["--model", "digits_p1.plain", "--batch", "72", "--r", "2x", "--rounds", "1", "--runtimes", "torch"])
    assert "2x" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["benchmark", "--r", "fast"])
    for benchmark in (runtimes, benchmarks.compile):
        with pytest.raises(SystemExit):
            benchmark.main()
        assert "argument --r: 'fast' is no r; give an int" in capsys.readouterr().err


def test_bfloat16_only_where_the_processor_has_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["torch", "torch_bfloat16"]
    monkeypatch.setattr(runtimes, "emulated_dtypes", frozenset)
    assert list(runtimes.usable(names)) == names
    monkeypatch.setattr(runtimes, "emulated_dtypes", lambda: frozenset([torch.bfloat16]))
    assert list(runtimes.usable(names)) == ["torch"]
    assert capsys.readouterr().out == "torch_bfloat16 is left out: this processor has no instructions for bfloat16\n"


def test_fresh_weights_are_compared_on_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes.tomevit, "create", lambda name, img_size: tiny(depth=1))
    model, calibration, compared = runtimes.prepare("vit_b16", None, 48)
    assert calibration.shape == (64, 3, 32, 32)
    assert compared.shape == (48, 3, 32, 32)
    assert not torch.equal(calibration[0], compared[0])
    assert len(runtimes.whole(compared[:5], 12)) == 12
    assert model.head.weight.abs().max() > 0
