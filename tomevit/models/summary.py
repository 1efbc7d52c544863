"""What a model says of itself, above its modules."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tomevit.flops import flops, format_flops

if TYPE_CHECKING:
    from tomevit.models.vit import VisionTransformer


def summarise(model: VisionTransformer) -> list[str]:
    """Lines: name and weights, image and parameters, tokens and FLOPs, r, and what `tomevit.optimize` did."""
    config, card = model.config, model.card
    height, width = config.img_size
    parameters = sum(parameter.numel() for parameter in model.parameters())
    channels = f"{config.in_chans} channel{'s' * (config.in_chans != 1)}"
    lines = [
        card.full_name or "without a name",
        f"images of {height}x{width} pixels, {channels}; {parameters / 1e6:.3g} M parameters",
    ]
    try:
        counts, cost = model.token_counts(), flops(config, model.r)
    except ValueError as error:  # neighbours that cannot merge: a forward says so too
        return [*lines, f"r={model.r}: {error}", *model.optimizations]
    whole = f" (r = 0: {format_flops(flops(config))})" if counts[-1] != counts[0] else ""
    lines.append(f"{counts[0]} tokens in, {counts[-1]} out; {format_flops(cost)}{whole}")
    return [*lines, f"r={model.r}", *model.optimizations]
