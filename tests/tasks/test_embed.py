"""Embeddings: what they are, that all images have one, and that it does not matter who computes them, or how often."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import tomevit
from tests.helpers import images_for, relative_error, tiny
from tests.outcomes import survives
from tests.project.test_torchrun import torchrun
from tests.tasks.test_cli import run
from tests.tools.test_shards import digit, write_digits, write_shard
from tomevit.config import Preprocess
from tomevit.models import VisionTransformer, build
from tomevit.tasks import embed as module
from tomevit.tasks import embedding_files as embeddings
from tomevit.tasks.demo import held_out
from tomevit.tasks.embed import embed, extractor, width
from tomevit.tasks.embedding_files import read

DIGITS = "digits_p1.tome_r16"
KINDS = [
    {},
    {"pool": "avg"},
    {"pool": "avg", "pool_norm": "after"},
    {"pool_norm": "after"},
    {"dist_token": True},
    {"reg_tokens": 3, "pool": "avg"},
    {"pool": "token_avg", "reg_tokens": 2},
    {"pool": "token_avg"},
    {"pool": "map", "pool_heads": 2},
    {"pool": "map", "proj_dim": 10},
    {"proj_dim": 10, "pre_norm": True},
]


@pytest.fixture(scope="module")
def model() -> VisionTransformer:
    return tomevit.create(DIGITS, pretrained=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty digits and four files that are none, here and there among them."""
    path = tmp_path_factory.mktemp("digits")
    for number in range(60):
        (path / f"{number:02}.png").write_bytes(digit(number))
    (path / "00.jpg").write_bytes(b"no image")
    (path / "07.tif").touch()
    (path / "41.jpeg").write_bytes(digit(0)[:90])
    (path / "99.gif").write_bytes(b"GIF89a")
    return path


READABLE = [f"{number:02}.png" for number in range(60)]
BROKEN = ["00.jpg", "07.tif", "41.jpeg", "99.gif"]


@pytest.fixture(scope="module")
def expected(model: VisionTransformer) -> Tensor:
    """Of the sixty digits, from a model without a head."""
    headless = tomevit.create(DIGITS, pretrained=True, num_classes=0)
    with torch.inference_mode():
        return headless(tomevit.transform(model)(held_out()[0][:60]))


def tiny_grey(**fields: Any) -> VisionTransformer:
    """For digits."""
    model = tiny(img_size=(8, 8), in_chans=1, **fields)
    model.card = replace(model.card, config=model.config, preprocess=Preprocess(mean=(0.3,), std=(0.4,), crop_pct=1.0))
    return model


def names(keys: Any) -> list[str]:
    return [Path(key).name for key in keys]


# ------------------------------------------------------------------------------------------------------------ features


@pytest.mark.parametrize("r", [0, 5])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_by_default_features_are_what_the_head_reads(kind: dict[str, Any], r: int) -> None:
    model = tiny(r, **kind)
    headless = build(tiny(num_classes=0, **kind).config, r).eval()
    headless.load_state_dict({name: value for name, value in model.state_dict().items() if "head" not in name})
    images = images_for(model)
    with torch.inference_mode():
        features = extractor(model)(images)
        assert torch.equal(features, headless(images))
        if not kind.get("dist_token"):
            assert torch.equal(model.head(features), model(images))
    assert features.shape == (3, width(model.config)) == (3, model.config.num_features)


@pytest.mark.parametrize("r", [0, 5])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_each_pooling_is_what_its_name_says(kind: dict[str, Any], r: int) -> None:
    model = tiny(**kind)
    images, prefix = images_for(model), model.config.num_prefix
    with torch.inference_mode():
        tokens = model.forward_features(images, r)
        patches = tomevit.unmerge(tokens)[:, prefix:]
        cls, mean = (
            model.fc_norm(tokens.x[:, 0]) if model.config.pool != "token_avg" else tokens.x[:, 0],
            patches.mean(1),
        )
        mean = model.fc_norm(mean) if model.config.pool != "token_avg" else mean
        expected = {"cls": cls, "mean": mean, "cls+mean": torch.cat([cls, mean], 1)}
        if model.attn_pool is not None:
            expected["map"] = model.attn_pool(tokens)
        if model.config.proj_dim:
            model.reset_classifier(0)
            expected["proj"] = model(images, r)
        for pool, wanted in expected.items():
            found = extractor(model, pool)(images, r=r)
            assert found.shape == (3, width(model.config, pool))
            assert relative_error(found, wanted) < 1e-5


def test_an_extractor_leaves_the_model_as_it_is_and_shares_its_weights() -> None:
    model = tiny().train()
    images = images_for(model)
    features = {pool: extractor(model, pool) for pool in (None, "cls", "mean")}
    assert model.training
    assert model.head.out_features == 7
    before = {pool: call(images) for pool, call in features.items()}
    with torch.no_grad():
        model.cls_token += 1
    assert all(not torch.equal(call(images), before[pool]) for pool, call in features.items())


def test_a_model_that_answers_with_vectors_runs_as_it_was_optimized() -> None:
    model = tiny(num_classes=0)
    assert extractor(model) is model
    assert extractor(model, "mean") is not model
    assert extractor(model.train()) is not model


def test_wrong_poolings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pool is 'max', and must be cls, mean, cls\+mean, map or proj"):
        extractor(tiny(), "max")
    with pytest.raises(ValueError, match="no class token: pool must be mean"):
        extractor(tiny(class_token=False, pool="avg"), "cls")
    with pytest.raises(ValueError, match=r"no class token: pool must be mean or map"):
        extractor(tiny(class_token=False, pool="map"), "cls+mean")
    with pytest.raises(ValueError, match=r"no projection: pool must be cls, mean or cls\+mean"):
        extractor(tiny(), "proj")
    with pytest.raises(ValueError, match=r"no attention pooling: pool must be cls, mean, cls\+mean or proj"):
        extractor(tiny(proj_dim=5), "map")
    with pytest.raises(ValueError, match=r"norms its class token beside the mean patch: pool must be cls\+mean"):
        extractor(tiny(pool="token_avg", pool_norm="after"), "mean")


@pytest.mark.parametrize(
    ("fields", "pool", "dim", "by_angle"),
    [
        ({"proj_dim": 10}, None, 10, True),  # CLIP
        ({"proj_dim": 10}, "proj", 10, True),
        ({"proj_dim": 10}, "cls", 24, False),
        ({"pool": "map", "class_token": False}, None, 24, True),  # SigLIP
        ({"pool": "map", "proj_dim": 6}, "map", 24, False),  # PE core, before the projection
        ({"pool": "token_avg"}, None, 48, False),
        ({}, None, 24, False),
        ({}, "cls+mean", 48, False),
        ({"proj_dim": 10, "num_classes": 7}, None, 10, False),  # with a head that was trained to classify
    ],
)
def test_vectors_that_are_compared_by_angle_are_of_unit_length(
    fields: dict[str, Any], pool: Any, dim: int, by_angle: bool, folder: Path, tmp_path: Path
) -> None:
    model = tiny_grey(**{"num_classes": 0} | fields)
    found = {}
    for normalize in (None, True, False):
        out = tmp_path / f"{normalize}.safetensors"
        assert embed(model, [folder / "01.png"], out, pool=pool, normalize=normalize).dim == dim
        found[normalize] = read(out)
    assert found[None].info["normalize"] is by_angle
    assert found[None].info["pool"] == (pool or module.pooling(model.config))
    assert torch.equal(found[None].vectors, found[by_angle].vectors)
    assert found[True].vectors.norm().item() == pytest.approx(1)
    assert found[False].vectors.norm().item() != pytest.approx(1)


# --------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("suffix", [".safetensors", ".parquet"])
@pytest.mark.parametrize("batch", [1, 7, 500])
def test_every_image_has_its_vector_and_every_other_file_its_reason(
    suffix: str, batch: int, workers: int, model: VisionTransformer, folder: Path, expected: Tensor, tmp_path: Path
) -> None:
    out, told = tmp_path / f"out{suffix}", []
    report = embed(model, [folder], out, batch=batch, workers=workers, progress=lambda *what: told.append(what))
    found = read(out)
    assert names(found.keys) == READABLE
    assert relative_error(found.vectors, expected) < 1e-5
    assert (report.rows, report.dim, report.num_unreadable) == (60, 64, 4)
    assert names(name for name, _ in report.unreadable) == BROKEN
    assert [reason for _, reason in report.unreadable][:2] == ["not an image of a known format", "the file is empty"]
    assert [tuple(name) for name in found.info["unreadable"]] == report.unreadable
    assert {"model": DIGITS, "r": 16, "pool": "cls", "rows": 60, "dim": 64}.items() <= found.info.items()
    assert found.shard is None
    assert os.listdir(tmp_path) == [out.name]  # noqa: PTH208
    for stage, total in (("embedding", 64), ("writing", 60)):
        done = [done for now, done, of in told if now == stage and of == total]
        assert done == sorted(done)
        assert done[-1] == total
    assert len({(now, of) for now, _, of in told}) == 2


def test_vectors_are_stored_as_asked(model: VisionTransformer, folder: Path, expected: Tensor, tmp_path: Path) -> None:
    for suffix in embeddings.SUFFIXES:
        out = tmp_path / f"half{suffix}"
        embed(model, [folder], out, dtype=torch.float16, normalize=True)
        found = read(out)
        assert found.vectors.dtype == torch.float16
        assert relative_error(found.vectors.float(), F.normalize(expected, dim=1)) < 2**-10
        assert found.info["normalize"] is True


def test_r_and_the_pooling_are_as_asked(model: VisionTransformer, folder: Path, tmp_path: Path) -> None:
    images = tomevit.transform(model)(held_out()[0][:60])
    for r, pool in ((0, "cls"), (0.1, "mean"), ((8, -1.0), None)):
        out = tmp_path / f"{r}{pool}.safetensors"
        embed(model, [folder], out, r=r, pool=pool)
        with torch.inference_mode():
            assert relative_error(read(out).vectors, extractor(model, pool)(images, r)) < 1e-5
    assert model.r == 16


def test_other_tools_read_the_files(model: VisionTransformer, folder: Path, expected: Tensor, tmp_path: Path) -> None:
    import pyarrow.parquet as pq
    from safetensors.numpy import load_file

    embed(model, [folder], tmp_path / "a.safetensors")
    embed(model, [folder], tmp_path / "a.parquet")
    tensors, rows = load_file(tmp_path / "a.safetensors"), pq.read_table(tmp_path / "a.parquet").to_pylist()
    assert np.array_equal(tensors["embeddings"], np.array([row["embedding"] for row in rows], np.float32))
    ends = [0, *tensors["key_ends"].tolist()]
    keys = [tensors["keys"][a:b].tobytes().decode() for a, b in pairwise(ends)]
    assert keys == [row["key"] for row in rows] == [str(folder / name) for name in READABLE]
    schema = pq.read_schema(tmp_path / "a.parquet")
    assert str(schema.field("embedding").type) == "fixed_size_list<element: float>[64]"
    assert json.loads(schema.metadata[b"tomevit_embeddings"])["r"] == 16


@pytest.mark.parametrize("suffix", embeddings.SUFFIXES)
def test_whatever_a_file_is_called_it_has_a_key(suffix: str, model: VisionTransformer, tmp_path: Path) -> None:
    folder = tmp_path / "ü 東京"
    folder.mkdir()
    odd = os.fsdecode(b"a\xff\n.png")
    try:
        (folder / odd).write_bytes(digit(0))
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    (folder / "b {1..2}.png").write_bytes(digit(1))
    embed(model, [folder], tmp_path / f"out{suffix}")
    # Parquet's strings are UTF-8, whatever comes.
    assert list(read(tmp_path / f"out{suffix}").keys) == [
        str(folder / (odd if suffix == ".safetensors" else "a?\n.png")),
        str(folder / "b {1..2}.png"),
    ]


@pytest.mark.parametrize("suffix", embeddings.SUFFIXES)
def test_a_file_may_hold_no_vector(suffix: str, model: VisionTransformer, tmp_path: Path) -> None:
    (tmp_path / "none.png").touch()
    report = embed(model, [tmp_path / "none.png"], tmp_path / f"out{suffix}")
    assert report == (0, 64, 1, [(str(tmp_path / "none.png"), "the file is empty")])
    found = read(tmp_path / f"out{suffix}")
    assert (found.vectors.shape, len(found.keys)) == ((0, 64), 0)


def test_large_files_of_parquet_have_large_groups(model: VisionTransformer, folder: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embeddings, "ROW_GROUP", 25 * 64 * 4)
        embed(model, [folder], tmp_path / "a.parquet", batch=4)
    file = pq.ParquetFile(tmp_path / "a.parquet").metadata
    assert [file.row_group(i).num_rows for i in range(file.num_row_groups)] == [26, 27, 7]
    embed(model, [folder], tmp_path / "b.safetensors")
    assert relative_error(read(tmp_path / "a.parquet").vectors, read(tmp_path / "b.safetensors").vectors) < 1e-5


# -------------------------------------------------------------------------------------------------------------- shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five shards of twelve digits each. The third has a broken member too, and the last is cut off at its last."""
    path = tmp_path_factory.mktemp("shards")
    for shard in range(5):
        write_digits(path / f"s-{shard:03}.tar", range(12 * shard, 12 * shard + 12))
    members = [(f"digit/{number:03}.png", digit(number)) for number in range(24, 36)]
    write_shard(path / "s-002.tar", [*members[:4], ("digit/broken.jpg", b"no image"), *members[4:]])
    whole = (path / "s-004.tar").read_bytes()
    (path / "s-004.tar").write_bytes(whole[: whole.rindex(b"digit/059") + 30])
    return path


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("suffix", embeddings.SUFFIXES)
def test_shards_are_read_as_streams(
    suffix: str,
    workers: int,
    model: VisionTransformer,
    shards: Path,
    expected: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "OF_SHARD", 4)
    out, told = tmp_path / f"out{suffix}", []
    report = embed(
        model, [f"{shards}/s-{{000..004}}.tar"], out, batch=2, workers=workers, progress=lambda *what: told.append(what)
    )
    found = read(out)
    assert list(found.keys) == [f"digit/{number:03}" for number in range(59)]
    assert relative_error(found.vectors, expected[:59]) < 1e-5
    assert found.info["shards"] == [f"{shards}/s-{shard:03}.tar" for shard in range(5)]
    assert found.shard is not None
    assert found.shard.tolist() == [number // 12 for number in range(59)]
    assert report.unreadable == [
        (f"{shards}/s-002.tar/digit/broken.jpg", "not an image of a known format"),
        (f"{shards}/s-004.tar/digit/059", "no image in this sample, which holds cls"),
        (f"{shards}/s-004.tar", "damaged after 12 samples: truncated header"),
    ]
    assert [of for now, _, of in told if now == "embedding"] == [None] * sum(now == "embedding" for now, _, _ in told)
    assert max(done for now, done, _ in told if now == "embedding") == 62


def test_what_sources_name(folder: Path, shards: Path, tmp_path: Path) -> None:
    assert module.locate([shards]).sharded
    assert not module.locate([folder]).sharded
    assert names(module.locate([f"{folder}/{{03,01}}.png", folder / "02.png"]).names) == ["03.png", "01.png", "02.png"]
    for sources, complaint in (
        ([folder, shards], f"{shards} is of WebDataset, and {folder} is not"),
        ([f"{shards}/s-{{000..009}}.tar"], "s-005.tar: No such file or directory"),
        ([], "nothing to embed"),
        ([tmp_path], "no image in this folder"),
    ):
        with pytest.raises(ValueError, match=complaint):
            module.locate(sources)


# -------------------------------------------------------------------------------------------------- stopped and resumed


def stopped(stop: str, number: int, of_shard: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command that is stopped in its n-th part, with all processes that it started, as by Ctrl-C in a terminal."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.stopped_embed", stop, str(number), str(of_shard), *arguments],
        capture_output=True,
        text=True,
        start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        timeout=240,
    )


@survives(
    "machine",
    "embed killed at any time, in one process or several",
    "the same command goes on after the last part that was finished",
)
def test_after_kill_9_the_same_command_goes_on_to_the_same_bytes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def arguments(name: str) -> list[str]:
        return ["embed", str(folder), "-o", str(tmp_path / name), "--model", DIGITS, "--batch", "3", "--workers", "2"]

    assert run(capsys, *arguments("whole.safetensors"))[0] == 1
    assert stopped("SIGKILL", 9, 1, *arguments("out.safetensors")).returncode == -signal.SIGKILL
    parts = tmp_path / "out.safetensors.parts"
    before = {path.name: path.stat().st_mtime_ns for path in parts.glob("*.safetensors") if path.name[0] != "."}
    assert len(before) == 8
    assert not (tmp_path / "out.safetensors").exists()

    (parts / "00000000-00000002.safetensors").write_bytes(b"damaged")
    with pytest.MonkeyPatch.context() as patch:
        written: list[str] = []
        write = embeddings.write_part
        patch.setattr(
            embeddings, "write_part", lambda path, *rest, **more: (written.append(path), write(path, *rest, **more))
        )
        status, out, err = run(capsys, *arguments("out.safetensors"))
    assert len(written) == 22 - 7
    assert "going on after 21 images" in err
    assert (status, out) == (1, f"{tmp_path / 'out.safetensors'}: 60 vectors of 64 float32 numbers\n")
    assert (tmp_path / "out.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.safetensors", "whole.safetensors"]


def test_after_ctrl_c_the_same_command_goes_on_to_the_same_bytes(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "OF_SHARD", 4)

    def arguments(name: str) -> list[str]:
        return ["embed", str(shards), "-o", str(tmp_path / name), "--model", DIGITS, "--batch", "2", "--workers", "2"]

    assert run(capsys, *arguments("whole.parquet"))[0] == 1
    done = stopped("SIGINT", 7, 4, *arguments("out.parquet"))
    assert done.returncode == 130
    assert done.stdout == ""
    said = done.stderr.splitlines()
    assert len([line for line in said if line]) == 2
    assert "embedding stopped after" in done.stderr
    assert f"{tmp_path / 'out.parquet'}.parts keeps all parts that were finished" in done.stderr
    assert said[-1] == "tomevit: interrupted"
    assert len(list((tmp_path / "out.parquet.parts").glob("*.safetensors"))) == 6
    status, _, err = run(capsys, *arguments("out.parquet"))
    assert status == 1
    assert "going on after" in err
    assert (tmp_path / "out.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()


class Interrupt:
    """Progress that presses Ctrl-C, in this process, when so many images are done."""

    def __init__(self, done: int) -> None:
        self.done = done

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        if done >= self.done:
            raise KeyboardInterrupt


def test_what_was_begun_otherwise_is_refused(model: VisionTransformer, folder: Path, tmp_path: Path) -> None:
    out, parts = tmp_path / "out.safetensors", tmp_path / "out.safetensors.parts"
    files = sorted(folder.glob("*.png"))[:20]
    with pytest.raises(KeyboardInterrupt):
        embed(model, files, out, batch=4, progress=Interrupt(12))
    kept = sorted(path.name for path in parts.glob("*.safetensors"))
    assert len(kept) == 3

    def refused(pattern: str, model: VisionTransformer = model, sources: Any = files, **changes: Any) -> None:
        with pytest.raises(ValueError, match=pattern):
            embed(model, sources, out, **{"batch": 4, **changes})
        assert sorted(path.name for path in parts.glob("*.safetensors")) == kept

    other = tomevit.create("digits_p1.plain", pretrained=True, r=16)
    changed = tomevit.create(DIGITS, pretrained=True)
    with torch.no_grad():
        changed.blocks[2].norm1.bias[5] += 1
    refused("was begun with r 16, not 8: give the same again, name another file, or overwrite", r=8)
    refused("was begun with pool cls, not mean", pool="mean")
    refused("was begun with normalize False, not True", normalize=True)
    refused("was begun with dtype float32, not float16", dtype=torch.float16)
    refused("was begun with upright False, not True", upright=True)
    refused("was begun with computed float32, not bfloat16", tomevit.create(DIGITS, pretrained=True).bfloat16())
    refused(f"was begun with model {DIGITS}, not digits_p1.plain", other)
    refused("was begun with weights [0-9a-f]{64}, not [0-9a-f]{64}", changed)
    refused("was begun with data 20 files, sha256 [0-9a-f]+, not 19 files", sources=files[1:])
    refused("was begun with data 20 files, sha256 [0-9a-f]+, not 20 files", sources=[*files[1:], files[0]])
    refused("has parts of 4 images, which batches of 3 do not divide", batch=3)

    assert embed(model, files, out, batch=2).rows == 20
    with pytest.raises(ValueError, match=r"out.safetensors was made with r 16, not 8"):
        embed(model, files, out, r=8)
    assert embed(model, files, out, r=8, overwrite=True).rows == 20
    assert read(out).info["r"] == 8
    assert not parts.exists()


def test_words_are_stored_as_the_numbers_they_mean(model: VisionTransformer, tmp_path: Path) -> None:
    out, files = tmp_path / "out.safetensors", [tmp_path / f"{i}.png" for i in range(4)]
    for i, file in enumerate(files):
        file.write_bytes(digit(i))
    embed(model, files, out, r="1.3x", batch=2)
    vectors, plain = read(out).vectors, model.plain("1.3x")
    assert read(out).info["r"] == plain
    embed(model, files, out, r=plain, batch=2)  # the same
    with pytest.raises(ValueError, match=r"was made with r .*, not \['8 pitome'"):
        embed(model, files, out, r="8 pitome", batch=2)
    embed(model, files, out, r=["4+4 diffrate"], batch=2, overwrite=True)
    assert read(out).info["r"] == ["4+4 diffrate"]
    assert not torch.equal(read(out).vectors, vectors)


def test_a_copy_counts_as_the_same(model: VisionTransformer, tmp_path: Path) -> None:
    """Sizes and contents are compared, not times: data may be brought to a machine anew for each run."""
    out, files = tmp_path / "out.safetensors", [tmp_path / f"{i}.png" for i in range(3)]
    for i, file in enumerate(files):
        file.write_bytes(digit(i))
    with pytest.raises(KeyboardInterrupt):
        embed(model, files, out, batch=1, progress=Interrupt(2))
    os.utime(files[0], (1, 1))
    files[1].write_bytes(digit(1) + b"more")
    with pytest.raises(ValueError, match="was begun with data 3 files"):
        embed(model, files, out, batch=1)
    files[1].write_bytes(digit(1))
    assert embed(model, files, out, batch=1).rows == 3


def test_what_is_there_is_not_computed_again(
    model: VisionTransformer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, parts = tmp_path / "out.safetensors", tmp_path / "out.safetensors.parts"
    with pytest.raises(KeyboardInterrupt):
        embed(model, [folder], out, progress=Interrupt(64))
    plan = (parts / "run.json").read_bytes()
    report = embed(model, [folder], out)
    before = out.stat()
    parts.mkdir()  # as if it had been killed while it removed them
    (parts / "run.json").write_bytes(plan)
    monkeypatch.setattr(module, "_make_parts", None)
    assert embed(model, [folder], out) == report
    assert (out.stat().st_ino, out.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert not parts.exists()


def test_an_overwriting_run_goes_on_as_well(model: VisionTransformer, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    embed(model, [folder], out, r=8)
    told: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        embed(model, [folder], out, batch=4, overwrite=True, progress=Interrupt(40))
    assert read(out).info["r"] == 8
    embed(model, [folder], out, batch=4, overwrite=True, progress=lambda stage, done, _: told.append(done))
    assert told[0] == 40
    assert read(out).info["r"] == 16


def test_what_is_not_ours_is_left_alone(model: VisionTransformer, folder: Path, tmp_path: Path) -> None:
    out, parts = tmp_path / "mine.safetensors", tmp_path / "mine.safetensors.parts"
    tomevit.save(model, out)
    before = out.read_bytes()
    with pytest.raises(ValueError, match="holds no embeddings of tomevit's"):
        embed(model, [folder], out)
    assert out.read_bytes() == before
    out.unlink()
    parts.mkdir()
    (parts / "thesis.tex").touch()
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="is in the way: parts are kept there, and it holds something else"):
            embed(model, [folder], out, overwrite=overwrite)
    assert (parts / "thesis.tex").exists()


def test_vectors_that_are_no_numbers_end_it(folder: Path, tmp_path: Path) -> None:
    model = tomevit.create(DIGITS, pretrained=True)
    with torch.no_grad():
        model.norm.weight *= 1e5
    with pytest.raises(ValueError, match=r"00\.png: its vector is not finite"):
        embed(model, [folder], tmp_path / "a.safetensors", dtype=torch.float16)
    assert embed(model, [folder], tmp_path / "b.safetensors").rows == 60


def test_a_batch_that_does_not_fit_is_told(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise torch.OutOfMemoryError

    model = tiny_grey()
    monkeypatch.setattr(type(model), "forward", full)
    with pytest.raises(ValueError, match="a batch of 32 does not fit into the memory of cpu"):
        embed(model, [folder], tmp_path / "a.safetensors")


@pytest.mark.skipif(sys.platform == "win32", reason="the system limits no file's size")
@pytest.mark.parametrize("suffix", embeddings.SUFFIXES)
@pytest.mark.parametrize(
    ("writes", "file"), [("write_part", "out{}.parts/00000000-00000000.safetensors"), ("join", "out{}")]
)
def test_a_full_disk_is_told_and_the_run_can_go_on(
    writes: str, file: str, suffix: str, model: VisionTransformer, folder: Path, tmp_path: Path
) -> None:
    import resource

    out, write = tmp_path / f"out{suffix}", getattr(embeddings, writes)

    def full(*args: Any, **more: Any) -> None:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        try:
            write(*args, **more)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embeddings, writes, full)
        with pytest.raises(OSError, match="File too large") as caught:
            embed(model, [folder], out)
    assert caught.value.filename == str(tmp_path / file.format(suffix))
    assert "\n" not in str(caught.value)
    assert not out.exists()
    assert embed(model, [folder], out).rows == 60


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
@pytest.mark.usefixtures("no_garbage_collection")
def test_a_reader_that_dies_is_told_and_the_run_can_go_on(
    model: VisionTransformer, folder: Path, tmp_path: Path
) -> None:
    others = {process.pid for process in multiprocessing.active_children()}

    def progress(stage: str, done: int, total: int | None) -> None:
        if done == 2:
            (reader,) = {process.pid for process in multiprocessing.active_children()} - others
            os.kill(reader, signal.SIGKILL)

    files = sorted(folder.glob("*.png")) * 20
    with pytest.raises(
        OSError, match=r"a process that reads images died: DataLoader worker .*(Killed|exited unexpectedly)"
    ):
        embed(model, files, tmp_path / "out.safetensors", batch=2, workers=1, progress=progress)
    assert embed(model, files, tmp_path / "out.safetensors", batch=2).rows == 1200


# ------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="Linux says how much memory a process has")
@pytest.mark.parametrize("suffix", embeddings.SUFFIXES)
def test_memory_does_not_grow_with_the_images(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "ROW_GROUP", 2**20)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    # To keep the vectors of the last 1500 images, of 64 KB each, would be 96 MB. Allocators keep some for themselves.
    model = tiny_grey()
    model.config = replace(model.config, embed_dim=2**14, num_heads=1)
    monkeypatch.setattr(module, "extractor", lambda *_: lambda images, r: torch.ones(len(images), 2**14))
    (tmp_path / "0.png").write_bytes(digit(0))
    seen: list[tuple[str, int, int]] = []
    report = embed(
        model,
        [tmp_path / "0.png"] * 2000,
        tmp_path / f"out{suffix}",
        batch=20,
        progress=lambda stage, done, _: seen.append((stage, done, resident())),
    )
    assert report.rows == 2000
    for stage in ("embedding", "writing"):
        sizes = [size for now, done, size in seen if now == stage and done >= 500]
        assert len(sizes) > 20
        assert max(sizes) - sizes[0] < 32 * 2**20


# ---------------------------------------------------------------------------------------------------- many processes


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch is built without torch.distributed")
def test_two_processes_write_the_file_of_one_and_go_on_after_kill_9(
    model: VisionTransformer, folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "two.safetensors"
    arguments = ["embed", str(folder), "-o", str(out), "--model", DIGITS, "--batch", "5", "--workers", "0", "--r", "8"]

    def launch(call: int, *more: str) -> str:
        # Python 3.11's argparse in torchrun would take an --r for its own, but for the two dashes.
        return torchrun("--", "tests.stopped_embed", "SIGKILL", str(call), "1", *arguments, *more)

    printed = launch(0, "-o", str(tmp_path / "two.csv"))
    assert printed.count("two.csv ends in .csv, and must end in .safetensors or .parquet") == 1, printed
    assert not list(tmp_path.iterdir())
    printed = launch(3)
    assert not out.exists(), printed
    assert (tmp_path / "two.safetensors.parts").exists(), printed
    printed = launch(0)
    begun = re.findall(r"going on after (\d+) images", printed)
    assert len(begun) == 1, printed
    assert 0 < int(begun[0]) < 64
    assert printed.count("vectors of 64 float32 numbers") == 1, printed
    assert printed.count("left out: ") == 4, printed
    embed(model, [folder], tmp_path / "one.safetensors", r=8, batch=5)
    two, one = read(out), read(tmp_path / "one.safetensors")
    assert list(two.keys) == list(one.keys)
    assert two.info == one.info
    assert relative_error(two.vectors, one.vectors) < 1e-5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.safetensors", "two.safetensors"]


@pytest.mark.parametrize("world", [1, 2, 3, 100])
def test_shares_are_all_of_it(world: int, folder: Path, shards: Path, tmp_path: Path) -> None:
    for sources in ([folder], [shards]):
        data = module.locate(sources)
        shares = [module._remaining(tmp_path, data, 3, rank, world) for rank in range(world)]
        whole = module._remaining(tmp_path, data, 3, 0, 1)
        assert sorted(place for share in shares for place in share.begin) == whole.begin
        assert whole.total is None or sum(share.total or 0 for share in shares) == whole.total == 64
        assert max(len(share.begin) for share in shares) - min(len(share.begin) for share in shares) <= 1


# ------------------------------------------------------------------------------------------------------------- reading


def test_files_of_other_kinds_are_refused(model: VisionTransformer, folder: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    tomevit.save(model, tmp_path / "model.safetensors")
    (tmp_path / "text.safetensors").write_text("text")
    (tmp_path / "text.parquet").write_text("text")
    pq.write_table(pa.table({"key": ["a"]}), tmp_path / "table.parquet")
    embed(model, [folder], tmp_path / "good.safetensors")
    data = (tmp_path / "good.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[:-1])
    (tmp_path / "newer.safetensors").write_bytes(data.replace(rb"{\"version\": 1,", rb"{\"version\": 2,"))
    for name in ("model.safetensors", "text.safetensors", "text.parquet", "table.parquet", "cut.safetensors"):
        with pytest.raises(ValueError, match=f"{name} holds no embeddings of tomevit's, or is damaged"):
            read(tmp_path / name)
    with pytest.raises(ValueError, match=r"newer.safetensors is of format version 2; this tomevit reads 1"):
        read(tmp_path / "newer.safetensors")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none.safetensors"):
        read(tmp_path / "none.safetensors")


# ------------------------------------------------------------------------------------------------------------- command


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "DIR|FILES|WEBDATASET"),
        (["nowhere", "-o", "a.safetensors"], "nowhere: No such file or directory"),
        (["{folder}"], "--out"),
        (["{folder}", "-o", "a.csv"], ".safetensors or .parquet"),
        (["{folder}", "-o", "/nowhere/a.parquet"], "/nowhere"),
        (["{folder}", "-o", "a.parquet", "--pool", "max"], "cls"),
        (["{folder}", "-o", "a.parquet", "--pool", "proj"], "this model has no projection: pool must be cls, mean"),
        (["{folder}", "-o", "a.parquet", "--r", "-1"], "negative"),
        (["{folder}", "-o", "a.parquet", "--r", "[1,1,1,1,1,1,1,1,1]"], "the model has"),
        (["{folder}", "-o", "a.parquet", "--store", "int8"], "float16"),
        (["{folder}", "-o", "a.parquet", "--dtype", "int8"], "bfloat16"),
        (["{folder}", "-o", "a.parquet", "--batch", "0"], "--batch"),
        (["{folder}", "-o", "a.parquet", "--workers", "-1"], "--workers"),
        (["{folder}", "-o", "a.parquet", "--device", "abacus"], "abacus"),
        (["{folder}", "-o", "a.parquet", "--model", "digit_p1"], "digits_p1"),
        (["{folder}", "-o", "a.parquet", "--img-size", "big"], "224x320"),
    ],
)
def test_a_mistake_gets_one_clear_line(
    arguments: list[str],
    says: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [argument.format(folder=folder) for argument in arguments]
    status, out, err = run(capsys, "embed", "--model", DIGITS, *arguments)
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1
    assert err.startswith("tomevit: ")
    assert says in err
    assert not list(tmp_path.iterdir())


def test_every_option_arrives(
    model: VisionTransformer, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "a.safetensors"
    arguments = [
        "embed",
        f"{folder}/0*.png",
        "-o",
        str(out),
        "--model",
        DIGITS,
        "--r",
        "4",
        "--pool",
        "mean",
        "--upright",
    ]
    arguments += ["--normalize", "--store", "float16", "--dtype", "bfloat16", "--batch", "4", "--workers", "0"]
    status, printed, err = run(capsys, *arguments)
    assert (status, printed, err) == (0, f"{out}: 10 vectors of 64 float16 numbers\n", "")
    info = read(out).info
    wanted = {"r": 4, "pool": "mean", "upright": True, "normalize": True, "dtype": "float16", "computed": "bfloat16"}
    assert wanted.items() <= info.items()
    model = tomevit.create(DIGITS, pretrained=True).bfloat16()
    with torch.inference_mode():
        vectors = extractor(model, "mean")(tomevit.transform(model)(held_out()[0][:10]), r=4).float()
    assert relative_error(read(out).vectors.float(), F.normalize(vectors, dim=1)) < 2**-6
    assert run(capsys, *arguments, "--device", "cpu", "--img-size", "8")[0] == 0
    assert run(capsys, *arguments, "--overwrite", "--r", "0")[0] == 0
    assert read(out).info["r"] == 0
