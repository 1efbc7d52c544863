"""The trunk that all families share."""

from __future__ import annotations

import operator
from dataclasses import replace
from itertools import accumulate, chain
from numbers import Integral

import torch
import torch.fx
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tomevit.cards import Card
from tomevit.config import Config
from tomevit.errors import check_type
from tomevit.flops import plain_schedule
from tomevit.layers.block import Block
from tomevit.layers.embed import PatchEmbed, add_prefix_and_positions, check_images, check_visible
from tomevit.layers.merge import Tokens, check_tokens, rows
from tomevit.layers.pool import AttentionPool, pool
from tomevit.layers.rotary import RotaryEmbedding
from tomevit.layers.uninitialised import layer_norm, linear
from tomevit.models.assigned import CheckedAttributes
from tomevit.models.for_timm import TimmInterface
from tomevit.models.init import initial_heads
from tomevit.models.summary import summarise
from tomevit.private import constant_to_compilers
from tomevit.schedule import Schedule, Step, resolve_steps

# What looks at values is no part of a graph of torch.fx, as create_feature_extractor makes it.
torch.fx.wrap("check_images")
torch.fx.wrap("check_tokens")
torch.fx.wrap("pool")


class VisionTransformer(CheckedAttributes, TimmInterface):
    """A vision transformer in which tokens merge.

    Parameters have timm's names. They are left uninitialised here: `tomevit.models.build` fills them, once.

    Attributes:
        config: the architecture and how it runs, frozen.
        card: what the weights are, how their images are prepared, who may use them.
        r: how many tokens merge in each block. Set it at any time, or pass it to a call.
        head_names: the attributes that are classifiers.
        optimizations: what `tomevit.optimize` did.
        device, dtype: of the weights.
    """

    head_names: tuple[str, ...] = ("head",)
    head: nn.Module

    def __init__(self, config: Config, r: Schedule = 0) -> None:
        super().__init__()
        self.config = config
        self.card = Card(name="", config=config)
        self.r = r
        self.grad_checkpointing = False
        self.optimizations: tuple[str, ...] = ()

        dim, eps = config.embed_dim, config.norm_eps
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim)) if config.class_token else None
        self.dist_token = nn.Parameter(torch.empty(1, 1, dim)) if config.dist_token else None
        self.reg_token = nn.Parameter(torch.empty(1, config.reg_tokens, dim)) if config.reg_tokens else None
        self.pos_embed = nn.Parameter(torch.empty(1, config.num_positions, dim)) if config.num_positions else None
        self.rope = RotaryEmbedding(config) if config.rope else None
        self.pos_drop = nn.Dropout(config.dropout)
        self.norm_pre = layer_norm(dim, eps) if config.pre_norm else nn.Identity()
        drop_path = torch.linspace(0, config.drop_path, config.depth, dtype=torch.float32, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(config, probability) for probability in drop_path)
        self.norm = layer_norm(dim, eps) if config.pool_norm == "before" else nn.Identity()
        self.attn_pool = AttentionPool(config) if config.pool == "map" else None
        self.fc_norm = layer_norm(config.num_pooled, eps) if config.pool_norm == "after" else nn.Identity()
        bias = config.proj_bias
        # Not Identity: peft takes whatever is called proj for a layer with weights.
        self.proj = linear(config.num_pooled, config.proj_dim, bias=bias) if config.proj_dim else None
        for name in self.head_names:
            head = linear(config.num_features, config.num_classes) if config.num_classes else nn.Identity()
            setattr(self, name, head)

    device = property(lambda self: self._any_weight().device)
    dtype = property(lambda self: self._any_weight().dtype)

    def _any_weight(self) -> Tensor:
        own = (x for x in (self.pos_embed, self.cls_token, self.reg_token) if x is not None)
        return next(chain(own, self.parameters()))  # a replica in data parallelism has no parameters

    @property
    def r(self) -> Schedule:
        return self._r

    @r.setter
    def r(self, value: Schedule) -> None:
        self._r = self.plain(value)

    def plain(self, r: Schedule) -> Schedule:
        """An r in numbers: what "2x" or the name of a preset means for this model, and every other r as it is."""
        parts = r if isinstance(r, tuple) else (r,)
        if any(isinstance(part, str) for part in parts):
            return self._plain_words(r)
        return plain_schedule(r, self.config, self.card.presets)

    @constant_to_compilers  # which could not follow the search for the least r
    def _plain_words(self, r: Schedule) -> Schedule:
        return plain_schedule(r, self.config, self.card.presets)

    def steps(self, r: Schedule | None = None, num_tokens: int | None = None) -> tuple[Step, ...]:
        """What happens in each block between attention and MLP, for this r or the model's own.

        Args:
            r: instead of the model's own.
            num_tokens: that enter the first block, prefix included; None: those of a whole image.
        """
        config = self.config
        count, grid = (config.num_tokens, config.grid) if num_tokens is None else (num_tokens, None)
        return resolve_steps(self.r if r is None else self.plain(r), config.depth, count, config.num_prefix, grid)

    def schedule(self, r: Schedule | None = None, num_tokens: int | None = None) -> tuple[int, ...]:
        """By how many tokens fewer leave each block than enter it. Arguments as `steps`."""
        check_type("num_tokens", num_tokens, Integral | None, "how many tokens enter the first block")
        return tuple(step.total for step in self.steps(r, num_tokens))

    def token_counts(self, r: Schedule | None = None, num_tokens: int | None = None) -> tuple[int, ...]:
        """Tokens entering each block, and leaving the last: depth + 1 numbers. Arguments as `steps`."""
        schedule = self.schedule(r, num_tokens)
        first = self.config.num_tokens if num_tokens is None else num_tokens
        return tuple(accumulate(schedule, operator.sub, initial=first))

    def forward(self, images: Tensor, r: Schedule | None = None) -> Tensor:
        """Classify.

        Args:
            images: (B, C, H, W) floating, normalised (`tomevit.transform`); taken in the dtype of the weights.
            r: instead of the model's own.

        Returns:
            Logits (B, num_classes); with num_classes = 0 the pooled features (B, D).

        Raises:
            ValueError: images of another size or of integers, or an r of no known form.
        """
        return self.forward_head(self._encode(images, r, num_read=self.config.num_read))

    def forward_features(
        self, images: Tensor, r: Schedule | None = None, *, trace: bool = True, visible: Tensor | None = None
    ) -> Tokens:
        """All tokens after the last block and the final norm.

        Args:
            images: (B, C, H, W) floating, normalised.
            r: instead of the model's own.
            trace: record where each initial token went, as `tomevit.unmerge` needs it.
            visible: (B, M) int64, the patches to encode, ascending; the others are left out, as in masked pre-training
                (MAE, section 3) and patch dropout. None: all.

        Returns:
            Tokens: x (B, N, D), size (B, N, 1) or None, slots (B, N0) or None; N0 counts prefix and visible patches.
        """
        return self._encode(images, r, trace=trace, visible=visible)

    def forward_intermediates(
        self, images: Tensor, r: Schedule | None = None, *, norm: bool = False, trace: bool = True
    ) -> list[Tokens]:
        """The tokens that leave each block, through the final norm if asked."""
        tokens, out = self._embed(images, trace), []
        for block, step in zip(self.blocks, self.steps(r), strict=True):
            tokens = self._run(block, tokens, step)
            out.append(tokens._replace(x=self.norm(tokens.x)) if norm else tokens)
        return out

    def forward_head(self, tokens: Tokens, pre_logits: bool = False) -> Tensor:
        """From what `forward_features` returns to what `forward` returns, or to what the head reads."""
        check_tokens(tokens)
        pooled = pool(tokens, self.config) if self.attn_pool is None else self.attn_pool(tokens)
        features = self.fc_norm(pooled)
        if self.proj is not None:
            features = self.proj(features)
        return features if pre_logits else self.head(features)

    def reset_classifier(self, num_classes: int) -> None:
        """Fresh heads for another number of classes, drawn from torch's default generator; 0 leaves them out."""
        self.config = replace(self.config, num_classes=num_classes)
        for name, head in initial_heads(self.head_names, self.config).items():
            setattr(self, name, head.to(self.device, self.dtype).train(self.training))
        self.card = replace(self.card, config=self.config, class_names=(), figures=())

    def extra_repr(self) -> str:
        return "\n".join(summarise(self))

    def freeze(self, blocks: int) -> None:
        """Let the embedding and the first blocks keep their weights, and all others learn; 0: all learn.

        Raises:
            ValueError: there are not so many blocks.
        """
        check_type("blocks", blocks, Integral, "how many blocks are to keep their weights")
        if not 0 <= blocks <= self.config.depth:
            raise ValueError(f"there are {self.config.depth} blocks, and {blocks} cannot be frozen")
        self.requires_grad_(True)
        if blocks:
            for parameter in self.parameters(recurse=False):
                parameter.requires_grad_(False)
            for module in (self.patch_embed, self.norm_pre, *self.blocks[:blocks]):
                module.requires_grad_(False)

    def _encode(
        self,
        images: Tensor,
        r: Schedule | None,
        *,
        num_read: int | None = None,
        trace: bool = False,
        visible: Tensor | None = None,
    ) -> Tokens:
        tokens = self._embed(images, trace, visible)
        *steps, last = self.steps(r, None if visible is None else self.config.num_prefix + visible.shape[1])
        for block, step in zip(self.blocks[:-1], steps, strict=True):
            tokens = self._run(block, tokens, step)
        # Where only prefix tokens are read, a merge in the last block would change nothing that is.
        tokens = self._run(self.blocks[-1], tokens, last if num_read is None else Step(), num_read)
        return tokens._replace(x=self.norm(tokens.x), rope=None)

    def _embed(self, images: Tensor, trace: bool, visible: Tensor | None = None) -> Tokens:
        config = self.config
        check_images(images, (config.in_chans, *config.img_size))
        images = images.to(self.dtype)
        prefix = [token for token in (self.cls_token, self.dist_token, self.reg_token) if token is not None]
        x = add_prefix_and_positions(self.patch_embed(images), prefix, self.pos_embed, config.pos_embed_prefix)
        rope = None if self.rope is None else self.rope.table
        if visible is not None:
            check_visible(visible, len(images), config.num_patches)
            first = torch.arange(config.num_prefix, device=x.device).expand(x.shape[0], -1)
            index = torch.cat([first, visible + config.num_prefix], 1)
            x = rows(x, index)
            rope = None if rope is None else rows(rope.expand(x.shape[0], -1, -1), index)
        slots = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1) if trace else None
        return Tokens(self.norm_pre(self.pos_drop(x)), None, slots, rope)

    def _run(self, block: nn.Module, tokens: Tokens, step: Step, num_read: int | None = None) -> Tokens:
        return run(block, tokens, step, num_read, checkpointing=self.grad_checkpointing)


def run(
    block: nn.Module, tokens: Tokens, step: Step | int = 0, num_read: int | None = None, *, checkpointing: bool
) -> Tokens:
    """A block, of which with checkpointing only what enters it is kept for the backward pass."""
    if checkpointing and torch.is_grad_enabled():
        return checkpoint(block, tokens, step, num_read, use_reentrant=False)
    return block(tokens, step, num_read)
