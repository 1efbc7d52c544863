"""The example on Ray, without Ray: what it does to images and batches. Ray takes too long to start here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

import tomevit
from examples import embed_ray
from tests.helpers import relative_error
from tests.tools.test_shards import digit, write_digits
from tomevit.tasks.demo import held_out
from tomevit.tasks.embed import embed
from tomevit.tasks.embedding_files import read

DIGITS = "digits_p1.tome_r16"


def through(sources: list[dict[str, Any]], batch: int, *arguments: Any) -> list[dict[str, Any]]:
    """What Ray does, in one process: the rows that are written."""
    transform = tomevit.transform(tomevit.create(DIGITS))
    rows = [row for source in sources for row in embed_ray.prepared(source, transform)]
    model = embed_ray.Embedder(DIGITS, *arguments)
    tables = []
    for first in range(0, len(rows), batch):
        group = rows[first : first + batch]
        tables.append(
            model(
                {
                    "key": np.array([row["key"] for row in group]),
                    "image": np.stack([row["image"] for row in group]),
                    "unreadable": np.array([row["unreadable"] for row in group]),
                }
            )
        )
    return pa.concat_tables(tables).to_pylist()


@pytest.mark.parametrize("kind", ["files", "bytes", "shards"])
def test_rows_are_what_tomevit_embed_writes(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    if kind == "shards":
        write_digits(folder / "a.tar", range(9))
        write_digits(folder / "b.tar", range(9, 20))
        (folder / "b.tar").write_bytes((folder / "b.tar").read_bytes()[:-12000])
        broken = [str(folder / "b.tar" / "digit/018"), str(folder / "b.tar")]
    else:
        for number in range(20):
            (folder / f"{number:02}.png").write_bytes(digit(number))
        (folder / "10.png").write_bytes(b"no image")
        broken = [str(folder / "10.png")]
    sources = [{"path": str(path)} for path in sorted(folder.iterdir())]
    if kind == "bytes":
        sources = [{**source, "bytes": Path(source["path"]).read_bytes()} for source in sources]
    rows = through(sources, 7, 8, "mean", 0)
    model = tomevit.create(DIGITS, pretrained=True, r=8)
    report = embed(model, [folder], tmp_path / "out.safetensors", pool="mean")
    theirs = read(tmp_path / "out.safetensors")
    good = [row for row in rows if row["unreadable"] is None]
    assert [row["key"] for row in good] == list(theirs.keys)
    assert relative_error(torch.tensor([row["embedding"] for row in good]), theirs.vectors) < 1e-5
    bad = [(row["key"], row["unreadable"]) for row in rows if row["unreadable"] is not None]
    assert bad == report.unreadable
    assert [key for key, _ in bad] == broken
    assert all(row["embedding"] is None for row in rows if row["unreadable"] is not None)


def test_without_r_it_is_the_models() -> None:
    rows = through([{"path": "0.png", "bytes": digit(0)}], 1, None, None, 0)
    model = tomevit.create(DIGITS, pretrained=True)
    with torch.inference_mode():
        expected = embed_ray.embed.extractor(model, None)(tomevit.transform(model)(held_out()[0][:1]), 16)
    assert relative_error(torch.tensor(rows[0]["embedding"]), expected[0]) < 1e-5


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere", "--out", "new"], "nowhere: No such file or directory"),
        (["0.png", "--out", "."], ". is there already; name another folder"),
        (["0.png", "s3://bucket/a", "--out", "new"], "s3://bucket/a is in a cloud, and others are not"),
        (["0.png", "--out", "new", "--model", "digit_p1"], "did you mean"),
        (["0.png", "--out", "new", "--model", DIGITS, "--merge", "-1"], "negative"),
    ],
)
def test_wrong_use_is_one_sentence(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "0.png").write_bytes(digit(0))
    with pytest.raises(SystemExit) as end:
        embed_ray.main(arguments)
    said = capsys.readouterr().err
    assert (end.value.code, said.count("\n")) == (2, 1)
    assert says in said
    assert [path.name for path in tmp_path.iterdir()] == ["0.png"]


@pytest.mark.parametrize(
    ("arguments", "resources", "says"),
    [
        ([], {"CPU": 2.0}, None),
        (["--models", "2"], {"CPU": 2.0}, "--models 2 leaves no CPU to read images: this cluster has 2"),
        (["--models", "4", "--gpus", "0.5"], {"CPU": 8.0, "GPU": 2.0}, None),
        (["--models", "4", "--gpus", "1"], {"CPU": 8.0, "GPU": 2.0}, "--models 4 --gpus 1 needs 4 GPUs: there are 2"),
    ],
)
def test_a_cluster_that_is_too_small_is_refused(
    arguments: list[str], resources: dict[str, float], says: str | None
) -> None:
    options = embed_ray.read_options(["0.png", "--out", "new", *arguments])
    if says is None:
        embed_ray.enough(resources, options)
    else:
        with pytest.raises(ValueError, match=says):
            embed_ray.enough(resources, options)
