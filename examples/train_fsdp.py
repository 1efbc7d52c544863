"""FSDP2: every process has its part of each batch, and of the weights, gradients and optimizer states.

Run: torchrun --nproc-per-node 2 -m examples.train_fsdp --out run; with --resume it goes on, in any number of processes.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler

import tomevit
from examples import common
from examples.train_ddp import Training


def main() -> None:
    options = common.parse_options(__doc__)
    device = common.join()
    model, data, checkpoint = common.prepare(options, "epoch_*")
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)  # embedding, tokens, positions, norm and head; it stays a VisionTransformer
    optimizer = torch.optim.AdamW(tomevit.param_groups(model, options.lr, layer_decay=0.75))  # of the sharded weights
    sampler = DistributedSampler[Any](data.train, seed=options.seed, drop_last=True)
    loader = DataLoader(data.train, options.batch // dist.get_world_size(), sampler=sampler, drop_last=True)
    steps = options.epochs * len(loader)
    training = Training(model, optimizer)
    if checkpoint:
        load({"training": training}, checkpoint_id=checkpoint)

    for epoch in range(training.epoch, options.epochs):
        sampler.set_epoch(epoch)
        for step, (images, labels) in enumerate(loader, epoch * len(loader)):
            model.r = common.r_at(step, steps, options.r)
            loss = F.cross_entropy(model(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            dist.all_reduce(mean := loss.detach() / dist.get_world_size())
            common.record(options.out, step, mean.item())
        training.epoch = epoch + 1
        save({"training": training}, checkpoint_id=options.out / "unfinished")
        common.keep(options.out / "unfinished", f"epoch_{epoch + 1}")

    model.r = options.r
    # Gathered from all processes, tensor by tensor, into the first one's main memory.
    weights: dict[str, Any] = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    if dist.get_rank() == 0:
        tomevit.save(model, options.out / "model.safetensors", state_dict=weights)
        common.report(options.out / "model.safetensors", data.test)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
