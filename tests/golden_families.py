"""Write the answers of other projects' models into tests/golden, as the README there describes them.

    python -m tests.golden_families

It needs timm and transformers; the tests that read the files need neither.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests import reference
from tests.core.test_peers import give_exact_rotations, native, with_numbers
from tests.helpers import images_for
from tomevit.config import Config

GOLDEN = Path(__file__).parent / "golden"
PEERS = {
    "clip": "timm CLIP, quick",
    "dinov2": "transformers DINOv2, registers, classifier",
    "siglip": "timm SigLIP 2, so400m",
    "dinov3": "transformers DINOv3",
    "pe": "timm PE core",
    "eva02": "timm EVA-02, large",
    "eva02_clip": "timm EVA-02, CLIP",
}
R = [3, 2]


def write(family: str) -> dict[str, Any]:
    """One family's file; what the index says of it."""
    peer = with_numbers(PEERS[family])
    weights = {name: tensor.clone() for name, tensor in peer.model.state_dict().items()}
    peer.model.double()
    if peer.config.rope:
        give_exact_rotations(peer)
    model = native(peer.form, peer.model.state_dict(), peer.config)
    pixels = images_for(model, 2, dtype=torch.float32)
    images = pixels.double()
    data: dict[str, Tensor] = {f"weights/{name}": tensor for name, tensor in weights.items()} | {"input": pixels}
    with torch.inference_mode():
        data |= {"0/answer": peer.answer(images), "0/tokens": peer.tokens(images)}
    merged = [reference.run(model, image, model.schedule(R)) for image in images]
    data["merged/answer"] = torch.stack([each.output for each in merged]).detach()
    data["merged/tokens"] = torch.stack([each.tokens for each in merged]).detach()
    data["merged/size"] = torch.tensor([each.sizes for each in merged])
    path = GOLDEN / f"{family}.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in data.items()}, path)
    path.chmod(0o644)
    plain = Config()
    fields = {name: value for name, value in dataclasses.asdict(peer.config).items() if value != getattr(plain, name)}
    return {"reference": PEERS[family], "format": peer.form, "config": fields, "r": R}


def main() -> None:
    path = GOLDEN / "families.json"
    path.write_text(json.dumps({family: write(family) for family in PEERS}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
