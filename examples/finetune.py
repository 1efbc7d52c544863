"""Fine-tune a model, with merging, in plain PyTorch: one process, every option on the command line.

    pip install -e '.[train]'
    python -m examples.finetune --data digits --model digits_p1 --pretrained true --keep-head --r 16 --epochs 5
    python -m examples.finetune --data FOLDER --model vit_b16 --pretrained true --r 16 --amp bf16 --out run
    python -m examples.finetune --resume --out run                              # after an interruption
    python -m examples.finetune --recipe mae_b16.tome_r16 --dry-run --batch 4   # does it fit?

FOLDER has train/ and val/ in it, and in each of them a folder for every class. Into --out go checkpoint.pt, renewed
after each epoch and every --save-every steps, and in the end report.json and model.safetensors (and ema.safetensors).

A resumed run takes its options from the checkpoint, and ends in the same weights, to the bit, as one that was never
interrupted; on a GPU, as far as its kernels add in a fixed order. Only --out, --steps, --save-every and --workers may
be given again with other values: no weight depends on them. Weights do depend on --threads, over which sums are split.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm

import tomevit
from examples.data import Data, DataError, Images, seeded
from examples.finetune_options import AMP, Record, command, describe, overridden, read_options, set_up
from tomevit.measure.timing import environment
from tomevit.models import DistilledLogits, VisionTransformer
from tomevit.output import new_file
from tomevit.schedule import Schedule

# --- The loop ---------------------------------------------------------------------------------------------------------


def train(model: VisionTransformer, data: Data, options: argparse.Namespace, checkpoint: Record | None) -> Record:
    """Train in place, and save on the way.

    Args:
        checkpoint: go on from there, if it is one.

    Returns:
        `epochs`, what was measured after each; `seconds`, of each step of this process; `ema`, the averaged model.
    """
    device = torch.device(options.device)
    memory_format = torch.channels_last if options.channels_last else torch.preserve_format
    model.to(device)
    model.to(memory_format=memory_format)  # type: ignore[call-overload]
    model.set_grad_checkpointing(options.grad_checkpointing)
    peak = options.lr * (options.batch / options.lr_batch if options.lr_batch else 1.0)
    groups = tomevit.param_groups(model, peak, options.weight_decay, options.layer_decay)
    optimizer = torch.optim.AdamW(groups, betas=tuple(options.betas))
    scaler = torch.amp.GradScaler(device.type, enabled=options.amp == "fp16")
    ema = None
    if options.ema:
        ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(options.ema))  # type: ignore[no-untyped-call]
    if options.compile:  # block by block: few programs, whatever the depth, and none for a new r
        torch._dynamo.config.recompile_limit = 64
        for block in model.blocks:
            block.compile(dynamic=True)
    mix = mixing(options.mixup, options.cutmix, len(data.classes))

    parts = {"model": model, "optimizer": optimizer, "scaler": scaler} | ({"ema": ema} if ema else {})
    done: Record = {"epoch": 0, "step": 0, "loss": 0.0, "epochs": []}  # the loss is the sum of the epoch's steps
    if checkpoint:
        done = restore(checkpoint, parts)
    steps = len(data.train) // options.batch  # of an epoch; the images left over wait for another order
    seconds: list[float] = []

    for epoch in range(done["epoch"], options.epochs):
        model.train()
        bar = tqdm(total=steps, initial=done["step"], desc=f"epoch {epoch + 1}", delay=2, leave=False, disable=None)
        batches = iter(load_epoch(data.train, epoch, done["step"], steps, options))
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
                sys.exit(f"the loss became {mean} in step {step + 1} of epoch {epoch + 1}; a lower --lr may help")
            seconds.append(time.perf_counter() - start)
            done |= {"step": step + 1, "loss": done["loss"] + mean}
            bar.set_postfix(loss=f"{mean:.3f}", refresh=False)
            bar.update()
            stop = epoch * steps + step + 1 >= (options.steps or math.inf)
            if stop or (options.save_every and (step + 1) % options.save_every == 0):
                save(options, data, parts, done)
            if stop:
                bar.close()
                return done | {"seconds": seconds, "ema": ema}
        bar.close()

        measured = {"epoch": epoch + 1, "loss": done["loss"] / steps}
        measured["accuracy"] = accuracy(model, data.test, options.r, options)
        if ema:
            measured["ema_accuracy"] = accuracy(ema.module, data.test, options.r, options)
        print(", ".join(f"{name} {value:.4g}" for name, value in measured.items()))
        done = {"epoch": epoch + 1, "step": 0, "loss": 0.0, "epochs": [*done["epochs"], measured]}
        save(options, data, parts, done)
    return done | {"seconds": seconds, "ema": ema}


def load_epoch(images: Images, epoch: int, done: int, steps: int, options: argparse.Namespace) -> DataLoader[Any]:
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
        pin_memory=options.device.startswith("cuda"),
        generator=torch.Generator(),  # or it would draw from the one that drops paths
    )


def learning_rate(passed: float, peak: float, options: argparse.Namespace) -> float:
    """Of the head, after so many epochs: up in a line, down in half a cosine."""
    if passed < options.warmup_epochs:
        return options.warmup_lr + (peak - options.warmup_lr) * passed / options.warmup_epochs
    share = (passed - options.warmup_epochs) / (options.epochs - options.warmup_epochs)
    return options.min_lr + (peak - options.min_lr) * (1 + math.cos(math.pi * share)) / 2


def merged_at(passed: float, options: argparse.Namespace) -> Schedule:
    """The r of a step, after so many epochs: from 0 up in a line."""
    return options.r if passed >= options.r_warmup else round(options.r * passed / options.r_warmup)


def mixing(mixup: float, cutmix: float, classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """Images and labels to mixtures of both, and probabilities; for each batch one of the two ways is drawn."""
    if not mixup and not cutmix:
        return None
    from torchvision.transforms import v2

    ways = [way(alpha=alpha, num_classes=classes) for way, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha]
    return v2.RandomChoice(ways)


def cross_entropy(logits: Tensor | DistilledLogits, labels: Tensor, smoothing: float) -> Tensor:
    """With labels or probabilities. Without a teacher, both heads of a distilled model learn from the labels."""
    heads = logits if isinstance(logits, DistilledLogits) else (logits,)
    return torch.stack([F.cross_entropy(head, labels, label_smoothing=smoothing) for head in heads]).mean()


@torch.inference_mode()
def accuracy(model: nn.Module, images: Images, r: Schedule, options: argparse.Namespace) -> float:
    """Per cent classified right."""
    model.eval()
    device, right = torch.device(options.device), 0
    size, generator = options.batch // options.accumulate, torch.Generator()
    for batch, labels in DataLoader(images, size, num_workers=options.workers, generator=generator):
        with torch.autocast(device.type, AMP.get(options.amp), enabled=options.amp in AMP):
            logits = model(batch.to(device), r)
        right += int((logits.argmax(1).cpu() == labels).sum())
    return 100 * right / len(images)


# --- Checkpoints ------------------------------------------------------------------------------------------------------


def save(options: argparse.Namespace, data: Data, parts: Record, done: Record) -> None:
    """Everything that the next step depends on. The file changes all at once."""
    if options.dry_run:
        return
    Path(options.out).mkdir(parents=True, exist_ok=True)
    generators = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]
    state = {name: part.state_dict() for name, part in parts.items()}
    with new_file(Path(options.out) / "checkpoint.pt") as path:
        torch.save(
            {"options": vars(options), "data": describe(data), "done": done, "generators": generators} | state, path
        )


def restore(checkpoint: Record, parts: Record) -> Record:
    for name, part in parts.items():
        part.load_state_dict(checkpoint[name])
    cpu, *gpus = checkpoint["generators"]
    torch.set_rng_state(cpu)
    if gpus:
        torch.cuda.set_rng_state_all(gpus)
    return checkpoint["done"]


# --- After ------------------------------------------------------------------------------------------------------------


def finish(model: VisionTransformer, data: Data, options: argparse.Namespace, trained: Record) -> Record:
    """Measure, and write model.safetensors, ema.safetensors and report.json."""
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise ValueError("the last step made weights that are not finite; a lower --lr may help")
    out, models = Path(options.out), {"model": model}
    if trained["ema"]:
        models["ema"] = trained["ema"].module
    values = [options.r] if options.r == 0 else [options.r, 0]
    best = max(trained["epochs"], key=lambda epoch: epoch["accuracy"])
    report = {
        "accuracy": {
            name: {f"r = {r}": accuracy(each, data.test, r, options) for r in values} for name, each in models.items()
        },
        "best_epoch": best["epoch"],
        "images": {"trained_on": len(data.train), "measured_on": len(data.test)},
        **cost(options, trained),
        "recipe": {"name": options.recipe, "overridden": overridden(options)} if options.recipe else None,
        "command": command(options),
        "options": vars(options),
        "environment": environment(options.device) | {"tomevit": tomevit.__version__},
        "epochs": trained["epochs"],
    }
    card = replace(model.card, weights=None, sources=(), origin=None, figures=())
    card = replace(card, class_names=data.classes, notes=f"Trained with: {report['command']}")
    for name, each in models.items():
        tomevit.save(each.cpu(), out / f"{name}.safetensors", card=card)
    with new_file(out / "report.json") as path:
        path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return report


def cost(options: argparse.Namespace, trained: Record) -> Record:
    """What a step of this process took, loading included."""
    peak = None
    if options.device.startswith("cuda"):
        peak = torch.cuda.max_memory_allocated(options.device) / 2**20
    elif sys.platform != "win32":
        import resource

        # Of the whole process; in KiB, on macOS in bytes.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    seconds = statistics.median(trained["seconds"]) if trained["seconds"] else None  # if nothing was left to do
    return {
        "steps_timed": len(trained["seconds"]),
        "seconds_per_step": seconds,
        "images_per_second": options.batch / seconds if seconds else None,
        "peak_memory_mib": peak,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    try:
        options, checkpoint = read_options(arguments)
        model, data = set_up(options, checkpoint)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        fail(error)
    try:
        trained = train(model, data, options, checkpoint)
    except (DataError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit("finetune: interrupted; --resume goes on from the last checkpoint, if there is one")
    if options.dry_run:
        print(f"{model.card.name}, r = {model.r}: {', '.join(map(str, model.token_counts()))} tokens")
        print(json.dumps(cost(options, trained)))
    elif trained["epoch"] < options.epochs:
        print(f"stopped after {options.steps} steps; --resume goes on")
    else:
        try:
            report = finish(model, data, options, trained)
        except (ValueError, OSError) as error:
            fail(error)
        show(report)


def fail(error: Exception) -> NoReturn:
    print(f"finetune: {error}", file=sys.stderr)
    sys.exit(2)


def show(report: Record) -> None:
    models = report["accuracy"]
    for name, at in models.items():
        print(f"{name}: {', '.join(f'{value:.2f} % at {r}' for r, value in at.items())}")
    print(f"best epoch {report['best_epoch']} of {len(report['epochs'])}")
    if report["recipe"]:
        print(f"recipe {report['recipe']['name']}, except for {report['recipe']['overridden'] or 'nothing'}")
    costs = {name: report[name] for name in ("seconds_per_step", "images_per_second", "peak_memory_mib")}
    print(", ".join(f"{name} {value:.4g}" for name, value in costs.items() if value is not None))
    print(f"written to {report['options']['out']}: report.json, {', '.join(f'{name}.safetensors' for name in models)}")


if __name__ == "__main__":
    main()
