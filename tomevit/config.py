"""What a model is, as data: frozen dataclasses that every layer receives whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Literal

#: What r may be: an int for every block, (r, inflection), a list with one int per block, or a share of the patches.
Schedule = int | float | tuple[int, float] | list[int]


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
    mlp_ratio: float = 4.0
    act: Literal["gelu", "gelu_tanh", "quick_gelu"] = "gelu"
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    qk_norm: bool = False  # LayerNorm on queries and keys, per head
    layer_scale: float | None = None  # initial value; None: no LayerScale
    pre_norm: bool = False  # LayerNorm before the first block, no bias in the patch embedding (CLIP)

    class_token: bool = True
    dist_token: bool = False  # a second token and a second head, for distillation (DeiT)
    reg_tokens: int = 0
    pos_embed_prefix: bool = True  # positions cover the prefix tokens too

    pool: Literal["token", "avg"] = "token"  # what the head reads: the class token, or the mean patch
    pool_norm: Literal["before", "after"] = "before"  # the final norm: on every token, or on the pooled vector (MAE)

    prop_attn: bool = True  # add log(size) to the attention scores (ToMe, section 3, "tracking token size")
    matching: str | Callable[..., Any] = "bipartite"  # a name in tomevit.layers.MATCHINGS, or a function like those
    drop_path: float = 0.0  # stochastic depth of the last block; it grows linearly from 0 at the first
    dropout: float = 0.0  # after the positions, the attention's projection and the MLP's layers
    attn_dropout: float = 0.0  # on the attention weights

    def __post_init__(self) -> None:
        height, width = self.img_size
        if min(height, width) < 1 or height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"img_size {height}x{width} does not divide into patches of {self.patch_size} pixels; "
                f"the nearest that does is {self._fit(height)}x{self._fit(width)}"
            )
        if self.embed_dim % self.num_heads:
            raise ValueError(f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}")
        if self.pool == "token" and not self.class_token:
            raise ValueError("pool='token' reads the class token: set class_token=True, or pool='avg'")
        if self.dist_token and (not self.class_token or self.pool != "token"):
            raise ValueError("dist_token=True adds a second head beside the class token's: it needs pool='token'")
        for name in ("in_chans", "embed_dim", "depth", "num_heads", "patch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, and must be at least 1")
        for name in ("num_classes", "reg_tokens"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}, and must be at least 0")
        for name in ("drop_path", "dropout", "attn_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}, and must be a probability in [0, 1)")

    def _fit(self, pixels: int) -> int:
        return max(1, round(pixels / self.patch_size)) * self.patch_size

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
    def num_tokens(self) -> int:
        """Tokens that enter the first block."""
        return self.num_prefix + self.num_patches


#: The fields of Config that say how a model runs; all others are its architecture.
RUNTIME = ("prop_attn", "matching", "drop_path", "dropout", "attn_dropout")
ARCHITECTURE = tuple(f.name for f in fields(Config) if f.name not in RUNTIME)


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How an image becomes a model's input: resize, centre crop, scale to [0, 1], normalise."""

    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    crop_pct: float = 0.875  # the crop's share of the shorter edge after the resize
    resize: Literal["shorter", "squash"] = "shorter"  # keep the ratio, or resize both edges to the same length


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a checkpoint file lies, and in which format."""

    format: str
    url: str | None = None
    hub: str | None = None  # owner/repo on the Hugging Face hub
    package: str | None = None  # a file that ships with tomevit
    sha256: str | None = None  # a prefix of the file's hash, where one is published
    md5: str | None = None  # likewise


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A published ImageNet-1k accuracy."""

    top1: float  # per cent
    r: int = 0
    source: str


@dataclass(frozen=True, kw_only=True)
class Card:
    """What there is to know about a model and its weights. It travels in every file that tomevit writes."""

    name: str  # family_size[_resolution]
    weights: str | None = None  # the tag of one set of weights
    timm: str | None = None  # timm's name for the same architecture
    title: str = ""
    papers: tuple[str, ...] = ()  # where the architecture is defined
    config: Config = Config()
    preprocess: Preprocess = Preprocess()
    r: Schedule = 0  # what the weights were trained with
    licence: str | None = None
    sources: tuple[Source, ...] = ()
    figures: tuple[Figure, ...] = ()
    class_names: tuple[str, ...] = ()
    notes: str = ""

    @property
    def full_name(self) -> str:
        return f"{self.name}.{self.weights}" if self.weights else self.name
