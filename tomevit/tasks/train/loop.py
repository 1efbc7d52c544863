"""The loop of `tomevit train`: plain PyTorch, one process."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from tomevit.errors import import_extra
from tomevit.models import DistilledLogits
from tomevit.schedule import Schedule
from tomevit.tasks.train.checkpoints import restore, save_checkpoint
from tomevit.tasks.train.options import Options, Record
from tomevit.tasks.train.setup import Run
from tomevit.training.datasets import Images, seeded
from tomevit.training.parameter_groups import param_groups

AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Progress(NamedTuple):
    """How far a run is, told after each step, and once more when an epoch was measured."""

    epoch: int  # from 1 on
    step: int  # of the epoch, from 1 on
    steps: int  # in each epoch
    loss: float  # of this step
    measured: Record | None = None  # of the epoch: its number, mean loss, and accuracy in per cent


class Trained(NamedTuple):
    """What a run has come to."""

    epochs: list[Record]  # what was measured after each; fewer than were asked for: it stopped before
    steps: int  # in all
    seconds: list[float]  # of each step of this process
    ema: AveragedModel | None  # the averaged model


class Accuracy(NamedTuple):
    """How many images a model classifies right."""

    right: int
    images: int
    guessed: int  # right, if the answer were always the commonest class

    @property
    def percent(self) -> float:
        return 100 * self.right / self.images


def train(
    run: Run,
    checkpoint: Record | None = None,
    *,
    tell: Callable[[Progress], object] = lambda _: None,
    stop: Callable[[], bool] = lambda: False,
) -> Trained:
    """Train in place, and save on the way.

    Args:
        run: with options.compile call it within `private.allow_many_programs`, since r may change often.
        checkpoint: go on from there, if it is one.
        tell: called with how far it is.
        stop: asked after each step; if so, the state is saved.

    Raises:
        KeyboardInterrupt: it stopped so.
        ValueError: the loss is not finite any more, or an image cannot be read.
        OSError: the disk is full.
    """
    model, data, options = run.model, run.data, run.options
    device = torch.device(options.device)
    memory_format = torch.channels_last if options.channels_last else torch.preserve_format
    model.to(device)
    model.to(memory_format=memory_format)  # type: ignore[call-overload]
    model.set_grad_checkpointing(options.grad_checkpointing)
    peak = options.lr * (options.batch / options.lr_batch if options.lr_batch else 1.0)
    groups = param_groups(model, peak, options.weight_decay, options.layer_decay)
    optimizer = torch.optim.AdamW(groups, betas=options.betas)
    scaler = torch.amp.GradScaler(device.type, enabled=options.amp == "fp16")
    ema = None
    if options.ema:
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(options.ema))  # type: ignore[no-untyped-call]
    if options.compile:  # block by block: few programs, whatever the depth, and none for a new r
        for block in model.blocks:
            block.compile(dynamic=True)
    mix = mixing(options.mixup, options.cutmix, len(data.classes))

    parts = {"model": model, "optimizer": optimizer, "scaler": scaler} | ({"ema": ema} if ema else {})
    done: Record = {"epoch": 0, "step": 0, "loss": 0.0, "epochs": []}  # the loss is the sum of the epoch's steps
    if checkpoint:
        done = restore(checkpoint, parts)
    steps, seconds = run.steps, []

    for epoch in range(done["epoch"], options.epochs):
        model.train()
        batches = iter(load_epoch(data.train, epoch, done["step"], steps, options))
        mean = math.nan
        for step in range(done["step"], steps):
            start = time.perf_counter()
            passed = epoch + step / steps
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(passed, peak, options) * group["scale"]
            r = merged_at(passed, options)

            mean = 0.0
            for _ in range(options.accumulate):
                images, labels = next(batches)
                images = images.to(device, memory_format=memory_format, non_blocking=True)
                labels = labels.to(device, non_blocking=True)
                if mix:
                    images, labels = mix(images, labels)
                with torch.autocast(device.type, AMP.get(options.amp), enabled=options.amp in AMP):
                    loss = cross_entropy(model(images, r), labels, options.label_smoothing) / options.accumulate
                torch.autograd.backward(scaler.scale(loss))
                mean += loss.item()
            if options.clip:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), options.clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            if ema:
                ema.update_parameters(model)

            if not math.isfinite(mean):
                raise ValueError(
                    f"the loss became {mean} in step {step + 1} of epoch {epoch + 1}; a lower --lr may help"
                )
            seconds.append(time.perf_counter() - start)
            done |= {"step": step + 1, "loss": done["loss"] + mean}
            tell(Progress(epoch + 1, step + 1, steps, mean))
            taken, interrupted = epoch * steps + step + 1, stop()
            last = taken >= (options.steps or math.inf)
            if last or interrupted or (options.save_every and (step + 1) % options.save_every == 0):
                save_checkpoint(run, parts, done)
            if interrupted:
                raise KeyboardInterrupt
            if last:
                return Trained(done["epochs"], taken, seconds, ema)

        measured = {"epoch": epoch + 1, "loss": done["loss"] / steps}
        try:
            measured["accuracy"] = accuracy(model, data.test, options.r, options, stop).percent
            if ema:
                measured["ema_accuracy"] = accuracy(ema.module, data.test, options.r, options, stop).percent
        except KeyboardInterrupt:
            save_checkpoint(run, parts, done)
            raise
        tell(Progress(epoch + 1, steps, steps, mean, measured))
        done = {"epoch": epoch + 1, "step": 0, "loss": 0.0, "epochs": [*done["epochs"], measured]}
        save_checkpoint(run, parts, done)
    return Trained(done["epochs"], options.epochs * steps, seconds, ema)


def load_epoch(images: Images, epoch: int, done: int, steps: int, options: Options) -> DataLoader[Any]:
    """What is left of an epoch. The order depends on (seed, epoch) alone."""
    images.set_epoch(epoch)
    with seeded(options.seed, epoch):
        order = torch.randperm(len(images))
    if options.repeats > 1:  # some of the images, each several times in a row under other draws
        order = (order[:, None] + len(images) * torch.arange(options.repeats)).flatten()
    return DataLoader(
        images,
        options.batch // options.accumulate,
        sampler=order[done * options.batch : steps * options.batch].tolist(),
        num_workers=options.workers,
        worker_init_fn=_ignore_interrupts,
        pin_memory=options.device.startswith("cuda"),
        generator=torch.Generator(),  # or it would draw from the one that drops paths
    )


def _ignore_interrupts(_: int) -> None:
    """Ctrl-C reaches all processes of a terminal; when a step is finished first, its images have to come."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def learning_rate(passed: float, peak: float, options: Options) -> float:
    """Of the head, after so many epochs: up in a line, down in half a cosine."""
    if passed < options.warmup_epochs:
        return options.warmup_lr + (peak - options.warmup_lr) * passed / options.warmup_epochs
    share = (passed - options.warmup_epochs) / (options.epochs - options.warmup_epochs)
    return options.min_lr + (peak - options.min_lr) * (1 + math.cos(math.pi * share)) / 2


def merged_at(passed: float, options: Options) -> Schedule | None:
    """The r of a step, after so many epochs: from 0 up in a line."""
    if passed >= options.r_warmup:
        return options.r
    assert isinstance(options.r, int)
    return round(options.r * passed / options.r_warmup)


def mixing(mixup: float, cutmix: float, classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """Images and labels to mixtures of both, and probabilities; for each batch one of the two ways is drawn."""
    if not mixup and not cutmix:
        return None
    v2 = import_extra("torchvision.transforms.v2", "mixed images")
    ways = [way(alpha=alpha, num_classes=classes) for way, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha]
    return v2.RandomChoice(ways)


def cross_entropy(logits: Tensor | DistilledLogits, labels: Tensor, smoothing: float) -> Tensor:
    """With labels or probabilities. Without a teacher, both heads of a distilled model learn from the labels."""
    heads = logits if isinstance(logits, DistilledLogits) else (logits,)
    return torch.stack([F.cross_entropy(head, labels, label_smoothing=smoothing) for head in heads]).mean()


@torch.inference_mode()
def accuracy(
    model: nn.Module, images: Images, r: Schedule | None, options: Options, stop: Callable[[], bool] = lambda: False
) -> Accuracy:
    """Of these images.

    Raises:
        KeyboardInterrupt: `stop` said so.
    """
    model.eval()
    device, right, seen = torch.device(options.device), 0, []
    loader = DataLoader(
        images,
        options.batch // options.accumulate,
        num_workers=options.workers,
        worker_init_fn=_ignore_interrupts,
        generator=torch.Generator(),
    )
    for batch, labels in loader:
        with torch.autocast(device.type, AMP.get(options.amp), enabled=options.amp in AMP):
            logits = model(batch.to(device), r)
        right += int((logits.argmax(1).cpu() == labels).sum())
        seen.append(labels)
        if stop():
            raise KeyboardInterrupt
    labels = torch.cat(seen)
    return Accuracy(right, len(labels), int(labels.bincount().max()))
