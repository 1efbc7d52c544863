"""Lightning: the model inside a LightningModule of a few lines.

Run: torchrun --nproc-per-node 2 -m examples.train_lightning --out run; with --resume it goes on.
"""

import argparse
import os
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

import tomevit
from examples import common


class Classifier(lightning.LightningModule):
    """The model, its loss, its optimizer, and r over the training."""

    def __init__(self, model: tomevit.VisionTransformer, options: argparse.Namespace) -> None:
        super().__init__()
        self.model, self.options = model, options

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(tomevit.param_groups(self.model, self.options.lr, layer_decay=0.75))

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        step, steps = self.global_step, int(self.trainer.estimated_stepping_batches)
        self.model.r = common.r_at(step, steps, self.options.r)
        loss = F.cross_entropy(self.model(images), labels)
        common.record(self.options.out, step, self.trainer.strategy.reduce(loss.detach(), reduce_op="mean").item())
        return loss


def main() -> None:
    options = common.parse_options(__doc__)
    model, data, checkpoint = common.prepare(options, "checkpoints/*.ckpt")
    lightning.seed_everything(options.seed)  # of the order of the images too
    loader: DataLoader[Any] = DataLoader(data.train, options.batch // common.WORLD, shuffle=True, drop_last=True)
    trainer = lightning.Trainer(
        max_epochs=options.epochs,
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        gradient_clip_val=1.0,
        callbacks=[ModelCheckpoint(options.out / "checkpoints")],
        logger=False,
    )
    trainer.fit(Classifier(model, options), loader, ckpt_path=checkpoint)
    if trainer.is_global_zero:
        model.r = options.r
        tomevit.save(model, options.out / "model.safetensors")
        common.report(options.out / "model.safetensors", data.test)


if __name__ == "__main__":
    main()
