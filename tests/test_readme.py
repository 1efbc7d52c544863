"""What the README shows works as it stands there."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import tomevit
from tests import foreign
from tests.server import Server

README = Path(__file__).parent.parent / "README.md"


# huggingface_hub's way to send a large file is one that its HTTP library no longer likes.
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_every_python_block_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: Server, set_environment: Callable[..., None]
) -> None:
    set_environment(TOMEVIT_MIRROR=server.url, HF_TOKEN="hf_token", HF_HUB_DISABLE_XET="1")
    server.accounts["hf_token"] = "you"
    monkeypatch.chdir(tmp_path)
    # What the README takes as given: two published sets of weights, two checkpoints of one's own, an image.
    base, small = (foreign.sizes(tomevit.card(name).config) for name in ("vit_b16", "deit_s16"))
    published = foreign.write(tmp_path / "published.safetensors", foreign.fill(foreign.deit(base)))
    server.put_hub("timm/vit_base_patch16_224.augreg_in21k_ft_in1k", "model.safetensors", published.read_bytes())
    own = foreign.write(tmp_path / "checkpoint.pth", foreign.fill(foreign.deit(small)), key="model")
    server.put("/dl.fbaipublicfiles.com/tome/f367470145_deit_S_r13.pth", own.read_bytes())
    foreign.write(tmp_path / "checkpoint.npz", foreign.fill(foreign.vit_jax(small)))
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) >= 2
    names: dict[str, Any] = {"image": Image.new("RGB", (320, 240), "orange")}
    names["loader"] = [(torch.randn(2, 3, 224, 224), torch.tensor([3, 9]))]
    encoder = foreign.fill(foreign.mae_encoder(foreign.sizes(tomevit.card("mae_cls_b16.pretrain").config)))
    server.put_hub(
        "timm/vit_base_patch16_224.mae",
        "model.safetensors",
        foreign.write(tmp_path / "encoder.safetensors", encoder).read_bytes(),
    )
    for number, block in enumerate(blocks):
        exec(compile(block, f"README block {number}", "exec"), names)
    assert names["logits"].shape[1] == 1000


def test_every_file_it_links_is_there() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", README.read_text(encoding="utf-8")):
        assert (README.parent / target).exists(), target
