"""DistributedDataParallel: every process has the whole model, and its part of each batch.

Run: torchrun --nproc-per-node 2 -m examples.train_ddp --out run; with --resume it goes on, in any number of processes.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.stateful import Stateful
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import tomevit
from examples import common


class Training(Stateful):
    """What a checkpoint holds. Names and values are those of the model without its wrapper."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer, self.epoch = model, optimizer, 0

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        self.epoch = state["epoch"]


def main() -> None:
    options = common.parse_options(__doc__)
    device = common.join()
    model, data, checkpoint = common.prepare(options, "epoch_*")
    parallel = DistributedDataParallel(model.to(device))
    optimizer = torch.optim.AdamW(tomevit.param_groups(model, options.lr, layer_decay=0.75))
    sampler = DistributedSampler[Any](data.train, seed=options.seed, drop_last=True)
    loader = DataLoader(data.train, options.batch // dist.get_world_size(), sampler=sampler, drop_last=True)
    steps = options.epochs * len(loader)
    training = Training(model, optimizer)
    if checkpoint:
        load({"training": training}, checkpoint_id=checkpoint)

    for epoch in range(training.epoch, options.epochs):
        sampler.set_epoch(epoch)
        for step, (images, labels) in enumerate(loader, epoch * len(loader)):
            model.r = common.r_at(step, steps, options.r)  # of the model itself, not of its wrapper
            loss = F.cross_entropy(parallel(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            dist.all_reduce(mean := loss.detach() / dist.get_world_size())
            common.record(options.out, step, mean.item())
        training.epoch = epoch + 1
        save({"training": training}, checkpoint_id=options.out / "unfinished")
        common.keep(options.out / "unfinished", f"epoch_{epoch + 1}")

    if dist.get_rank() == 0:
        model.r = options.r
        tomevit.save(model, options.out / "model.safetensors")
        common.report(options.out / "model.safetensors", data.test)
    del parallel  # which must not outlive the process group: gloo could wait for ever
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
