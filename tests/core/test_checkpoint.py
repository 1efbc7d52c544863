"""tomevit's file: everything comes back, exactly, or an error says why not."""

from __future__ import annotations

import json
import os
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open

import tomevit
from tests.helpers import images_for, tiny
from tomevit import cards
from tomevit.cards import Card
from tomevit.config import Figure, Preprocess, Source
from tomevit.headers import read_header
from tomevit.layers import bipartite_soft_matching
from tomevit.schedule import Schedule
from tomevit.weights import checkpoint
from tomevit.weights.reading import read_tensors

CARD = Card(
    name="mine",
    weights="v1",
    title="Mine",
    papers=("a paper",),
    preprocess=Preprocess(mean=(0.1, 0.2, 0.3), std=(1 / 3, 0.5, 0.7), crop_pct=0.9, resize="squash"),
    licence="mit",
    sources=(Source(format="native", url="https://example.org/mine", sha256="abc"),),
    figures=(Figure(top1=99.5, r=3, source="a test"),),
    class_names=("α", 'quote "', "new\nline", "d", "e", "f", "g"),
    notes="été",
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def contents(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118 - not a mapping


def rewrite(path: Path, *, drop: str = "", add: dict[str, Any] | None = None, metadata: str | None = None) -> None:
    """The same file with tensors or the metadata's one entry changed."""
    tensors, old = contents(path)
    tensors = {name: tensor for name, tensor in tensors.items() if name != drop} | (add or {})
    safetensors.torch.save_file(tensors, path, old if metadata is None else {cards.KEY: metadata})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("r", [0, 8, (8, -1.0), (3, 1 / 3), [3, 2, 1], [4, 0], [], 1 / 7], ids=repr)
def test_round_trip_is_exact(path: Path, r: Schedule, dtype: torch.dtype) -> None:
    model = tiny(r, dist_token=True, layer_scale=1e-5, drop_path=0.1, matching="every_kth").to(dtype)
    tomevit.save(model, path, card=CARD)
    again = tomevit.load(path)
    assert not again.training
    assert again.config == model.config
    assert again.r == r
    assert type(again.r) is type(r)
    assert again.card == replace(CARD, config=model.config, r=r)
    assert list(again.state_dict()) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        stored = again.state_dict()[name]
        assert stored.dtype == dtype
        assert torch.equal(stored, tensor)
    assert all(p.requires_grad and p.is_leaf for p in again.parameters())
    images = images_for(model).double()
    with torch.inference_mode():
        torch.testing.assert_close(again.double()(images), model.double()(images), rtol=0, atol=1e-12)


def test_mixed_dtypes_stay_mixed(path: Path) -> None:
    model = tiny()
    model.head.double()
    tomevit.save(model, path)
    again = tomevit.load(path)
    assert again.head.weight.dtype == torch.float64
    assert again.dtype == torch.float32


@pytest.mark.parametrize(
    "fields",
    [
        {"img_size": (16, 32), "in_chans": 1, "num_classes": 0},
        {"class_token": False, "pool": "avg", "pool_norm": "after"},
        {"reg_tokens": 2, "pos_embed_prefix": False, "qk_norm": True, "qkv_bias": False, "pre_norm": True},
        {"act": "quick_gelu", "mlp_ratio": 2.5, "norm_eps": 1e-5, "prop_attn": False},
    ],
    ids=repr,
)
def test_every_config_comes_back(path: Path, fields: dict[str, Any]) -> None:
    model = tiny(2, **fields)
    tomevit.save(model, path)
    again = tomevit.load(path)
    assert again.config == model.config
    images = images_for(model).double()
    with torch.inference_mode():
        torch.testing.assert_close(again.double()(images), model.double()(images), rtol=0, atol=1e-12)


def test_fresh_weights_are_no_published_ones(path: Path) -> None:
    model = tomevit.create("deit_ti16.tome_r13", num_classes=10, img_size=32)
    tomevit.save(model, path)
    again = tomevit.load(path)
    card = tomevit.card("deit_ti16.tome_r13")
    assert again.r == card.r == 13
    assert again.card.preprocess == card.preprocess
    assert again.card.full_name == "deit_ti16"
    assert (again.card.licence, again.card.sources, again.card.figures) == (None, (), ())


def test_saving_again_gives_the_same_file(path: Path) -> None:
    tomevit.save(tiny(8), path, card=CARD)
    before = path.read_bytes()
    tomevit.save(tomevit.load(path), path)
    assert path.read_bytes() == before


def test_files_have_the_users_permissions(path: Path) -> None:
    plain = path.with_name("plain")
    plain.touch()
    tomevit.save(tiny(), path)
    assert path.stat().st_mode == plain.stat().st_mode


def test_a_loaded_model_does_not_change_its_file(path: Path) -> None:
    tomevit.save(tiny(8), path)
    before = path.read_bytes()
    model = tomevit.load(path)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(3.0)
    assert path.read_bytes() == before


def test_a_loaded_model_does_not_need_its_file(path: Path) -> None:
    model = tiny(8, seed=1)
    tomevit.save(model, path)
    stays = path.with_name("stays.safetensors")
    tomevit.save(tiny(8, seed=2), stays)
    before = path.read_bytes()
    for damage in (lambda: path.write_bytes(stays.read_bytes()), lambda: os.truncate(path, 100), path.unlink):
        path.write_bytes(before)
        loaded, optimized = tomevit.load(path), tomevit.optimize(tomevit.load(path), packed=False, keep_memory=False)
        damage()
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor)
        torch.testing.assert_close(optimized(images_for(model)), model(images_for(model)))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems tell their mappings otherwise")
def test_a_file_of_the_cache_is_mapped_once(path: Path) -> None:
    model = tiny(8)
    tomevit.save(model, path)
    before = path.read_bytes()
    tensors = checkpoint.read(path, mapped=True)[1]
    assert Path("/proc/self/maps").read_text().count(str(path)) == 1
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensors[name], tensor)
        tensors[name].zero_()
    assert path.read_bytes() == before
    del tensors
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_a_file_that_cannot_be_mapped_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> object:
        raise RuntimeError("unable to mmap")

    model = tiny(8)
    tomevit.save(model, path)
    monkeypatch.setattr(torch.UntypedStorage, "from_file", fail)
    tensors = checkpoint.read(path, mapped=True)[1]
    assert all(torch.equal(tensors[name], tensor) for name, tensor in model.state_dict().items())


def test_a_file_cut_short_while_it_is_read(path: Path) -> None:
    tomevit.save(tiny(8), path)
    with path.open("rb") as file:
        stored = read_header(file)[1]
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(ValueError, match="cut short while it was read"):
            read_tensors(file, stored)


def test_of_one_tensor_at_a_time_there_is_a_copy() -> None:
    copies: list[weakref.ref[Any]] = []

    def copy() -> torch.Tensor:
        values = np.zeros(4, np.float32)
        copies.append(weakref.ref(values))
        return torch.from_numpy(values)

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for name in "abc":
            assert not any(each() is not None for each in copies)
            yield name, copy()

    checkpoint.digest(tensors())
    assert len(copies) == 3


def test_views_are_saved_as_what_they_show(path: Path) -> None:
    model = tiny()
    model.head.weight = torch.nn.Parameter(torch.randn(24, 7).T)
    tomevit.save(model, path)
    assert torch.equal(tomevit.load(path).head.weight, model.head.weight)


def test_the_file_describes_itself(path: Path) -> None:
    tomevit.save(tiny(8), path, card=CARD)
    tensors, metadata = contents(path)
    described = json.loads(metadata["tomevit"])
    assert described["version"] == 2
    card = described["card"]
    assert card["class_names"] == list(CARD.class_names)
    assert card["config"]["embed_dim"] == 24
    assert set(tensors) == set(tiny().state_dict())


def test_paths_may_be_text(path: Path) -> None:
    tomevit.save(tiny(), str(path))
    tomevit.load(str(path))


# ------------------------------------------------------------------------------------------------------------- errors


def test_there_is_no_such_file(path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        tomevit.load(path)
    with pytest.raises(FileNotFoundError, match="there is no file"):
        tomevit.load(path.parent)
    with pytest.raises(FileNotFoundError):
        tomevit.save(tiny(), path.parent / "missing" / "model.safetensors")


@pytest.mark.parametrize("keep", [0, 4, 8, 100, 2000, -1])
def test_truncated_files_are_value_errors(path: Path, keep: int) -> None:
    tomevit.save(tiny(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        tomevit.load(path)


@pytest.mark.parametrize("content", [b"PK\x03\x04 a zip file", b"\x80\x02}q\x00.", b"{}", b"\xff" * 64], ids=repr)
def test_other_files_are_value_errors(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        tomevit.load(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}], ids=repr)
def test_safetensors_of_others_are_value_errors(path: Path, metadata: dict[str, str] | None) -> None:
    safetensors.torch.save_file(tiny().state_dict(), path, metadata)
    with pytest.raises(ValueError, match="not written by tomevit"):
        tomevit.load(path)


@pytest.mark.parametrize("version", [2, 10, 0, -1, 1.5, "1", None])
def test_newer_versions_are_value_errors(path: Path, version: Any) -> None:
    tomevit.save(tiny(), path)
    rewrite(path, metadata=json.dumps({"version": version, "card": {}}))
    with pytest.raises(ValueError, match="version"):
        tomevit.load(path)


def damaged(**changes: Any) -> str:
    """The metadata with fields of the card changed; those set to ... left out."""
    data = cards.card_to_json(replace(CARD, config=tiny().config)) | changes
    return with_card({name: value for name, value in data.items() if value is not ...})


def with_card(card: Any) -> str:
    return json.dumps({"version": cards.VERSION, "card": card, "sha256": ""})


def test_undamaged_metadata_load(path: Path) -> None:
    tomevit.save(tiny(), path)
    rewrite(path, metadata=damaged())
    assert tomevit.load(path).card.notes == CARD.notes


@pytest.mark.parametrize(
    "metadata",
    [
        "",
        "{",
        "{}",
        "[]",
        "null",
        '"text"',
        with_card({}),
        with_card([]),
        with_card(None),
        with_card("text"),
        damaged(config=...),
        damaged(config=None),
        damaged(config=[]),
        damaged(config={"colour": "red"}),
        damaged(config={"patch_size": 7}),
        damaged(config={"patch_size": 0}),
        damaged(config={"img_size": 224}),
        damaged(config={"matching": "nope"}),
        damaged(config={"act": "nope"}),
        damaged(sources=[1]),
        damaged(r={"mean": 1}),
        damaged(r=-1),
        damaged(r="8"),
        damaged(r="2x"),
        damaged(r=None),
        damaged(flavour="sweet"),
        damaged(config=asdict(tiny().config) | {"depth": 10**9}),
        damaged(config=asdict(tiny().config) | {"depth": 5}),
        damaged(config=asdict(tiny().config) | {"embed_dim": 3 * 10**12}),
        damaged(config=asdict(tiny().config) | {"embed_dim": 3 * 10**40}),
        damaged(config=asdict(tiny().config) | {"img_size": [4 * 10**9, 4 * 10**9]}),
        damaged(config=asdict(tiny().config) | {"num_classes": 10**18}),
        damaged(config=asdict(tiny().config) | {"reg_tokens": 10**18}),
        damaged(config=asdict(tiny().config) | {"mlp_ratio": "4"}),
        damaged(config=asdict(tiny().config) | {"mlp_ratio": 0.01}),
        damaged(config=asdict(tiny().config) | {"mlp_ratio": 1e308}),
        damaged(config=asdict(tiny().config) | {"norm_eps": float("nan")}),
        damaged(config=asdict(tiny().config) | {"norm_eps": float("inf")}),
        damaged(config=asdict(tiny().config) | {"layer_scale": "1"}),
        damaged(config=asdict(tiny().config) | {"qkv_bias": 1}),
        damaged(preprocess={"mean": ["0.5"]}),
        damaged(preprocess={"resize": "no"}),
        damaged(preprocess={"crop_pct": 1.5}),
        damaged(preprocess={"std": [0, 1, 1]}),
        damaged(name=None),
        damaged(name=...),
        damaged(class_names=[1]),
        damaged(class_names="abc"),
        damaged(licence=5),
        damaged(figures=[{"top1": "best", "source": ""}]),
        damaged(origin=[]),
        "[" * 100_000,
        '{"version": 2, "card": ' + "[" * 100_000 + "]" * 100_000 + "}",
    ],
)
def test_damaged_metadata_are_value_errors(path: Path, metadata: str) -> None:
    tomevit.save(tiny(), path)
    rewrite(path, metadata=metadata)
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        tomevit.load(path)
    assert not tomevit.verify(path)[-1].passed


def test_a_mismatch_shows_both_sides_sorted(path: Path) -> None:
    tomevit.save(tiny(), path)
    rewrite(path, drop="norm.bias", add={"head.weight": torch.zeros(8, 24), "extra": torch.zeros(2)})
    with pytest.raises(ValueError, match="does not fit") as error:
        tomevit.load(path)
    _, *lines = str(error.value).splitlines()
    assert lines == [
        "  extra: model —, file (2,)",
        "  head.weight: model (7, 24), file (8, 24)",
        "  norm.bias: model (24,), file —",
    ]


def test_tensors_that_are_no_weights_are_value_errors(path: Path) -> None:
    tomevit.save(tiny(), path)
    rewrite(path, add={"norm.bias": torch.zeros(24, dtype=torch.int32)})
    with pytest.raises(ValueError, match=r"floating point, and it holds torch\.int32"):
        tomevit.load(path)
    assert [check.passed for check in tomevit.verify(path)] == [False]


def test_verify_tries_no_gigantic_image(path: Path) -> None:
    model = tiny(img_size=(64, 64), patch_size=1, embed_dim=1, num_heads=1, depth=1)
    tomevit.save(model, path)
    tensors, metadata = contents(path)
    tensors["patch_embed.proj.weight"] = torch.zeros(1, 3, 64, 64)
    described = json.loads(metadata[cards.KEY])
    described["card"]["config"] |= {"patch_size": 64, "img_size": [2**12, 2**12]}
    safetensors.torch.save_file(tensors, path, {cards.KEY: json.dumps(described)})
    assert tomevit.load(path).config.img_size == (2**12, 2**12)
    last = tomevit.verify(path)[-1]
    assert not last.passed
    assert last.found == f"an image of its size has {3 * 2**24:,} values: too many to try"


def test_a_matching_of_ones_own_cannot_be_saved(path: Path) -> None:
    with pytest.raises(ValueError, match="function"):
        tomevit.save(tiny(matching=bipartite_soft_matching), path)
    assert not list(path.parent.iterdir())


class FailedWriteError(Exception):
    pass


@pytest.mark.parametrize("name", ["head", "norm"])
def test_a_model_whose_layers_were_replaced_cannot_be_saved(path: Path, name: str) -> None:
    model = tiny(depth=1)
    setattr(model, name, torch.nn.Linear(24, 3))
    with pytest.raises(ValueError, match=rf"{name}.bias is \(3,\) and should be .* use model.reset_classifier"):
        tomevit.save(model, path)
    assert not path.exists()


@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
def test_a_failed_save_leaves_things_as_they_were(path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool) -> None:
    def fail_half_way(tensors: Iterable[tuple[str, torch.Tensor]], also: Callable[[bytes], object]) -> str:
        also(b"half a file")
        raise FailedWriteError

    if existing:
        tomevit.save(tiny(), path)
    before = {file: file.read_bytes() for file in path.parent.iterdir()}
    monkeypatch.setattr(checkpoint, "digest", fail_half_way)
    with pytest.raises(FailedWriteError):
        tomevit.save(tiny(8, seed=1), path)
    assert {file: file.read_bytes() for file in path.parent.iterdir()} == before


def test_a_save_replaces_the_whole_file_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tomevit.save(tiny(seed=1), path)
    old = path.read_bytes()
    write, seen = checkpoint.write_safetensors, []

    def write_and_look(*arguments: Any) -> None:
        write(*arguments)
        seen.append(path.read_bytes())

    monkeypatch.setattr(checkpoint, "write_safetensors", write_and_look)
    tomevit.save(tiny(seed=2), path)
    assert seen == [old]
    assert path.read_bytes() != old
    assert list(path.parent.iterdir()) == [path]


def test_an_open_file_can_be_replaced_by_the_model_in_it(path: Path) -> None:
    tomevit.save(tiny(8), path)
    model = tomevit.load(path)
    model.r = 2
    tomevit.save(model, path)
    again = tomevit.load(path)
    assert again.r == 2
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


# -------------------------------------------------------------------------------------------------- create from a file


def test_create_takes_a_file(path: Path) -> None:
    model = tomevit.create("deit_ti16", num_classes=10, img_size=32, in_chans=1, r=4)
    tomevit.save(model, path)
    for pretrained in (path, str(path)):
        again = tomevit.create("deit_ti16", pretrained=pretrained)
        assert again.config == model.config
        assert again.r == 4
    assert tomevit.create("deit_ti16", pretrained=path, r=1).r == 1
    changed = tomevit.create("deit_ti16", pretrained=path, prop_attn=False, drop_path=0.1)
    assert not changed.config.prop_attn
    assert torch.equal(changed.pos_embed, model.pos_embed)


def test_create_refuses_a_file_of_another_architecture(path: Path) -> None:
    tomevit.save(tomevit.create("deit_ti16", img_size=32), path)
    with pytest.raises(ValueError, match="which is no deit_s16: embed_dim 192 where the model has 384"):
        tomevit.create("deit_s16", pretrained=path)
