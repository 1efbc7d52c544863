"""Directories as trainers and libraries leave them: which checkpoint is read, and what is said of all others."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import tomevit
from tests import foreign
from tests.server import Fault, Server
from tomevit import CheckpointError, Config, DownloadError
from tomevit.cards import Card
from tomevit.weights.convert import inspect
from tomevit.weights.directories import find_checkpoint
from tomevit.weights.sources import locate
from tomevit.zoo import is_elsewhere

TINY = Card(name="tiny", config=Config(depth=2, **foreign.SMALL))
TENSORS = foreign.fill(foreign.deit(foreign.sizes(TINY.config)))
PARTS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = "model.safetensors.index.json"
TRAINER = ["optimizer.pt", "rng_state_0.pth", "scheduler.pt", "trainer_state.json", "training_args.bin"]


def lay(directory: Path, names: list[str]) -> Path:
    """Empty files of these names; a name that ends in a slash is a directory."""
    directory.mkdir(exist_ok=True)
    for name in names:
        path = directory / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.touch()
    return directory


READ = {
    "transformers": (["config.json", "model.safetensors", "pytorch_model.bin", "tf_model.h5"], "model.safetensors"),
    "transformers before 2023": (["config.json", "pytorch_model.bin", "flax_model.msgpack"], "pytorch_model.bin"),
    "in several files": (["config.json", INDEX, *PARTS, "pytorch_model.bin"], INDEX),
    "in several of torch's": (
        ["pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"],
        "pytorch_model.bin.index.json",
    ),
    "in several files of a variant": (
        ["model.safetensors.index.fp16.json", "model.fp16-00001-of-00002.safetensors"],
        "model.safetensors.index.fp16.json",
    ),
    "Trainer": (["model.safetensors", *TRAINER], "model.safetensors"),
    "a run of Trainer": (
        ["checkpoint-500/model.safetensors", "checkpoint-500/optimizer.pt"],
        "checkpoint-500/model.safetensors",
    ),
    "Trainer with DeepSpeed": (["model.safetensors", "zero_to_fp32.py", "latest"], "model.safetensors"),
    "accelerate": (["pytorch_model.bin", "optimizer.bin", "random_states_0.pkl", "sampler.bin"], "pytorch_model.bin"),
    "accelerate, numbered": (["pytorch_model_0.bin", "optimizer.bin"], "pytorch_model_0.bin"),
    "FSDP, whole": (["pytorch_model_fsdp.bin", "optimizer.bin"], "pytorch_model_fsdp.bin"),
    "Lightning": (
        ["hparams.yaml", "lightning_logs/version_0/checkpoints/epoch=1-step=20.ckpt"],
        "lightning_logs/version_0/checkpoints/epoch=1-step=20.ckpt",
    ),
    "timm": (["args.yaml", "summary.csv", "model_best.pth.tar"], "model_best.pth.tar"),
    "open_clip": (["open_clip_config.json", "open_clip_pytorch_model.bin"], "open_clip_pytorch_model.bin"),
    "DeepSpeed without ZeRO": (
        ["latest", "global_step10/mp_rank_00_model_states.pt"],
        "global_step10/mp_rank_00_model_states.pt",
    ),
    "the hub's cache": (
        ["refs/main", f"snapshots/{'a' * 40}/model.safetensors"],
        f"snapshots/{'a' * 40}/model.safetensors",
    ),
    "in one numbered file": (["model-00001-of-00001.safetensors"], "model-00001-of-00001.safetensors"),
    "resource forks": (["._best.pth", "best.pth"], "best.pth"),
    "Flax": (["config.json", "flax_model.msgpack"], "flax_model.msgpack"),  # whose reader says what it is
    "Flax, numbered": (["checkpoint_10000"], "checkpoint_10000"),
    "Keras": (["tf_model.h5"], "tf_model.h5"),
}


@pytest.mark.parametrize(("names", "found"), READ.values(), ids=READ)
def test_the_only_checkpoint_of_a_directory_is_found(names: list[str], found: str, tmp_path: Path) -> None:
    assert find_checkpoint(lay(tmp_path, names)) == tmp_path / found


SEVERAL = {
    "a run of Trainer": ["checkpoint-500/model.safetensors", "checkpoint-1000/pytorch_model.bin"],
    "accelerate": ["model.safetensors", "model_1.safetensors"],
    "whole and in several files": ["model.safetensors", INDEX],
    "Lightning": ["checkpoints/epoch=1.ckpt", "checkpoints/last.ckpt"],
    "timm": ["model_best.pth.tar", "last.pth.tar", "checkpoint-9.pth.tar"],
    "open_clip": ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"],
    "averaged too": ["model.pth", "ema.pth"],
}


@pytest.mark.parametrize("names", SEVERAL.values(), ids=SEVERAL)
def test_of_several_checkpoints_one_must_be_named(names: list[str], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds several checkpoints: give one of them") as error:
        find_checkpoint(lay(tmp_path, names))
    assert all(name in str(error.value) for name in names)


OTHERS = {
    "peft": (["adapter_config.json", "adapter_model.safetensors"], r"adapter beside a model.*merge_and_unload"),
    "peft, beside what it stands on": (["model.safetensors", "adapter_model.bin"], r"adapter beside a model"),
    "Trainer with peft": (
        ["checkpoint-5/adapter_model.safetensors", "checkpoint-5/optimizer.pt"],
        r"checkpoint-5 is an adapter",
    ),
    "distributed": (
        [".metadata", "__0_0.distcp"],
        r"torch\.distributed\.checkpoint\.format_utils dcp_to_torch \S+ \S+",
    ),
    "FSDP": (
        ["optimizer_0/.metadata", "pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/__0_0.distcp"],
        r"accelerate merge-weights DIR/pytorch_model_fsdp_0 ",
    ),
    "FSDP, by process": (["pytorch_model_fsdp_rank0.bin", "pytorch_model_fsdp_rank1.bin"], r"FULL_STATE_DICT"),
    "DeepSpeed": (
        [
            "latest",
            "zero_to_fp32.py",
            "global_step5/mp_rank_00_model_states.pt",
            "global_step5/zero_pp_rank_0_optim_states.pt",
        ],
        r"python zero_to_fp32\.py \. ",
    ),
    "a step of DeepSpeed": (
        ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"],
        r"zero_to_fp32\.py",
    ),
    "SavedModel": (["saved_model.pb", "variables/variables.index"], r"TensorFlow"),
    "TensorFlow": (["checkpoint", "model.ckpt-1.index", "model.ckpt-1.data-00000-of-00001"], r"TensorFlow"),
    "Orbax": (["_METADATA", "manifest.ocdbt"], r"Orbax"),
    "unpacked": (["data.pkl", "version", "data/0"], r"zip -0 -r weights\.pth"),
    "parts alone": ([*PARTS, "config.json"], rf"parts of one checkpoint.*{PARTS[1]}.*bring {INDEX}"),
}


@pytest.mark.parametrize(("names", "said"), OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("call", ["create", "convert", "inspect"])
def test_what_is_not_read_is_named_with_the_way_out(call: str, names: list[str], said: str, tmp_path: Path) -> None:
    directory = lay(tmp_path / "given", names)
    calls: dict[str, Callable[[], object]] = {
        "create": lambda: tomevit.create("vit_ti16", pretrained=directory),
        "convert": lambda: tomevit.convert(directory, tmp_path / "out.safetensors"),
        "inspect": lambda: inspect(directory),
    }
    with pytest.raises(CheckpointError, match=said) as error:
        calls[call]()
    assert str(error.value).startswith(str(directory))


@pytest.mark.parametrize(
    "names", [[], ["config.json", *TRAINER], ["data/best.pth"]], ids=["empty", "no weights", "inside"]
)
def test_a_directory_without_a_checkpoint(names: list[str], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"is a directory without model\.safetensors.*name the checkpoint file"):
        find_checkpoint(lay(tmp_path, names))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("__0_0.distcp", "dcp_to_torch"),
        *[(name, f"part {i + 1} of 2 of a checkpoint in several files: give") for i, name in enumerate(PARTS)],
    ],
)
def test_a_part_of_something_is_not_taken_for_the_whole(name: str, said: str, tmp_path: Path) -> None:
    foreign.write(tmp_path / "part.safetensors", TENSORS).rename(tmp_path / name)
    with pytest.raises(CheckpointError, match=said) as error:
        tomevit.convert(tmp_path / name, tmp_path / "out.safetensors", model=TINY)
    assert str(error.value).startswith(f"{tmp_path / name} ")


def test_a_checkpoint_in_one_numbered_file_is_whole(tmp_path: Path) -> None:
    foreign.write(tmp_path / "model-00001-of-00001.safetensors", TENSORS)
    assert tomevit.convert(tmp_path / "model-00001-of-00001.safetensors", tmp_path / "out.safetensors", model=TINY)


# -------------------------------------------------------------------------------------------------------- several files


def spread(directory: Path, ending: str = "safetensors") -> Path:
    """A checkpoint in two files, and the index of them."""
    stem = "model" if ending == "safetensors" else "pytorch_model"
    names, files = sorted(TENSORS), [f"{stem}-{i:05}-of-00002.{ending}" for i in (1, 2)]
    listed = {name: files[i > len(names) // 2] for i, name in enumerate(names)}
    for file in files:
        foreign.write(directory / file, {name: TENSORS[name] for name in names if listed[name] == file})
    index = directory / f"{stem}.{ending}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": listed}))
    return index


def change(index: Path, **listed: Any) -> None:
    content = json.loads(index.read_text())
    content["weight_map"] |= listed
    index.write_text(json.dumps(content))


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize("given", ["directory", "index"])
def test_several_files_are_one_checkpoint(given: str, ending: str, tmp_path: Path) -> None:
    index = spread(tmp_path, ending)
    source = tmp_path if given == "directory" else index
    report = tomevit.convert(source, tmp_path / "out.safetensors", model=TINY)
    model = tomevit.load(report.out or "")
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in model.state_dict().items())
    parts = [index, *sorted(tmp_path.glob(f"*-of-00002.{ending}"))]
    assert report.sha256 == hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()
    assert report.source == str(index)


def test_no_part_is_written_over(tmp_path: Path) -> None:
    index = spread(tmp_path)
    before = (tmp_path / PARTS[0]).read_bytes()
    with pytest.raises(ValueError, match=PARTS[0]):
        tomevit.convert(index, tmp_path / PARTS[0], model=TINY)
    assert (tmp_path / PARTS[0]).read_bytes() == before


@pytest.mark.parametrize("given", ["directory", "index"])
def test_a_missing_part_is_named(given: str, tmp_path: Path) -> None:
    index = spread(tmp_path)
    (tmp_path / PARTS[1]).unlink()
    with pytest.raises(CheckpointError, match=rf"{INDEX} lists {PARTS[1]}, which is missing"):
        tomevit.convert(index if given == "index" else tmp_path, tmp_path / "out.safetensors", model=TINY)


def test_a_part_under_another_name_is_known_by_the_index(tmp_path: Path) -> None:
    index = spread(tmp_path)
    (tmp_path / PARTS[1]).rename(tmp_path / "second.safetensors")
    index.write_text(index.read_text().replace(PARTS[1], "second.safetensors"))
    with pytest.raises(CheckpointError, match=rf"second\.safetensors is one part of .*: give {re.escape(str(index))}"):
        tomevit.convert(tmp_path / "second.safetensors", tmp_path / "out.safetensors", model=TINY)


MALFORMED: list[tuple[str, str]] = [
    ("{", "is not JSON"),
    ("[" * 100_000, "is not JSON"),
    ("[1]", "has no weight_map"),
    ('{"weight_map": {}}', "has no weight_map"),
    ('{"weight_map": [1]}', "has no weight_map"),
    *[
        (json.dumps({"weight_map": {"a": name}}), "must list names of files beside it")
        for name in ("../model.safetensors", "/etc/passwd", "..", "a\\b", "C:x", "", 3, None, ["x"], "x\0")
    ],
    ('{"weight_map": {"a": "\\u001b[2J"}}', "which is missing"),
]


@pytest.mark.parametrize(("content", "said"), MALFORMED)
def test_a_malformed_index_is_refused_in_one_sentence(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(content)
    for source in (tmp_path, tmp_path / INDEX):
        with pytest.raises(CheckpointError, match=said) as error:
            tomevit.convert(source, tmp_path / "out.safetensors", model=TINY)
        assert str(error.value).startswith(str(tmp_path / INDEX))
        assert str(error.value).isprintable()


def test_an_index_that_does_not_fit_its_files_is_refused(tmp_path: Path) -> None:
    index = spread(tmp_path)
    sound = index.read_text()
    change(index, **{"norm.bias": PARTS[0]})
    with pytest.raises(CheckpointError, match=rf"lists {PARTS[0]}, and does not fit it: 'norm\.bias' is not in it"):
        tomevit.convert(index, tmp_path / "out.safetensors", model=TINY)
    content = json.loads(sound)
    del content["weight_map"]["norm.bias"]
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"'norm\.bias' is in it, and the index does not say so"):
        tomevit.convert(index, tmp_path / "out.safetensors", model=TINY)
    index.write_text(sound)
    with (tmp_path / PARTS[1]).open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(
        CheckpointError, match=rf"{INDEX} lists {PARTS[1]}, which is a damaged or truncated safetensors"
    ):
        tomevit.convert(index, tmp_path / "out.safetensors", model=TINY)


def test_links_lead_to_the_hubs_cache_and_nowhere_else(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    for directory in (snapshot, blobs, tmp_path / "elsewhere"):
        directory.mkdir(parents=True)
    index = spread(snapshot)
    for i, name in enumerate(PARTS):
        (snapshot / name).rename(blobs / str(i))
        (snapshot / name).symlink_to(f"../../blobs/{i}")
    assert tomevit.convert(snapshot, tmp_path / "out.safetensors", model=TINY).source == str(index)
    (blobs / "0").rename(tmp_path / "elsewhere" / "0")
    (snapshot / PARTS[0]).unlink()
    (snapshot / PARTS[0]).symlink_to(tmp_path / "elsewhere" / "0")
    with pytest.raises(CheckpointError, match=rf"lists {PARTS[0]}, which is a link to .*elsewhere/0"):
        tomevit.convert(snapshot, tmp_path / "out.safetensors", model=TINY)


def test_its_size_is_that_of_all_files(tmp_path: Path) -> None:
    deit = foreign.fill(foreign.deit(foreign.sizes(tomevit.card("vit_ti16").config)))
    files = {"model-00001-of-00002.safetensors": "pos_embed", "model-00002-of-00002.safetensors": ""}
    listed = {name: PARTS[name != "pos_embed"] for name in deit}
    for file in files:
        foreign.write(tmp_path / file, {name: tensor for name, tensor in deit.items() if listed[name] == file})
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": listed}))
    (tmp_path / "config.json").write_text('{"architecture": "vit_tiny_patch16_224"}')
    contents = inspect(tmp_path)
    assert contents.card.name == "vit_ti16"
    assert contents.size == sum((tmp_path / name).stat().st_size for name in (INDEX, *PARTS))
    model = tomevit.create("vit_ti16", pretrained=tmp_path)
    assert all(torch.equal(tensor, deit[name]) for name, tensor in model.state_dict().items())


def test_several_files_on_the_hub(server: Server, set_environment: Callable[..., None], tmp_path: Path) -> None:
    spread(tmp_path)
    repo = {name: (tmp_path / name).read_bytes() for name in (INDEX, *PARTS)}
    for name, content in repo.items():
        server.put_hub("someone/large", name, content)
    damaged = repo[PARTS[1]][:-1] + bytes([repo[PARTS[1]][-1] ^ 1])
    server.faults[f"/storage/{hashlib.sha256(repo[PARTS[1]]).hexdigest()}"] = [Fault(body=damaged)]
    with pytest.raises(CheckpointError, match=rf"{PARTS[1]} of someone/large came damaged"):
        tomevit.convert("hf-hub:someone/large", tmp_path / "out.safetensors", model=TINY)
    report = tomevit.convert("hf-hub:someone/large", tmp_path / "out.safetensors", model=TINY)
    assert report.sha256 == hashlib.sha256(b"".join(repo.values())).hexdigest()
    model = tomevit.load(tmp_path / "out.safetensors")
    assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in model.state_dict().items())
    for name in (INDEX, PARTS[0]):
        server.put_hub("someone/incomplete", name, repo[name])
    with pytest.raises(CheckpointError, match=rf"lists {PARTS[1]}, which is missing"):
        tomevit.convert("hf-hub:someone/incomplete", tmp_path / "out.safetensors", model=TINY)
    set_environment(HF_HUB_OFFLINE="1")
    assert tomevit.convert("hf-hub:someone/large", tmp_path / "again.safetensors", model=TINY).sha256 == report.sha256
    next((tmp_path / "hf").rglob(PARTS[1])).unlink()
    with pytest.raises(DownloadError, match="is not in the cache, and HF_HUB_OFFLINE is set"):
        tomevit.convert("hf-hub:someone/large", tmp_path / "again.safetensors", model=TINY)


@pytest.mark.parametrize("names", [["model.safetensors"], ["pytorch_model.bin"], [INDEX, *PARTS]])
def test_only_weights_of_the_hubs_names_hide_a_model_of_the_zoo(
    names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lay(tmp_path / "vit_ti16", ["results.csv", "embeddings.npz", "checkpoint-5/model.safetensors"])
    assert is_elsewhere("vit_ti16")
    assert not is_elsewhere("./vit_ti16")
    lay(tmp_path / "vit_ti16", names)
    assert not is_elsewhere("vit_ti16")


def test_a_directory_in_a_run_is_described_by_the_files_beside_its_weights(tmp_path: Path) -> None:
    inner = tmp_path / "checkpoint-5"
    inner.mkdir()
    foreign.write(inner / "model.safetensors", TENSORS)
    (inner / "config.json").write_text('{"architecture": "vit_tiny_patch16_224"}')
    with locate(tmp_path) as located:
        assert located.path == inner / "model.safetensors"
        assert located.card is not None
        assert located.card.name == "vit_ti16"
