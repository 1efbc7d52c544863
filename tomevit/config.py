"""What a model is, as data: frozen dataclasses that every layer receives whole."""

from __future__ import annotations

import reprlib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from tomevit.schedule import check_schedule
from tomevit.typed import normalise_fields

Act = Literal["gelu", "gelu_tanh", "quick_gelu"]
MlpKind = Literal["mlp", "swiglu"]
PosEmbed = Literal["learned", "none"]
Rope = Literal["dinov3", "eva", "pe"]
Pool = Literal["token", "avg", "token_avg", "map"]
PoolNorm = Literal["before", "after", "none"]
Init = Literal["vit", "deit", "mae", "swag"]

#: What each pooling makes the vector of that the head reads.
POOLED: dict[Pool, str] = {
    "token": "class token",
    "avg": "mean patch",
    "token_avg": "class token beside the mean patch",
    "map": "attention pooling of all tokens",
}
CHOICES = {
    "act": get_args(Act),
    "mlp": get_args(MlpKind),
    "pos_embed": get_args(PosEmbed),
    "rope": get_args(Rope),
    "pool": get_args(Pool),
    "pool_norm": get_args(PoolNorm),
    "init": get_args(Init),
}
LEAST = {
    "patch_size": 1,
    "in_chans": 1,
    "embed_dim": 1,
    "depth": 1,
    "num_heads": 1,
    "num_classes": 0,
    "reg_tokens": 0,
    "proj_dim": 0,
}
#: No model that anyone could run has more: numbers from a file are believed up to these.
MOST = {"patch_size": 2**12, "in_chans": 2**12, "embed_dim": 2**16, "depth": 2**10, "num_heads": 2**12}
MOST |= {"num_classes": 2**24, "reg_tokens": 2**12, "proj_dim": 2**16}
MOST_PIXELS = 2**14  # along an edge of an image
MOST_VALUES = 2**26  # of an image: pixels times channels
MOST_HIDDEN = 2**22  # of an MLP
MOST_TEXT = 2**20  # characters, of all that a card says in words


@dataclass(frozen=True, kw_only=True)
class Config:
    """A vision transformer with token merging.

    The first fields are the architecture: weights fit exactly one. The last group says how the model runs, and may be
    changed over the same weights.
    """

    img_size: tuple[int, int] = (224, 224)  # height, width in pixels
    patch_size: int = 16  # pixels
    in_chans: int = 3
    num_classes: int = 1000  # 0: no head, the model answers with pooled features
    embed_dim: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp: MlpKind = "mlp"  # two linear layers, or those of which one half gates the other (DINOv2 g, DINOv3, EVA-02)
    mlp_ratio: float = 4.0  # of the channels that the second layer reads
    mlp_norm: bool = False  # LayerNorm before the second layer of "swiglu" (EVA-02)
    act: Act = "gelu"  # of "mlp"; the gate is a SiLU
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    qk_norm: bool = False  # LayerNorm on queries and keys, per head
    attn_norm: bool = False  # LayerNorm on what all heads answer, before attention's projection (EVA-02's CLIP)
    layer_scale: float | None = None  # initial value; None: no LayerScale
    pre_norm: bool = False  # LayerNorm before the first block, no bias in the patch embedding (CLIP)

    class_token: bool = True
    dist_token: bool = False  # a second token and a second head, for distillation (DeiT)
    reg_tokens: int = 0
    pos_embed: PosEmbed = "learned"  # positions that are added to the patches
    pos_embed_prefix: bool | Literal["class"] = True  # those cover the prefix too, or of it the class token (DINOv2)
    rope: Rope | None = None  # positions as rotations of queries and keys, as that family has them

    # What the head reads: the class token, the mean patch, the one beside the other, or attention pooling (SigLIP).
    pool: Pool = "token"
    pool_heads: int | None = None  # of attention pooling; None: num_heads
    pool_mlp_ratio: float | None = None  # of its MLP; None: mlp_ratio
    pool_norm: PoolNorm = "before"  # the final norm: on every token, on the pooled vector (MAE), or not there
    proj_dim: int = 0  # channels that a projection makes of the pooled vector (CLIP); 0: no projection
    proj_bias: bool = False  # that projection has a bias (EVA-02's CLIP)

    prop_attn: bool = True  # add log(size) to the attention scores (ToMe, section 3, "tracking token size")
    matching: str | Callable[..., Any] = "bipartite"  # a name in tomevit.layers.MATCHINGS, or a function like those
    drop_path: float = 0.0  # stochastic depth of the last block; it grows linearly from 0 at the first
    dropout: float = 0.0  # after the positions, the attention's projection and the MLP's layers
    attn_dropout: float = 0.0  # on the attention weights
    init: Init = "vit"  # how fresh weights are drawn: as the code of that family does

    def __post_init__(self) -> None:
        normalise_fields(self)
        for name, least in LEAST.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)!r}, and must be an int of at least {least}")
        for name, most in MOST.items():
            if getattr(self, name) > most:
                raise ValueError(f"{name} is {reprlib.repr(getattr(self, name))}, and can be {most} at most")
        height, width = self.img_size
        if max(height, width) > MOST_PIXELS or height * width * self.in_chans > MOST_VALUES:
            raise ValueError(
                f"img_size is {reprlib.repr(self.img_size)}, and can be {MOST_PIXELS} along an edge at most, and "
                f"{MOST_VALUES} values in {self.in_chans} channels"
            )
        if min(height, width) < 1 or height % self.patch_size or width % self.patch_size:
            near = (max(1, round(pixels / self.patch_size)) * self.patch_size for pixels in self.img_size)
            raise ValueError(
                f"img_size {height}x{width} does not divide into patches of {self.patch_size} pixels; "
                f"the nearest that does is {'x'.join(map(str, near))}"
            )
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}")
        if self.pool in ("token", "token_avg") and not self.class_token:
            raise ValueError(f"pool={self.pool!r} reads the class token: set class_token=True, or pool='avg'")
        if self.dist_token and (self.pool != "token" or self.proj_dim):
            raise ValueError(
                "dist_token=True adds a second head beside the class token's: it needs pool='token' and no projection"
            )
        ratios = (self.mlp_ratio, self.pool_mlp_ratio or self.mlp_ratio)
        if self.embed_dim * min(ratios) < 1 or self.norm_eps < 0:
            raise ValueError(f"mlp_ratio, pool_mlp_ratio {ratios} and norm_eps {self.norm_eps} must be positive")
        if self.embed_dim * max(ratios) > MOST_HIDDEN or self.norm_eps > 1:
            raise ValueError(
                f"mlp_ratio, pool_mlp_ratio are {ratios} and norm_eps {self.norm_eps}, too large for any model"
            )
        if self.pool_heads is not None and (self.pool_heads < 1 or self.embed_dim % self.pool_heads):
            raise ValueError(f"embed_dim {self.embed_dim} is not a multiple of pool_heads {self.pool_heads}")
        if self.mlp_norm and self.mlp != "swiglu":
            raise ValueError("mlp_norm=True is the norm within mlp='swiglu'")
        if self.rope is not None and self.head_dim % 4:
            raise ValueError(f"rope turns pairs of channels along two axes: {self.head_dim} per head must divide by 4")
        if self.pos_embed_prefix == "class" and not self.class_token:
            raise ValueError("pos_embed_prefix='class' is the class token's position: set class_token=True")
        for name in ("drop_path", "dropout", "attn_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}, and must be a probability below 1")

    @property
    def head_dim(self) -> int:
        """Channels of a head of attention."""
        return self.embed_dim // self.num_heads

    @property
    def mlp_hidden(self) -> int:
        """Channels that the second layer of an MLP reads."""
        return int(self.embed_dim * self.mlp_ratio)

    @property
    def num_pooled(self) -> int:
        """Channels of the pooled vector."""
        return self.embed_dim * (2 if self.pool == "token_avg" else 1)

    @property
    def num_features(self) -> int:
        """Channels of what the head reads."""
        return self.proj_dim or self.num_pooled

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along height and width."""
        return self.img_size[0] // self.patch_size, self.img_size[1] // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def num_prefix(self) -> int:
        """Tokens in front of the patches: class, distillation, registers. They are never merged."""
        return int(self.class_token) + int(self.dist_token) + self.reg_tokens

    @property
    def num_read(self) -> int | None:
        """Tokens that the head reads off the front of the last block; None if it reads them all."""
        return 1 + self.dist_token if self.pool == "token" else None

    @property
    def num_tokens(self) -> int:
        """Tokens that enter the first block."""
        return self.num_prefix + self.num_patches

    @property
    def num_positions_prefix(self) -> int:
        """Positions in front that belong to no patch."""
        if self.pos_embed == "none":
            return 0
        return 1 if self.pos_embed_prefix == "class" else self.num_prefix if self.pos_embed_prefix else 0

    @property
    def num_positions(self) -> int:
        return 0 if self.pos_embed == "none" else self.num_positions_prefix + self.num_patches


#: The fields of Config that say how a model runs; all others are its architecture.
RUNTIME = ("prop_attn", "matching", "drop_path", "dropout", "attn_dropout", "init")
ARCHITECTURE = tuple(f.name for f in fields(Config) if f.name not in RUNTIME)


#: Of the resized edges. Published weights have 0.875 to 1; of 0.1, a hundred times the crop's pixels are resized.
LEAST_CROP = 0.1


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How an image becomes a model's input: resize, centre crop, scale to [0, 1], normalise."""

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    crop_pct: float = 0.875  # the crop's share of the shorter edge after the resize
    resize: Literal["shorter", "squash"] = "shorter"  # keep the ratio, or resize both edges to the same length

    def __post_init__(self) -> None:
        normalise_fields(self)
        if len(self.mean) != len(self.std) or not self.mean:
            raise ValueError(f"mean has {len(self.mean)} values and std {len(self.std)}: each has one for each channel")
        if len(self.mean) > MOST["in_chans"]:
            raise ValueError(f"mean has {len(self.mean)} values, and no image so many channels")
        if min(self.std) <= 0:
            raise ValueError(f"std is {reprlib.repr(self.std)}, and must be above 0")
        if min(self.std) < 1e-6 or max(*self.std, *map(abs, self.mean)) > 2**16:
            raise ValueError(
                f"mean is {reprlib.repr(self.mean)} and std {reprlib.repr(self.std)}: of pixels from 0 to 1 nothing is "
                f"left then"
            )
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct is {self.crop_pct}, and must be a share above 0, up to 1")
        if self.crop_pct < LEAST_CROP:
            raise ValueError(f"crop_pct is {self.crop_pct}: a crop of less than {LEAST_CROP} is no picture any more")

    def for_channels(self, channels: int) -> Preprocess:
        """For images of so many channels: statistics that are the same for all stay, others become 0.5 (to [-1, 1])."""
        if channels == len(self.mean):
            return self
        mean, std = (values[0] if len(set(values)) == 1 else None for values in (self.mean, self.std))
        if mean is None or std is None:
            mean = std = 0.5
        return replace(self, mean=(mean,) * channels, std=(std,) * channels)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a checkpoint file lies, and in which format."""

    format: str  # a name in tomevit.weights.formats.FORMATS
    url: str | None = None
    hub: str | None = None  # owner/repo on the Hugging Face hub
    revision: str | None = None  # commit, branch or tag on the hub; None: the main branch
    file: str | None = None  # name in the hub's repository; None: the usual ones
    package: str | None = None  # a file that ships with tomevit
    sha256: str | None = None  # of the file: a prefix where one is published, whole where the file was read
    md5: str | None = None  # a prefix, where one is published


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A published ImageNet-1k accuracy."""

    top1: float  # per cent
    by: Literal["head", "linear probe", "k-NN", "zero-shot"] = "head"  # how classes were told: by the model's own head
    r: int | str = 0  # as `model.r` takes it: an int, or the name of a preset
    source: str

    @property
    def unit(self) -> str:
        """What follows the number: "%", or "% by zero-shot"."""
        return "%" if self.by == "head" else f"% by {self.by}"


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A published schedule for one architecture, as an r with a name."""

    name: str  # the matching, and the budget it was found for: "diffrate-2.9g" for 2.9 billion multiply-adds
    r: tuple[int | str, ...]  # block by block, as a list that is an r
    num_tokens: int  # that enter the first block: it was found for so many
    source: str

    def __post_init__(self) -> None:
        normalise_fields(self)
        check_schedule(list(self.r), len(self.r))

    def fits(self, config: Config) -> bool:
        """Whether as many tokens enter a model of that config, and it has as many blocks."""
        return self.num_tokens == config.num_tokens and len(self.r) == config.depth
