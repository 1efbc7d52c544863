"""What the five distributed examples share: options, the model and its data, r over the training, a log, checks."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader

import tomevit
from tomevit.training.datasets import Data, Images, load_data
from tomevit.training.digits import DIGITS, init_small

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))  # torchrun sets them


def parse_options(description: str | None) -> argparse.Namespace:
    """The options of all five."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, mnist, or a folder with train/ and val/")
    parser.add_argument("--model", default="digits_p1", help="a name of the zoo")
    parser.add_argument("--pretrained", action="store_true", help="begin with the weights of that name")
    # Python 3.11's argparse in torchrun would take an --r for its own.
    parser.add_argument(
        "--merge", type=int, default=16, dest="r", help="r: tokens that merge in each block, in the end"
    )
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=64, help="images per step, of all processes together")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="train on so many images only")
    parser.add_argument("--out", type=Path, default=Path("run"), help="the folder for all that is written")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    return parser.parse_args()


def prepare(options: argparse.Namespace, checkpoints: str) -> tuple[tomevit.VisionTransformer, Data, Path | None]:
    """The model in training mode, its data, and the newest checkpoint if there is one to resume from.

    Args:
        checkpoints: the pattern of their names in --out.
    """
    found = max(options.out.glob(checkpoints), key=lambda path: path.stat().st_mtime, default=None)
    if options.resume and not found:
        fail(
            f"{options.out} holds no checkpoint to resume from; leave out --resume, or name the --out of an earlier run"
        )
    if found and not options.resume:
        fail(f"{options.out} holds the checkpoint of an earlier run; go on with --resume, or name another --out")
    if options.batch < 1 or options.batch % WORLD:
        fail(f"--batch is {options.batch}, and must be a positive multiple of the number of processes, {WORLD}")
    torch.manual_seed(options.seed)  # the same initial weights in every process
    try:
        data = load_data(options.data, tomevit.transform(tomevit.create(options.model)), limit=options.limit)
        classes = len(data.classes)
        model = tomevit.create(options.model, r=options.r, pretrained=options.pretrained, num_classes=classes)
    except (ValueError, OSError, ModuleNotFoundError) as error:
        fail(str(error))
    if len(data.train) < options.batch:
        fail(f"--batch is {options.batch}, and there are only {len(data.train)} images to train on")
    if options.data in DIGITS and not options.pretrained:
        init_small(model)
    model.card = replace(model.card, class_names=data.classes)

    settings = {name: value for name, value in vars(options).items() if name not in ("out", "resume")}
    settings |= {"classes": list(data.classes)}
    if found:
        was = json.loads((options.out / "options.json").read_text())
        if other := [f"{name} {was.get(name)}, not {new}" for name, new in settings.items() if was.get(name) != new]:
            fail(f"{options.out} was begun with {' and '.join(other)}; resume it with the same options")
    elif RANK == 0:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "options.json").write_text(json.dumps(settings))
        (options.out / "losses.jsonl").write_text("")
    if RANK == 0:
        shutil.rmtree(options.out / "unfinished", ignore_errors=True)
    return model.train(), data, found


def join() -> torch.device:
    """Join the other processes that torchrun started, over NCCL where there are GPUs, else over Gloo."""
    if not dist.is_torchelastic_launched():
        fail(f"start it as torchrun --nproc-per-node 2 -m examples.{Path(sys.argv[0]).stem}")
    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if not gpus:
        dist.init_process_group("gloo")
        return torch.device("cpu")
    if gpus < int(os.environ["LOCAL_WORLD_SIZE"]):
        fail(f"there are more processes than GPUs; start it with torchrun --nproc-per-node {gpus}")
    torch.cuda.set_device(local)
    dist.init_process_group("nccl", device_id=torch.device("cuda", local))
    return torch.device("cuda", local)


def r_at(step: int, steps: int, r: int) -> int:
    """The schedule of r: it rises from 0 over the first half of the training."""
    return min(r, 2 * r * step // steps)


def record(out: Path, step: int, loss: float) -> None:
    """One more line of losses.jsonl; of a step that a resumed run takes again, the last line counts."""
    if RANK == 0:
        with (out / "losses.jsonl").open("a") as file:
            print(json.dumps({"step": step, "loss": loss}), file=file)


def keep(unfinished: Path, name: str) -> None:
    """Give a checkpoint that is whole its name, and remove the one before."""
    if RANK == 0:
        before = list(unfinished.parent.glob("epoch_*"))
        unfinished.rename(unfinished.with_name(name))
        for path in before:
            shutil.rmtree(path.rename(unfinished))  # what is half removed must not look like a checkpoint


@torch.inference_mode()
def report(path: Path, test: Images) -> None:
    """The accuracy of the model in a file."""
    model = tomevit.load(path)
    right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in DataLoader(test, 64))
    print(f"{path}: r = {model.r}, {100 * right / len(test):.2f} % of {len(test)} held-out images")


def fail(message: str) -> NoReturn:
    """End every process; the first says why."""
    if RANK == 0:
        print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(2)
