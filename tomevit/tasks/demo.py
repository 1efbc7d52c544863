"""What merging costs and brings, measured on real images with models that ship with tomevit; needs no network."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tomevit.factory import create
from tomevit.measure.bench import bench
from tomevit.measure.timing import environment
from tomevit.models import VisionTransformer
from tomevit.output import make_directory, new_file
from tomevit.progress import progress_bar
from tomevit.schedule import Schedule, distinct_schedules, format_schedule, schedule_from_json, schedule_to_json
from tomevit.tasks import plots
from tomevit.tasks.plots import Point
from tomevit.transform import transform
from tomevit.version import __version__
from tomevit.zoo import cards

MODELS = ("digits_p2", "digits_p1")
R_VALUES: tuple[Schedule, ...] = (8, 13, 16, "2x")
PICTURED = (0, 2, 3, 4, 5, 8)  # classes whose shapes differ most


def held_out(model: str = "digits_p1") -> tuple[Tensor, Tensor]:
    """Digits that no model was trained on: images (N, 1, H, W) uint8, ink is bright, and labels (N,) int64.

    Args:
        model: "digits_p1", whose images are 360 of 8x8 pixels, or "digits_p2", with 500 of 28x28.
    """
    tensors = load_file(str(resources.files("tomevit") / "assets" / f"{model}_heldout.safetensors"))
    return tensors["images"], tensors["labels"]


@torch.inference_mode()
def accuracy(
    model: VisionTransformer, images: Tensor, labels: Tensor, r: Schedule | None = None, batch: int = 100
) -> float:
    """Per cent of images classified right.

    Args:
        images: (N, C, H, W) uint8, not yet prepared.
        labels: (N,) int64.
        r: instead of the model's own.
        batch: images per call.
    """
    prepared = transform(model)(images)
    answers = torch.cat([model(part, r).argmax(1) for part in torch.split(prepared, batch)])
    return 100 * int((answers == labels).sum()) / len(labels)


@contextmanager
def one_thread() -> Iterator[None]:
    """So small a model gains little from more, and threads that wait for each other on a busy machine cost a lot."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(
    out: Path, r_values: Sequence[Schedule] = (), *, model: str = MODELS[0], batch: int = 50, rounds: int = 12
) -> dict[str, Any]:
    """Classify held-out digits at several r, and write two pictures and all figures.

    Times one CPU thread.

    Args:
        out: the directory for merged_tokens.png, accuracy_throughput.png and results.json; made if need be.
        r_values: what to compare with r = 0; empty: a range.
        model: "digits_p2", which has as many tokens and blocks as a ViT-B/16 at 224, or the small "digits_p1".
        batch: images per call.
        rounds: timed calls of each r.

    Returns:
        What results.json has.

    Raises:
        ValueError: an r of no known form, or matplotlib is not installed.
        OutputError: nothing can be written into that directory.
    """
    plots.require_matplotlib()
    plain, trained = (create(card.full_name, pretrained=True) for card in cards(model))
    values = distinct_schedules([0, *(r_values or R_VALUES)])
    for r in values:
        plain.schedule(r)  # a wrong r ends here, before anything is measured or written
    make_directory(out)

    images, labels = held_out(model)
    with one_thread():
        results = _measure(plain, trained, images, labels, values, batch, rounds)
    with new_file(out / "merged_tokens.png") as draft:
        _draw_merging(draft, trained, images, labels)
    with new_file(out / "accuracy_throughput.png") as draft:
        _draw_trade_off(draft, results)
    with new_file(out / "results.json") as draft:
        draft.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


def _measure(
    plain: VisionTransformer,
    trained: VisionTransformer,
    images: Tensor,
    labels: Tensor,
    values: Sequence[Schedule],
    batch: int,
    rounds: int,
) -> dict[str, Any]:
    """Everything that results.json holds. Both models have the same architecture, so one of them is timed."""
    calls = len(values) * (2 + rounds + 2)
    with progress_bar(total=calls, unit="call") as bar:
        rows = []
        for r in values:
            right = {}
            for key, model in (("off_the_shelf", plain), ("trained_with_merging", trained)):
                right[key] = accuracy(model, images, labels, r, batch)
                bar.update()
            rows.append({"r": schedule_to_json(r), "accuracy": right})
        timed = bench(plain, values, batch=batch, rounds=rounds, progress=bar.update)
    for row, found in zip(rows, timed, strict=True):
        row |= {
            "schedule": found.schedule,
            "tokens": found.tokens,
            "gflops_computed": found.gflops_computed,
            "images_per_second": found.images_per_second,
            "speed_up": found.speed_up,
            "flop_ratio_computed": found.flop_ratio_computed,
        }
    return {
        "images": len(labels),
        "off_the_shelf": plain.card.full_name,
        "trained_with_merging": trained.card.full_name,
        "trained_r": schedule_to_json(trained.r),
        "batch": batch,
        "rounds": rounds,
        "dtype": str(plain.dtype).removeprefix("torch."),
        "environment": environment() | {"tomevit": __version__},
        "rows": rows,
    }


def setting(results: dict[str, Any]) -> str:
    """How results were measured, in words."""

    def count(number: int, what: str) -> str:
        return f"{number} {what}{'s' if number > 1 else ''}"

    threads = int(results["environment"]["threads"])
    return (
        f"Median of {count(results['rounds'], 'call')} of {count(results['batch'], 'image')}, {results['dtype']}, "
        f"{count(threads, 'thread')}"
    )


def format_stored_r(stored: Any) -> str:
    """An r of results, as it is typed."""
    return format_schedule(schedule_from_json(stored))


@torch.inference_mode()
def _draw_merging(path: Path, model: VisionTransformer, images: Tensor, labels: Tensor) -> None:
    """The first held-out digit of some classes, and its tokens after four of the blocks."""
    chosen = [int((labels == label).nonzero()[0]) for label in PICTURED]
    steps = model.forward_intermediates(transform(model)(images[chosen]))
    prefix, grid, depth = model.config.num_prefix, model.config.grid, model.config.depth
    slots = [tokens.slots for tokens in steps if tokens.slots is not None]  # traced, so all of them
    shown = range(depth // 4 - 1, depth, depth // 4)
    plots.merged_tokens(
        path,
        list(images[chosen]),
        [[slots[block][i, prefix:].view(grid) for block in shown] for i in range(len(chosen))],
        [
            f"image\n{model.config.num_tokens} tokens",
            *(f"after block {block + 1}\n{steps[block].x.shape[1]} tokens" for block in shown),
        ],
        [str(label) for label in PICTURED],
        f"What is left when r = {format_schedule(model.r)} tokens merge in each block (the class token is counted)",
    )


def _draw_trade_off(path: Path, results: dict[str, Any]) -> None:
    rows = results["rows"]
    plots.accuracy_throughput(
        path,
        {
            name: [
                Point(
                    f"r = {format_stored_r(row['r'])}",
                    row["images_per_second"],
                    row["accuracy"][key],
                    row["gflops_computed"],
                )
                for row in rows
            ]
            for key, name in (
                ("off_the_shelf", "merging off the shelf"),
                ("trained_with_merging", f"trained with merging, r = {format_stored_r(results['trained_r'])}"),
            )
        },
        f"Merging on {results['images']} held-out digits",
        f"{setting(results)}\n{results['environment']['device']}",
    )
