"""What stands for a model, where its weights are not needed: itself, its card, or its name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from tomevit.config import Config
from tomevit.errors import check_type
from tomevit.flops import flops as flops_of_config
from tomevit.flops import plain_schedule
from tomevit.schedule import Schedule

if TYPE_CHECKING:
    from torch import nn

    from tomevit.cards import Card


class Subject(NamedTuple):
    """What is known of a model, without a look at its weights."""

    card: Card
    config: Config  # that it has now
    r: Schedule  # in plain numbers


def subject_of(model: nn.Module | Card | str, right: str = "a model of tomevit's, its card or its name") -> Subject:
    """What is known of what stands for a model.

    Args:
        model: in a wrapper of torch's or not; or a card; or a name, as `tomevit.card` takes it.
        right: what it must be, in words.

    Raises:
        ValueError: it is nothing of these, or there is no such model.
    """
    # What `import tomevit` loads is not to wait for these, and a name needs no torch.
    from tomevit.cards import Card

    if isinstance(model, Card):
        return Subject(model, model.config, model.r)
    if isinstance(model, str):
        from tomevit import zoo

        return subject_of(zoo.card(model))
    from torch import nn

    from tomevit.models import unwrap

    check_type("model", model, nn.Module, right)
    inner: Any = unwrap(model)
    check_type("model", getattr(inner, "card", inner), Card, right)
    return Subject(inner.card, inner.config, inner.r)


def flops(model: nn.Module | Card | Config | str, r: Schedule | None = None, *, computed: bool = False) -> int:
    """Multiply-adds of the matrix products for one image, as the ToMe paper counts them, or as they are computed.

    The patch embedding, and per block with N tokens in, N' after the merge and D channels 4ND² + 2N²D for attention
    and 8N'D² for an MLP of ratio 4. Heads, norms, attention pooling and the merge itself are not counted.

    Args:
        model: in a wrapper of torch's or not; or its card, its name or its config.
        r: as a model takes it, but of a config no preset. None: the model's own, or what the card's weights were
            trained with; of a config 0.
        computed: leave out of the last block what `VisionTransformer.forward` leaves out: where the head reads the
            class token, only that one has queries, a projection and an MLP there, and nothing merges. By the paper's
            count ViT-B/16 with r = 16 costs half of what it costs without merging; what is computed is 1.88 times
            less, since r = 0 saves more in its last block of 197 tokens than r = 16 in one of 21. A speed-up can only
            be judged by what is computed, and so a budget ("2x") is.

    Raises:
        ValueError: there is no such model, or r is of no known form, or cannot be reached, or is no preset of it.
    """
    if isinstance(model, Config):
        return flops_of_config(model, 0 if r is None else r, computed=computed)
    card, config, own = subject_of(model, "a model of tomevit's, its card, its name or its config")
    plain = own if r is None else plain_schedule(r, config, card.presets)
    return flops_of_config(config, plain, computed=computed)
