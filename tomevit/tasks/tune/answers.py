"""What a model answers, and how far that moves when tokens merge."""

from __future__ import annotations

import json

import torch
import torch.nn.functional as F
from torch import Tensor

from tomevit.models import VisionTransformer
from tomevit.schedule import Schedule, schedule_to_json
from tomevit.tasks.tune.record import Moved

#: Images per call, at least.
BATCH = 32


class Faithfulness:
    """How the answers to some images differ from those at r = 0; each schedule is tried once.

    Args:
        images: (N, C, H, W).
        labels: (N,) on the CPU, or None.
        batch: images per call, or BATCH if that is more.
        known: by r in JSON, what was found before; what is found is added.
    """

    def __init__(
        self, model: VisionTransformer, images: Tensor, labels: Tensor | None, batch: int, known: dict[str, Moved]
    ) -> None:
        self.model, self.images, self.labels, self.known = model, images, labels, known
        self.batch = max(batch, BATCH)
        self._plain: Tensor | None = None

    def __call__(self, r: Schedule) -> Moved:
        key = name_of(r)
        if key not in self.known:
            self.known[key] = self._compare(r)
        return self.known[key]

    def _compare(self, r: Schedule) -> Moved:
        if self._plain is None:
            self._plain = self._answers(0)
        plain, merged = self._plain, self._answers(r)
        if not self.model.config.num_classes:
            cosine = F.cosine_similarity(plain, merged, dim=1).mean().item()
            return Moved(max(0.0, 1 - cosine), 100 * cosine, None)
        kl = F.kl_div(merged.log_softmax(1), plain.log_softmax(1), reduction="batchmean", log_target=True).item()
        classes = merged.argmax(1)
        agreement = 100 * (classes == plain.argmax(1)).double().mean().item()
        top1 = None if self.labels is None else 100 * (classes == self.labels).double().mean().item()
        return Moved(max(0.0, kl), agreement, top1)

    def _answers(self, r: Schedule) -> Tensor:
        with torch.inference_mode():
            parts = [
                self.model(part.to(self.model.device), r=r).cpu().to(torch.float64)
                for part in torch.split(self.images, self.batch)
            ]
        found = torch.cat(parts)
        if not found.isfinite().all():
            raise ValueError(f"the model's answers to these images are not all finite, with r = {name_of(r)}")
        # A single logit is that of one class against another, whose logit is 0.
        return F.pad(found, (0, 1)) if self.model.config.num_classes == 1 else found


def name_of(r: Schedule) -> str:
    """What a schedule is called in a record."""
    return json.dumps(schedule_to_json(r))
