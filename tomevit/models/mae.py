"""The masked autoencoder (arXiv:2111.06377): an encoder of the visible patches, and a decoder for all the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from tomevit.config import Config
from tomevit.errors import check_type
from tomevit.layers.block import Block
from tomevit.layers.merge import Tokens, rows, rows_or_zero
from tomevit.layers.uninitialised import layer_norm, linear
from tomevit.models.assigned import CheckedAttributes
from tomevit.models.for_timm import group_matcher
from tomevit.models.init import initial_weights
from tomevit.models.vit import VisionTransformer, run
from tomevit.schedule import Schedule


class Reconstruction(NamedTuple):
    """What a masked autoencoder makes of images."""

    loss: Tensor  # (), the mean squared error over the pixels of the hidden patches
    pred: (
        Tensor  # (B, N, p * p * C): the pixels of every patch, relative to mean and deviation of each if norm_pix is on
    )
    mask: Tensor  # (B, N) float32: 1 where a patch was hidden, 0 where it was visible


class MaskedAutoencoder(CheckedAttributes):
    """Pre-training: most patches are hidden, and their pixels predicted from the others.

    The encoder is a model of the zoo and learns in place; in training mode or not, as it was, and the decoder is on its
    device, in its dtype. Its tokens may merge: every visible patch still has a vector of its own when the decoder
    begins; one that was dropped is to the decoder what a hidden one is. To fine-tune,
    `tomevit.create("mae_b16", pretrained=autoencoder.encoder)`.

    Args:
        encoder: such as `tomevit.create("mae_cls_b16")`, fresh or pre-trained. Its heads are taken off, and its
            positions stay as they are: MAE's are fixed.
        mask_ratio: the share of the patches that is hidden.
        norm_pix: predict pixels relative to the mean and deviation of their patch, which makes better features
            (section 4.1) and no pictures.
        decoder_dim, decoder_depth, decoder_heads: channels, blocks and heads of the decoder.

    Raises:
        ValueError: the encoder does not norm every token, or no patches would be hidden, or none visible.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        *,
        mask_ratio: float = 0.75,
        norm_pix: bool = True,
        decoder_dim: int = 512,
        decoder_depth: int = 8,
        decoder_heads: int = 16,
    ) -> None:
        super().__init__()
        check_type("encoder", encoder, VisionTransformer, "a VisionTransformer of tomevit's")
        config = encoder.config
        if config.dist_token or config.pool_norm != "before" or encoder.pos_embed is None:
            norm = "a distillation token" if config.dist_token else "its norm after the pooling, or none"
            raise ValueError(
                "the encoder must norm every token, learn its positions and have one head at most, as mae_cls_b16 "
                f"does: this one has {norm if encoder.pos_embed is not None else 'no learned positions'}"
            )
        self.mask_ratio = mask_ratio
        self.norm_pix = norm_pix
        self.num_visible = int(config.num_patches * (1 - mask_ratio)) if 0 < mask_ratio < 1 else 0
        if not 0 < self.num_visible < config.num_patches:
            raise ValueError(
                f"mask_ratio is {mask_ratio}: of {config.num_patches} patches some must be hidden, and some visible"
            )
        decoder = replace(
            config,
            embed_dim=decoder_dim,
            depth=decoder_depth,
            num_heads=decoder_heads,
            rope=None,
            pool="avg",
            pool_heads=None,
            proj_dim=0,
        )
        self.decoder = build_decoder(decoder, config.embed_dim).to(encoder.pos_embed)
        encoder.reset_classifier(0)
        encoder.pos_embed.requires_grad_(False)
        self.encoder = encoder
        self.train(encoder.training)

    @property
    def config(self) -> Config:
        """The encoder's."""
        return self.encoder.config

    @property
    def r(self) -> Schedule:
        """The encoder's."""
        return self.encoder.r

    @r.setter
    def r(self, value: Schedule) -> None:
        self.encoder.r = value

    def forward(self, images: Tensor, r: Schedule | None = None, *, noise: Tensor | None = None) -> Reconstruction:
        """Hide patches, and predict them.

        Args:
            images: (B, C, H, W) floating, normalised.
            r: how many of the visible tokens merge in each block of the encoder, instead of the encoder's own.
            noise: (B, N), which decides what is hidden: patches of the least stay visible. None: uniform, from torch's
                default generator of the device.

        Raises:
            ValueError: as the encoder's, or noise is of another shape.
        """
        shape = (images.shape[0], self.config.num_patches)
        if noise is None:
            noise = torch.rand(shape, device=images.device, dtype=torch.float32)
        elif tuple(noise.shape) != shape:
            raise ValueError(f"noise is {tuple(noise.shape)}, and must have a value for every patch: {shape}")
        order = noise.argsort(1)
        # Ascending, so that neighbours meet in the matching as they do in a whole image.
        visible, hidden = order[:, : self.num_visible].sort(1).values, order[:, self.num_visible :]

        tokens = self.encoder.forward_features(images, r, visible=visible)
        pred = self.decoder(tokens, torch.cat([visible, hidden], 1).argsort(1))
        target = patchify(images, self.config.patch_size).to(torch.promote_types(images.dtype, torch.float32))
        if self.norm_pix:
            variance, mean = torch.var_mean(target, -1, keepdim=True)
            target = (target - mean) * (variance + 1e-6).rsqrt()
        mask = torch.ones(shape, device=images.device, dtype=torch.float32).scatter(1, visible, 0.0)
        loss = ((pred - target).square().mean(-1) * mask).sum() / mask.sum()
        return Reconstruction(loss, pred, mask)

    def token_counts(self, r: Schedule | None = None) -> tuple[int, ...]:
        """Tokens entering each block of the encoder, and leaving the last."""
        return self.encoder.token_counts(r, self.config.num_prefix + self.num_visible)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """In training, keep only what enters each block and compute the rest again in the backward pass."""
        self.encoder.set_grad_checkpointing(enable)
        self.decoder.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that are no matrices, whatever their shape: tokens and positions."""
        halves = {"encoder": self.encoder, "decoder": self.decoder}
        return {
            f"{half}.{name}" for half, module in halves.items() for name, _ in module.named_parameters(recurse=False)
        }

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """The encoder's: how images are prepared, in timm's words."""
        return self.encoder.pretrained_cfg

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:  # noqa: ARG002
        """By which names parameters belong to which layer, for timm's layer decay; the decoder is the last."""
        return group_matcher(r"encoder\.")

    def mae_state_dict(self) -> dict[str, Tensor]:
        """The weights under the names of facebookresearch/mae, as "model" in its checkpoints."""
        return {_to_mae(name): tensor for name, tensor in self.state_dict().items()}

    def load_mae(self, state_dict: Mapping[str, Tensor]) -> None:
        """Load what stands under "model" in a checkpoint of facebookresearch/mae that has the decoder, strictly.

        Raises:
            ValueError: there is no decoder in it.
            RuntimeError: names or shapes differ; torch's message has them.
        """
        if "mask_token" not in state_dict:
            raise ValueError(
                "there is no decoder in this checkpoint: read the encoder by tomevit.create(name, pretrained=file)"
            )
        ours = {_to_mae(name): name for name in self.state_dict()}
        self.load_state_dict({ours.get(name, name): tensor for name, tensor in state_dict.items()})


class Decoder(nn.Module):
    """A narrow transformer over all patches, which are their tokens where visible, and else one learned token.

    So are visible patches that were dropped. Its blocks merge nothing: every patch is predicted.
    """

    def __init__(self, config: Config, encoder_dim: int) -> None:
        super().__init__()
        dim = config.embed_dim
        self.num_prefix = config.num_prefix
        self.grad_checkpointing = False
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, config.num_tokens, dim), requires_grad=False)
        self.embed = linear(encoder_dim, dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = layer_norm(dim, config.norm_eps)
        self.pred = linear(dim, config.patch_size**2 * config.in_chans)

    def forward(self, tokens: Tokens, restore: Tensor) -> Tensor:
        """
        Args:
            tokens: the encoder's, with slots: of P prefix tokens and M visible patches.
            restore: (B, N) int64: for each patch its place among the visible ones and, after them, the hidden.

        Returns:
            (B, N, p * p * C)
        """
        assert tokens.slots is not None
        x = rows_or_zero(self.embed(tokens.x), tokens.slots)  # (B, P + M, D): embedded while merged, which is less work
        unseen = self.mask_token.to(x.dtype)
        x = torch.where(tokens.slots[:, :, None] < 0, unseen, x)
        prefix, patches = x[:, : self.num_prefix], x[:, self.num_prefix :]
        hidden = unseen.expand(x.shape[0], restore.shape[1] - patches.shape[1], -1)
        patches = rows(torch.cat([patches, hidden], 1), restore)
        tokens = Tokens(torch.cat([prefix, patches], 1) + self.pos_embed)
        for block in self.blocks:
            tokens = run(block, tokens, checkpointing=self.grad_checkpointing)
        return self.pred(self.norm(tokens.x))[:, self.num_prefix :]


def build_decoder(config: Config, encoder_dim: int) -> Decoder:
    """A decoder with fresh weights, as MAE draws them.

    Args:
        config: the encoder's, but for width, depth and heads.
        encoder_dim: channels of the tokens that come in.
    """
    config = replace(config, init="mae", drop_path=0.0, dropout=0.0, attn_dropout=0.0)
    with torch.device("meta"):
        decoder = Decoder(config, encoder_dim)
    decoder.load_state_dict(initial_weights(decoder, config), assign=True)
    decoder.pos_embed.requires_grad_(False)
    return decoder


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """(B, C, H, W) -> (B, N, p * p * C): the pixels of each patch, row by row, the channels of a pixel together."""
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(patches: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """The inverse of `patchify`, for grid = patches along height and width (`config.grid`)."""
    return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=grid[0], p=patch_size, q=patch_size)


def _to_mae(name: str) -> str:
    half, _, rest = name.partition(".")
    return rest if half == "encoder" or rest == "mask_token" else f"decoder_{rest}"
