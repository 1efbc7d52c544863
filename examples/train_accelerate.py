"""Accelerate: the loop stays your own; it is told where tensors lie and how the work is shared.

Run: torchrun --nproc-per-node 2 -m examples.train_accelerate --out run; with --resume it goes on.
"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator, DataLoaderConfiguration
from torch.utils.data import DataLoader

import tomevit
from examples import common


class Progress:
    """What a checkpoint holds besides the model, the optimizer and the generators."""

    epoch = 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch = state["epoch"]


def main() -> None:
    options = common.parse_options(__doc__)
    # --batch is that of all processes, and each epoch has an order of its own that depends on nothing but the seed.
    loading = DataLoaderConfiguration(split_batches=True, use_seedable_sampler=True, data_seed=options.seed)
    accelerator = Accelerator(cpu=not torch.cuda.is_available(), dataloader_config=loading)
    model, data, checkpoint = common.prepare(options, "epoch_*")
    optimizer = torch.optim.AdamW(tomevit.param_groups(model, options.lr, layer_decay=0.75))
    loader = DataLoader(data.train, options.batch, shuffle=True, drop_last=True)
    parallel, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    steps = options.epochs * len(loader)
    accelerator.register_for_checkpointing(progress := Progress())
    if checkpoint:
        accelerator.load_state(checkpoint)

    for epoch in range(progress.epoch, options.epochs):
        loader.set_epoch(epoch)
        for step, (images, labels) in enumerate(loader, epoch * len(loader)):
            model.r = common.r_at(step, steps, options.r)  # of the model itself, not of its wrapper
            loss = F.cross_entropy(parallel(images), labels)
            optimizer.zero_grad()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            common.record(options.out, step, accelerator.reduce(loss.detach(), "mean").item())
        progress.epoch = epoch + 1
        accelerator.save_state(options.out / "unfinished")
        accelerator.wait_for_everyone()
        common.keep(options.out / "unfinished", f"epoch_{epoch + 1}")
        accelerator.wait_for_everyone()

    if accelerator.is_main_process:
        model.r = options.r
        tomevit.save(accelerator.unwrap_model(parallel), options.out / "model.safetensors")
        common.report(options.out / "model.safetensors", data.test)
    accelerator.end_training()


if __name__ == "__main__":
    main()
