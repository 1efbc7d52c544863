"""The example of retrieval: what it finds, counts and draws."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import tomevit
from tests.tools.test_shards import digit
from tomevit.tasks.demo import held_out
from tomevit.tasks.embed import extractor

pytest.importorskip("sklearn", reason="examples/ needs scikit-learn")

from examples import retrieval

DIGITS = "digits_p1.tome_r16"


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as end:
        retrieval.main(list(arguments))
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


@settings(max_examples=30)
@given(st.integers(2, 600), st.integers(1, 5), st.integers(0, 9))
def test_the_nearest_are_the_nearest_but_for_oneself(rows: int, count: int, seed: int) -> None:
    count = min(count, rows - 1)
    vectors = torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    vectors = F.normalize(vectors, dim=1)
    found = retrieval.nearest(vectors, count)
    distances = (vectors[:, None] - vectors[None]).square().sum(2).sqrt() + torch.eye(rows) * 9
    assert torch.equal(found, distances.argsort(1)[:, :count])


def test_shares_are_counted() -> None:
    ours, theirs = torch.tensor([[1, 2], [0, 2], [0, 1]]), torch.tensor([[2, 1], [2, 1], [0, 1]])
    assert retrieval.shared(ours, theirs) == pytest.approx(5 / 6)
    assert retrieval.shared(ours, ours) == 1.0
    labels = torch.tensor([7, 7, 8])
    assert retrieval.same_class(ours, labels).tolist() == [[True, False], [True, False], [False, False]]


def test_digits_have_neighbours_of_their_class(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    retrieval.main(["--out", str(out), "--merge", "16"])
    printed = capsys.readouterr().out
    assert "360 images" in printed
    assert "fresh" not in printed
    rows = [line.split() for line in printed.splitlines() if re.match(r" *\d+  ", line)]
    images, labels = held_out()
    model = tomevit.create("digits_p1.plain", pretrained=True)
    nearest = {}
    for r, row in zip((0, 16), rows, strict=True):
        with torch.inference_mode():
            vectors = F.normalize(extractor(model)(tomevit.transform(model)(images), r), dim=1)
        order = (vectors @ vectors.T - 9 * torch.eye(360)).argsort(1, descending=True)[:, :10]
        nearest[r] = [set(neighbours) for neighbours in order.tolist()]
        right = (labels[order] == labels[:, None]).float()
        same = sum(len(a & b) for a, b in zip(nearest[r], nearest[0], strict=True)) / 36
        assert row[:2] == [str(r), str(model.token_counts(r)[-1])]
        # One neighbour of 3600 is 0.03; two that are equally near may change places.
        assert list(map(float, row[2:])) == pytest.approx(
            [100 * float(right[:, 0].mean()), 100 * float(right.mean()), same], abs=0.35
        )
    assert float(rows[0][2]) > 95
    assert (out / "neighbours.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in out.iterdir()} == {"digits", "neighbours.png", "r0.safetensors", "r16.safetensors"}


def test_photographs_are_cropped_and_compared(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("skimage", reason="the photographs are scikit-image's")
    monkeypatch.setattr(retrieval, "CROPS", 2)
    arguments = ["--data", "photographs", "--model", "deit_ti16", "--fresh", "--img-size", "32", "--merge", "1", "2"]
    retrieval.main([*arguments, "--out", str(tmp_path), "--neighbours", "3"])
    printed = capsys.readouterr().out
    assert "20 images" in printed
    assert "deit_ti16, fresh weights" in printed
    assert "These weights are fresh" in printed
    assert len([line for line in printed.splitlines() if re.match(r" *[012]  ", line)]) == 3
    assert len(list((tmp_path / "photographs").rglob("*.png"))) == 20


def test_a_folder_without_classes_has_neighbours_too(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.png").write_bytes(digit(number))
    (folder / "broken.png").touch()
    arguments = ["--data", str(folder), "--model", DIGITS, "--out", str(tmp_path / "out")]
    retrieval.main(arguments)
    printed = capsys.readouterr().out
    assert "4 images" in printed
    assert "1 left out" in printed
    assert re.search(r"^ 0 +65 +– +– +100.0$", printed, re.MULTILINE)
    for number in range(1, 4):
        (folder / f"{number}.png").unlink()
    assert "must be two at least" in refused(capsys, *arguments)


def test_wrong_use_is_one_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    where = ("--out", str(tmp_path / "out"))
    assert "No such file or directory" in refused(capsys, "--data", "nowhere", "--model", DIGITS, *where)
    assert "did you mean" in refused(capsys, "--model", "digit_p1", *where)
    assert "negative" in refused(capsys, "--merge", "-1", *where)
    assert not (tmp_path / "out").exists()
