"""The files that transformers, timm and open_clip leave of today's backbones, read with what lies beside them."""

from __future__ import annotations

import json
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import save_file
from torch import Tensor, nn

import tomevit
from benchmarks.peers import timm
from tests.helpers import randomise, relative_error
from tests.server import Server
from tomevit import zoo
from tomevit.errors import AmbiguousCheckpointError, CheckpointError
from tomevit.weights.convert import weights_of
from tomevit.weights.export import export

TOWER = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 3}
TOWER |= {"image_size": 32, "patch_size": 16}
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT |= {"vocab_size": 50, "max_position_embeddings": 8}
TEXTS = {"vision_config": TOWER, "text_config": TEXT}
DINOV2 = {"hidden_size": 48, "mlp_ratio": 2, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 56}
DINOV2 |= {"patch_size": 14}
DINOV3 = TOWER | {"image_size": 64, "num_register_tokens": 4}
LABELS = {0: "ant", 1: "bee", 2: "cat"}


def pooled(model: nn.Module, images: Tensor) -> Tensor:
    return model(images).pooler_output


def logits(model: nn.Module, images: Tensor) -> Tensor:
    return model(images).logits


def embedded(model: nn.Module, images: Tensor) -> Tensor:
    return model(images).image_embeds


def features(model: Any, images: Tensor) -> Tensor:
    return model.get_image_features(images).pooler_output


#: A model of transformers', and how its answer is had.
TRANSFORMERS: dict[str, tuple[Callable[[], Any], Callable[[Any, Tensor], Tensor]]] = {
    "dinov2": (lambda: hf.Dinov2Model(hf.Dinov2Config(**DINOV2)), pooled),
    "dinov2 gated": (lambda: hf.Dinov2Model(hf.Dinov2Config(**DINOV2, use_swiglu_ffn=True)), pooled),
    "dinov2 classifier": (
        lambda: hf.Dinov2ForImageClassification(hf.Dinov2Config(**DINOV2, id2label=LABELS)),
        logits,
    ),
    "dinov2 with registers": (
        lambda: hf.Dinov2WithRegistersModel(hf.Dinov2WithRegistersConfig(**DINOV2)),
        pooled,
    ),
    "dinov2 with registers, classifier": (
        lambda: hf.Dinov2WithRegistersForImageClassification(
            hf.Dinov2WithRegistersConfig(**DINOV2, num_register_tokens=2, id2label=LABELS)
        ),
        logits,
    ),
    "dinov3": (lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**DINOV3)), pooled),
    "dinov3 gated": (
        lambda: hf.DINOv3ViTModel(hf.DINOv3ViTConfig(**DINOV3, use_gated_mlp=True, hidden_act="silu")),
        pooled,
    ),
    "clip": (lambda: hf.CLIPModel(hf.CLIPConfig(**TEXTS, projection_dim=7)), features),
    "clip projection": (
        lambda: hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**TOWER, projection_dim=7, hidden_act="gelu")),
        embedded,
    ),
    "clip tower": (lambda: hf.CLIPVisionModel(hf.CLIPVisionConfig(**TOWER)), pooled),
    "siglip": (lambda: hf.SiglipModel(hf.SiglipConfig(**TEXTS)), features),
    "siglip tower": (lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**TOWER)), pooled),
    "siglip classifier": (
        lambda: hf.SiglipForImageClassification(hf.SiglipConfig(**TEXTS, id2label=LABELS)),
        logits,
    ),
}


@torch.no_grad()
def filled(model: Any) -> Any:
    for module in model.modules():
        if not isinstance(module, hf.PreTrainedModel) and list(module.parameters(recurse=False)):
            randomise(module)
    for name, parameter in model.named_parameters():
        if "dinov3" in type(model).__module__ and name.endswith(("q_proj.bias", "v_proj.bias")):
            parameter.zero_()  # as in all released files
    return model.eval()


def noise(config: tomevit.Config) -> Tensor:
    return torch.randn(2, config.in_chans, *config.img_size, generator=torch.Generator().manual_seed(1))


def model_of(path: Path, directory: Path) -> tuple[tomevit.VisionTransformer, Any]:
    report = tomevit.convert(path, directory / "ours.safetensors")
    return tomevit.load(directory / "ours.safetensors"), report


@pytest.mark.parametrize("as_saved", [True, False], ids=["saved", "in memory"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_what_transformers_writes_is_read_by_its_side_files(name: str, as_saved: bool, tmp_path: Path) -> None:
    make, call = TRANSFORMERS[name]
    theirs = filled(make())
    theirs.save_pretrained(tmp_path)
    if not as_saved:  # the names of version 5's state dict, where files have older ones
        save_file({k: v.contiguous() for k, v in theirs.state_dict().items()}, tmp_path / "model.safetensors")
    ours, report = model_of(tmp_path, tmp_path)
    images = noise(ours.config)
    with torch.inference_mode():
        assert relative_error(ours(images, r=0), call(theirs, images)) < 1e-5
    if ours.config.num_classes:
        assert ours.card.class_names == tuple(LABELS.values())
    assert all(name in report.left_out or name for name in theirs.state_dict())


BACK = ("dinov2", "dinov2 gated", "dinov2 classifier", "dinov2 with registers", "dinov3", "dinov3 gated")
BACK += ("clip projection", "clip tower", "siglip tower", "siglip classifier")


@pytest.mark.parametrize("name", BACK)
def test_transformers_loads_what_was_exported_back(name: str, tmp_path: Path) -> None:
    make, call = TRANSFORMERS[name]
    theirs = filled(make())
    theirs.save_pretrained(tmp_path / "theirs")
    card = weights_of(tmp_path / "theirs").card
    assert card.origin is not None
    ours = tmp_path / "ours.safetensors"
    tomevit.convert(tmp_path / "theirs", ours)
    written = export(ours, tmp_path / "back", card.origin.format).written
    assert {path.name for path in written} == {"model.safetensors", "config.json", "preprocessor_config.json"}
    back, info = type(theirs).from_pretrained(tmp_path / "back", output_loading_info=True)
    missing = {key for key in info["missing_keys"] if "mask_token" not in key}
    assert not info["unexpected_keys"]
    assert all(key.startswith(("text_", "logit_")) or ".head." in key for key in missing), missing
    images = noise(card.config)
    with torch.inference_mode():
        assert torch.equal(call(back.eval(), images), call(theirs, images))


# ----------------------------------------------------------------------------------------------------------------- timm

SMALL = {"embed_dim": 48, "depth": 2, "num_heads": 3}
#: timm's name, what of it is smaller, and what the zoo calls it where its size is there.
TIMM: dict[str, tuple[str, dict[str, Any]]] = {
    "dinov2": ("vit_small_patch14_dinov2", SMALL | {"img_size": 56}),
    "dinov2 with registers": ("vit_small_patch14_reg4_dinov2", SMALL | {"img_size": 56, "num_classes": 3}),
    "clip": ("vit_base_patch16_clip_224", SMALL | {"img_size": 32, "num_classes": 512}),
    "clip with QuickGELU": ("vit_base_patch16_clip_quickgelu_224", SMALL | {"img_size": 32, "num_classes": 512}),
    "clip, fine-tuned": ("vit_base_patch16_clip_224", SMALL | {"img_size": 32, "num_classes": 3}),
    "siglip": ("vit_base_patch16_siglip_224", SMALL | {"img_size": 32}),
    "siglip, fine-tuned": ("vit_base_patch16_siglip_224", SMALL | {"img_size": 32, "num_classes": 3}),
    "siglip with tanh": ("vit_base_patch32_siglip_256", SMALL | {"img_size": 64}),
    "siglip, mean patch": ("vit_base_patch16_siglip_gap_224", SMALL | {"img_size": 32}),
}
#: Of timm's Eva the sizes are what the name says.
TIMM |= {
    "dinov3": ("vit_small_patch16_dinov3", {"img_size": 32}),
    "dinov3, gated": ("vit_small_plus_patch16_dinov3", {"img_size": 32}),
    "pe core": ("vit_pe_core_tiny_patch16_384", {}),
    "pe spatial": ("vit_pe_spatial_tiny_patch16_512", {}),
    "eva02": ("eva02_tiny_patch14_336", {"img_size": 56}),
}


@torch.no_grad()
def made_by_timm(name: str) -> Any:
    architecture, arguments = TIMM[name]
    model = timm.create_model(architecture, **arguments)
    for module in model.modules():
        if not isinstance(module, type(model)) and list(module.parameters(recurse=False)):
            randomise(module)
    if name in ("clip", "clip with QuickGELU", "pe core"):
        model.head.bias.zero_()  # a projection has none
    return model.eval()


@pytest.mark.parametrize("name", TIMM)
def test_what_timm_writes_is_read_by_its_config(name: str, tmp_path: Path) -> None:
    theirs = made_by_timm(name)
    timm.models.save_for_hf(theirs, tmp_path, safe_serialization=True)
    ours, _ = model_of(tmp_path, tmp_path)
    images = noise(ours.config)
    with torch.inference_mode():
        assert relative_error(ours(images, r=0), theirs(images)) < 1e-5
    assert (ours.config.proj_dim > 0) == (name in ("clip", "clip with QuickGELU", "pe core"))


def test_timms_rotations_at_another_size_are_not_taken_for_the_originals(tmp_path: Path) -> None:
    """Perception Encoder counts patches on, and timm scales their positions to the size of its name."""
    timm.models.save_for_hf(timm.create_model("vit_pe_core_tiny_patch16_384", img_size=32), tmp_path)
    with pytest.raises(CheckpointError, match=r"32x32.*384x384"):
        tomevit.convert(tmp_path, tmp_path / "out.safetensors")


# --------------------------------------------------------------------------------------------- CLIP without side files


class Block(nn.Module):
    """As in openai/CLIP, clip/model.py, `ResidualAttentionBlock`."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.ln_1 = nn.LayerNorm(width)
        layers = [("c_fc", nn.Linear(width, 4 * width)), ("gelu", Quick()), ("c_proj", nn.Linear(4 * width, width))]
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class Quick(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Tower(nn.Module):
    def __init__(self, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.transformer = nn.Module()
        self.transformer.resblocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))


class Visual(Tower):
    """As in openai/CLIP, clip/model.py, `VisionTransformer`, at toy size."""

    def __init__(self) -> None:
        super().__init__(48, 2, 3)
        self.conv1 = nn.Conv2d(3, 48, 16, 16, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(48))
        self.positional_embedding = nn.Parameter(torch.randn(5, 48))
        self.ln_pre, self.ln_post = nn.LayerNorm(48), nn.LayerNorm(48)
        self.proj = nn.Parameter(torch.randn(48, 7) / 7)

    def forward(self, images: Tensor) -> Tensor:
        x = self.conv1(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(x.shape[0], 1, 48), x], 1) + self.positional_embedding
        return self.ln_post(self.transformer.resblocks(self.ln_pre(x))[:, 0]) @ self.proj


class Multimodal(nn.Module):
    """As in openai/CLIP, clip/model.py, `CLIP`, with the numbers that its archives hold."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = Visual()
        self.transformer = Tower(32, 1, 2).transformer
        self.token_embedding = nn.Embedding(50, 32)
        self.positional_embedding = nn.Parameter(torch.randn(8, 32))
        self.ln_final = nn.LayerNorm(32)
        self.text_projection = nn.Parameter(torch.randn(32, 7))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))
        for name, value in {"input_resolution": 32, "context_length": 8, "vocab_size": 50}.items():
            self.register_buffer(name, torch.tensor(value))

    def forward(self, images: Tensor) -> Tensor:
        return self.visual(images)


NUMBERS = ("input_resolution", "context_length", "vocab_size")


def make_toy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tower of the zoo at toy size, with all of its weights."""
    found = zoo._zoo()
    toy = {"img_size": (32, 32), "embed_dim": 48, "depth": 2, "num_heads": 3}

    def shrunk(card: tomevit.Card) -> tomevit.Card:
        proj_dim = 7 if card.config.proj_dim else 0
        return replace(card, config=replace(card.config, proj_dim=proj_dim, **toy), class_names=())

    cards = found.cards | {name: tuple(map(shrunk, found.cards[name]))}
    architectures = found.architectures | {name: shrunk(found.architectures[name])}
    monkeypatch.setattr(zoo, "_zoo", lambda: found._replace(cards=cards, architectures=architectures))


@pytest.fixture
def toy_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    make_toy("clip_b16", monkeypatch)


@pytest.fixture
def clip() -> Multimodal:
    torch.manual_seed(0)
    return Multimodal().eval()


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.usefixtures("toy_clip")
@pytest.mark.parametrize("scripted", [True, False])
def test_openais_archives_are_read_as_data(scripted: bool, clip: Multimodal, tmp_path: Path) -> None:
    """They are TorchScript, and the numbers in them say that they are OpenAI's: with QuickGELU."""
    images = torch.randn(2, 3, 32, 32)
    path = tmp_path / "ViT-B-16.pt"
    if scripted:
        torch.jit.trace(clip, images, check_trace=False).save(str(path))
    else:
        torch.save(clip.state_dict(), path)
    ours, report = model_of(path, tmp_path)
    assert (ours.card.name, ours.config.act) == ("clip_b16", "quick_gelu")
    with torch.inference_mode():
        assert relative_error(ours(images, r=0), clip(images)) < 1e-5
    assert set(NUMBERS) <= report.left_out.keys()
    texts = {name for name in clip.state_dict() if not name.startswith("visual.")}
    assert texts <= report.left_out.keys()


@pytest.mark.usefixtures("toy_clip")
def test_the_activation_is_asked_where_nothing_tells_it(clip: Multimodal, tmp_path: Path) -> None:
    path = tmp_path / "clip.pt"
    torch.save({k: v for k, v in clip.state_dict().items() if k not in NUMBERS}, path)
    images = torch.randn(2, 3, 32, 32)
    for model in (None, "clip_b16"):
        with pytest.raises(AmbiguousCheckpointError, match=r"clip_b16\.openai \(quick_gelu\)") as asked:
            tomevit.convert(path, tmp_path / "out.safetensors", model=model)
        assert asked.value.option == "model"
        assert asked.value.choices == ["clip_b16.openai", "clip_b16.laion2b"]
    with pytest.raises(AmbiguousCheckpointError):
        tomevit.create("clip_b16", pretrained=path)
    ours = tomevit.create("clip_b16.openai", pretrained=path)
    assert tomevit.create("clip_b16.laion2b", pretrained=path).config.act == "gelu"
    with torch.inference_mode():
        assert relative_error(ours(images, r=0), clip(images)) < 1e-5


@pytest.mark.usefixtures("toy_clip")
@pytest.mark.parametrize("act", ["gelu", "quick_gelu"])
def test_the_side_file_tells_the_activation(act: str, tmp_path: Path) -> None:
    vision = TOWER | {"intermediate_size": 192, "hidden_act": act}
    theirs = filled(hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**vision, projection_dim=7)))
    theirs.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    for model in ("clip_b16", None):
        ours = tomevit.create("clip_b16", pretrained=tmp_path) if model else model_of(tmp_path, tmp_path)[0]
        assert ours.card.name == "clip_b16"
        with torch.inference_mode():
            assert relative_error(ours(images, r=0), theirs(images).image_embeds) < 1e-5
    other = {"gelu": "clip_b16.openai", "quick_gelu": "clip_b16.laion2b"}[act]
    with pytest.raises(CheckpointError, match="act"):
        tomevit.create(other, pretrained=tmp_path / "model.safetensors")


def test_an_archive_that_holds_itself_is_refused(tmp_path: Path) -> None:
    module = b"\x80\x02c__torch__\nM\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb."
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("x/data.pkl", module)
        archive.writestr("x/constants.pkl", b"\x80\x02).")
    with pytest.raises(CheckpointError, match="TorchScript archive of more modules than any model has"):
        tomevit.convert(tmp_path / "x.pt", tmp_path / "out.safetensors")


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_other_archives_of_torchscript_are_still_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.pt"
    torch.jit.script(nn.Sequential(nn.Linear(3, 3), nn.GELU())).save(str(path))
    with pytest.raises(CheckpointError, match=r"is a TorchScript archive: .* torch.save its state_dict\(\)"):
        tomevit.convert(path, tmp_path / "out.safetensors")


# ----------------------------------------------------------------------------------------------------------- open_clip

VISION = {"image_size": 32, "layers": 2, "width": 48, "head_width": 16, "patch_size": 16}


def lay_open_clip(directory: Path, tensors: dict[str, Tensor], model: dict[str, Any], images: dict[str, Any]) -> Path:
    said = {"model_cfg": {"embed_dim": 7, "text_cfg": {}} | model, "preprocess_cfg": images}
    (directory / "open_clip_config.json").write_text(json.dumps(said))
    path = directory / "open_clip_model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return path


@pytest.mark.parametrize("quick", [True, False])
def test_open_clips_config_tells_what_no_tensor_does(quick: bool, clip: Multimodal, tmp_path: Path) -> None:
    for block in clip.visual.transformer.resblocks:
        block.mlp.gelu = Quick() if quick else nn.GELU()
    tensors = {k: v for k, v in clip.state_dict().items() if k not in NUMBERS}
    images = {"mean": [0.5, 0.4, 0.3], "std": [0.5] * 3, "interpolation": "bilinear", "resize_mode": "squash"}
    path = lay_open_clip(tmp_path, tensors, {"quick_gelu": quick, "vision_cfg": VISION}, images)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')  # of transformers' file, which is not read here
    noise = torch.randn(2, 3, 32, 32)
    for source in (path, tmp_path):
        ours, report = model_of(source, tmp_path)
        (tmp_path / "ours.safetensors").unlink()
        with torch.inference_mode():
            assert relative_error(ours(noise, r=0), clip(noise)) < 1e-5
        found = ours.card.preprocess
        assert (found.mean, found.interpolation, found.resize) == ((0.5, 0.4, 0.3), "bilinear", "squash")
        assert {"transformer.resblocks.0.ln_1.weight", "text_projection", "logit_scale"} <= report.left_out.keys()


REFUSED_BY_OPEN_CLIP: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"vision_cfg": VISION | {"attentional_pool": True}}, {}, r"vision_cfg\.attentional_pool is True"),
    ({"vision_cfg": VISION | {"layers": [3, 4, 6, 3]}}, {}, r"vision_cfg\.layers"),
    ({"vision_cfg": VISION | {"head_width": 7}}, {}, r"vision_cfg\.head_width is 7"),
    ({"vision_cfg": VISION}, {"resize_mode": "longest"}, "resize_mode is 'longest'"),
    ({"vision_cfg": VISION}, {"size": 64}, "size is 64, and must be 32x32"),
    ({"vision_cfg": {"timm_model_name": "resnet50"}}, {}, "resnet50"),
    ({"vision_cfg": {"timm_model_name": "vit_tiny_patch16_224", "timm_proj": "mlp"}}, {}, "timm_proj is 'mlp'"),
    ({"vision_cfg": 3}, {}, "vision_cfg is 3"),
]


@pytest.mark.parametrize(("model", "images", "said"), REFUSED_BY_OPEN_CLIP)
def test_what_open_clip_builds_and_we_do_not_is_named(
    model: dict[str, Any], images: dict[str, Any], said: str, tmp_path: Path
) -> None:
    path = lay_open_clip(tmp_path, {"x": torch.ones(1)}, model, images)
    with pytest.raises(CheckpointError, match=rf"open_clip_config\.json: .*{said}"):
        tomevit.convert(path, tmp_path / "out.safetensors")


def trunk(projection: dict[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0, depth=12)
    randomise(model)
    tensors = {f"visual.trunk.{name}": tensor for name, tensor in model.state_dict().items()}
    return model.eval(), tensors | projection | {"text.transformer.x": torch.ones(2), "logit_scale": torch.ones(())}


@pytest.mark.parametrize("told", [True, False])
def test_the_projection_after_a_trunk_is_taken(told: bool, tmp_path: Path) -> None:
    matrix = torch.randn(7, 192)
    theirs, tensors = trunk({"visual.head.proj.weight": matrix})
    vision = {"timm_model_name": "vit_tiny_patch16_224", "timm_proj": "linear", "image_size": 32}
    path = lay_open_clip(tmp_path, tensors, {"vision_cfg": vision}, {})
    if not told:
        path = path.rename(tmp_path / "mine.safetensors")
    tomevit.convert(path, tmp_path / "ours.safetensors", model=None if told else "vit_ti16")
    ours = tomevit.load(tmp_path / "ours.safetensors")
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        assert relative_error(ours(images, r=0), theirs(images) @ matrix.T) < 1e-5


@pytest.mark.parametrize("classes", [7, 3])
def test_the_trunk_of_eva02s_clip_ends_in_its_projection(
    classes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """timm calls it a head, and it has a bias; of another length it is a classifier."""
    make_toy("eva02_clip_b16", monkeypatch)
    toy = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3}
    theirs = timm.create_model("eva02_base_patch16_clip_224", num_classes=classes, **toy).eval()
    randomise(theirs)
    tensors = {f"visual.trunk.{name}": tensor for name, tensor in theirs.state_dict().items()}
    vision = {"timm_model_name": "eva02_base_patch16_clip_224", "timm_proj": None, "image_size": 32}
    path = lay_open_clip(tmp_path, tensors | {"text.x": torch.ones(2)}, {"vision_cfg": vision}, {})
    ours, report = model_of(path, tmp_path)
    assert (ours.config.proj_dim, ours.config.num_classes) == ((7, 0) if classes == 7 else (0, 3))
    assert report.left_out.keys() == {"text.x"}
    images = noise(ours.config)
    with torch.inference_mode():
        assert relative_error(ours(images, r=0), theirs(images)) < 1e-5


@pytest.mark.parametrize(
    "projection",
    [
        {"visual.head.proj.weight": torch.ones(7, 192), "visual.head.proj.bias": torch.ones(7)},
        {"visual.head.mlp.fc1.weight": torch.ones(7, 192), "visual.head.mlp.fc2.weight": torch.ones(7, 7)},
    ],
)
def test_another_projection_after_a_trunk_is_never_dropped(projection: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(trunk(projection)[1], tmp_path / "mine.safetensors")
    with pytest.raises(CheckpointError, match=r"its visual\.head\..* after the trunk"):
        tomevit.convert(tmp_path / "mine.safetensors", tmp_path / "out.safetensors", model="vit_ti16")


# ---------------------------------------------------------------------------------------------------- the zoo's sources


@pytest.fixture
def toy_dinov2(monkeypatch: pytest.MonkeyPatch) -> None:
    """dinov2_s14 and dinov2_s14_reg at toy size, without hashes."""
    found = zoo._zoo()
    toy = {"img_size": (28, 28), "embed_dim": 48, "depth": 2, "num_heads": 3}
    names = ("dinov2_s14", "dinov2_s14_reg", "dinov3_s16")

    def shrunk(card: tomevit.Card) -> tomevit.Card:
        size = {"img_size": (32, 32)} if card.config.rope else {}
        sources = tuple(replace(source, sha256=None, md5=None) for source in card.sources)
        return replace(card, config=replace(card.config, **toy | size), sources=sources)

    cards = found.cards | {name: tuple(map(shrunk, found.cards[name])) for name in names}
    architectures = found.architectures | {name: shrunk(found.architectures[name]) for name in names}
    monkeypatch.setattr(zoo, "_zoo", lambda: found._replace(cards=cards, architectures=architectures))


@pytest.mark.usefixtures("toy_dinov2")
@pytest.mark.parametrize("registers", [False, True])
def test_positions_are_resampled_from_the_published_size_to_the_cards(
    registers: bool, server: Server, set_environment: Callable[..., None], tmp_path: Path
) -> None:
    """Figures of DINOv2 are of 224 pixels, and its positions of 518: here of 28 and of 70."""
    set_environment(TOMEVIT_MIRROR=server.url)
    name = "dinov2_s14_reg" if registers else "dinov2_s14"
    config = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 70, "patch_size": 14}
    kind = hf.Dinov2WithRegistersModel if registers else hf.Dinov2Model
    theirs = filled(kind(kind.config_class(**config)))
    theirs.save_pretrained(tmp_path)
    hub = next(source.hub for source in tomevit.card(name).sources if source.format.startswith("hf_"))
    assert hub is not None
    server.put_hub(hub, "model.safetensors", (tmp_path / "model.safetensors").read_bytes())
    ours = tomevit.create(name, pretrained=True)
    assert ours.config.img_size == (28, 28)
    assert ours.card.weights == "lvd142m"
    images = torch.randn(2, 3, 28, 28)
    with torch.inference_mode():
        # transformers resamples in each call.
        assert relative_error(ours(images, r=0), theirs(images).pooler_output) < 1e-5
    native = tomevit.create(name, pretrained=True, img_size=70)
    with torch.inference_mode():
        assert native(torch.randn(1, 3, 70, 70)).shape == (1, 48)


@pytest.mark.usefixtures("toy_dinov2")
def test_gated_weights_say_how_they_are_had(server: Server, set_environment: Callable[..., None]) -> None:
    set_environment(TOMEVIT_MIRROR=server.url)
    repo = "facebook/dinov3-vits16-pretrain-lvd1689m"
    server.put_hub(repo, "model.safetensors", b"x", token="hf_secret", gated=True)
    said = rf"{repo} on the hub is gated: accept its licence at {server.url}/{repo}, and log in with"
    for source in (f"hf-hub:{repo}", True):  # the second has asked at all other places before
        with pytest.raises(tomevit.DownloadError, match=said):
            tomevit.create("dinov3_s16", pretrained=source)
