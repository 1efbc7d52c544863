"""Images that look alike: the nearest neighbours of images among all others, at r = 0 and with merging.

    python -m examples.retrieval                                          # held-out digits, weights that ship
    python -m examples.retrieval --data photographs --model vit_b16       # crops of photographs; downloads weights
    python -m examples.retrieval --data FOLDER --model vit_b16 --merge 8 16     # your own

Every image is embedded by `tomevit.tasks.embed.embed` at each r, and compared with all others by the cosine of their
vectors. Of a folder the class of an image is the folder that it lies in, of crops the photograph that they are of. It
prints how many neighbours are right, which is of the image's class, how many are the same as at r = 0, and draws some.

Fresh weights (--fresh) know nothing of what is in a photograph: what they find alike has the same colours and textures.
They show that the program works, and how far merging moves neighbours, and nothing about what a trained model finds.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from PIL import Image
from torch import Tensor

import tomevit
from tomevit.data.images import read
from tomevit.tasks import embedding_files as embeddings
from tomevit.tasks import plots
from tomevit.tasks.demo import held_out
from tomevit.tasks.embed import Pool, embed, locate

COLOURS = {True: "#3a7d44", False: "#c8553d", None: "#c9ccd2"}  # the class of a neighbour: the same, another, unknown
CROPS = 16  # of each photograph
FRESH = "These weights are fresh: what is near has the same colours. How well a trained model finds, this does not say."


class Found(NamedTuple):
    """The neighbours of all images at one r."""

    r: int
    tokens: int  # leaving the last block
    neighbours: Tensor  # (N, k) int64, the nearest first


def nearest(vectors: Tensor, count: int) -> Tensor:
    """The rows (N, count) that have the largest products with each row of vectors (N, D), itself left out."""
    found = []
    for first, rows in enumerate(torch.split(vectors, 256)):
        products = rows @ vectors.T
        own = torch.arange(len(rows))
        products[own, 256 * first + own] = -torch.inf
        found.append(products.topk(count).indices)
    return torch.cat(found)


def same_class(neighbours: Tensor, labels: Tensor) -> Tensor:
    """Which neighbours (N, k) have the label of the image: (N, k) bool."""
    return labels[neighbours] == labels[:, None]


def shared(neighbours: Tensor, others: Tensor) -> float:
    """The share of neighbours (N, k) that are among others (N, k), in whatever order."""
    return float((neighbours[:, :, None] == others[:, None, :]).any(2).float().mean())


# ---------------------------------------------------------------------------------------------------------------- data


def write_digits(folder: Path) -> None:
    for number, (image, label) in enumerate(zip(*held_out(), strict=True)):
        path = folder / str(int(label)) / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0].numpy()).save(path)


def photographs() -> Iterator[tuple[str, Image.Image]]:
    """Photographs that scikit-learn and scikit-image bring with them."""
    from skimage import data
    from sklearn.datasets import load_sample_images

    for name, pixels in zip(("temple", "flower"), load_sample_images().images, strict=True):
        yield name, Image.fromarray(pixels)
    for name in ("astronaut", "chelsea", "coffee", "rocket", "hubble_deep_field", "retina", "immunohistochemistry"):
        yield name, Image.fromarray(getattr(data, name)())
    yield "motorcycle", Image.fromarray(data.stereo_motorcycle()[0])


def write_crops(folder: Path) -> None:
    """Crops of a tenth to a third of each photograph, the same every time, every other one mirrored."""
    draw = torch.Generator().manual_seed(0)
    for name, photograph in photographs():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(CROPS):
            area, ratio, across, down = torch.rand(4, generator=draw).tolist()
            size = (photograph.width * photograph.height * (0.1 + 0.23 * area)) ** 0.5
            width = min(photograph.width, round(size * (0.75 + 0.5 * ratio)))
            height = min(photograph.height, round(size / (0.75 + 0.5 * ratio)))
            left, top = round(across * (photograph.width - width)), round(down * (photograph.height - height))
            crop = photograph.crop((left, top, left + width, top + height)).resize((256, 256), Image.Resampling.LANCZOS)
            if number % 2:
                crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            crop.save(folder / name / f"{number:02}.png")


def labels_of(keys: Sequence[str]) -> Tensor | None:
    """The folder of each image as a number; None if all are in one."""
    folders = [str(Path(key).parent) for key in keys]
    numbers = {folder: number for number, folder in enumerate(sorted(set(folders)))}
    return torch.tensor([numbers[folder] for folder in folders]) if len(numbers) > 1 else None


# --------------------------------------------------------------------------------------------------------------- result


def table(found: Sequence[Found], labels: Tensor | None) -> list[str]:
    count = found[0].neighbours.shape[1]
    heads = ["r", "tokens", "nearest right %", f"{count} nearest right %", "shared with r = 0 %"]
    rows = [heads]
    for each in found:
        of_class = ["–", "–"]
        if labels is not None:
            right = same_class(each.neighbours, labels).float()
            of_class = [f"{100 * right[:, 0].mean():.1f}", f"{100 * right.mean():.1f}"]
        same = f"{100 * shared(each.neighbours, found[0].neighbours):.1f}"
        rows.append([str(each.r), str(each.tokens), *of_class, same])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def draw(path: Path, found: Sequence[Found], keys: Sequence[str], labels: Tensor | None, title: str) -> None:
    """Images at even distances among all, and beside each its nearest at each r; the frame says of which class."""
    from matplotlib.figure import Figure

    chosen = [round((i + 0.5) * len(keys) / 8 - 0.5) for i in range(8)] if len(keys) > 8 else range(len(keys))
    count = min(5, found[0].neighbours.shape[1])
    widths = [1.0]
    for _ in found:
        widths += [0.25, *[1.0] * count]
    figure = Figure(figsize=(0.82 * sum(widths) + 0.2, 0.86 * len(chosen) + 1.0), layout="constrained")
    axes = figure.subplots(len(chosen), len(widths), squeeze=False, gridspec_kw={"width_ratios": widths})
    for axis in axes.flat:
        axis.set_axis_off()

    def show(axis: Any, number: int, colour: str) -> None:
        axis.set_axis_on()
        axis.imshow(read(keys[number]).resize((128, 128), Image.Resampling.NEAREST))
        axis.set(xticks=[], yticks=[])
        for side in axis.spines.values():
            side.set(color=colour, linewidth=2.5)

    for row, number in zip(axes, chosen, strict=True):
        show(row[0], number, plots.INK)
        for i, each in enumerate(found):
            for axis, other in zip(row[2 + i * (count + 1) :], each.neighbours[number, :count].tolist(), strict=False):
                show(axis, other, COLOURS[None if labels is None else bool(labels[other] == labels[number])])
    axes[0][0].set_title("image", fontsize=9, color=plots.INK)
    for i, each in enumerate(found):
        axes[0][2 + i * (count + 1) + count // 2].set_title(f"nearest at r = {each.r}", fontsize=9, color=plots.INK)
    figure.suptitle(title, fontsize=11, color=plots.INK)
    frames = "Frames: green of the image's class, red of another." if labels is not None else ""
    figure.supxlabel(f"Images at even distances among all. {frames}", fontsize=8, color=plots.GREY)
    figure.savefig(path, dpi=plots.DPI)


# -------------------------------------------------------------------------------------------------------------- command


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, photographs, or a folder of images")
    parser.add_argument("--model", help="of the zoo; default: digits_p1.plain for digits, else vit_b16")
    parser.add_argument("--fresh", action="store_true", help="with fresh weights: see above")
    parser.add_argument("--img-size", type=int, help="pixels, instead of the model's own")
    parser.add_argument("--merge", type=int, nargs="+", default=[16], help="each r to compare with r = 0")
    parser.add_argument("--pool", choices=get_args(Pool), help="as tomevit embed; default: the model's own")
    parser.add_argument("--neighbours", type=int, default=10, help="of each image")
    parser.add_argument("--batch", type=int, default=32, help="images per call")
    parser.add_argument("--workers", type=int, default=0, help="processes that read images")
    parser.add_argument("--out", type=Path, default=Path("retrieval"), help="the folder for all that is written")
    return parser.parse_args(arguments)


def prepare_data(options: argparse.Namespace) -> Path:
    """The folder of images."""
    writers = {"digits": write_digits, "photographs": write_crops}
    if options.data not in writers:
        locate([options.data])  # before anything is written
        return Path(options.data)
    folder: Path = options.out / options.data
    if not folder.exists():
        unfinished = folder.with_name(f"{folder.name}.unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        writers[options.data](unfinished)
        unfinished.rename(folder)
    return folder


def run(options: argparse.Namespace) -> None:
    plots.require_matplotlib()
    name = options.model or ("digits_p1.plain" if options.data == "digits" else "vit_b16")
    torch.manual_seed(0)  # of fresh weights
    model = tomevit.create(name, pretrained=not options.fresh, img_size=options.img_size)
    values = list(dict.fromkeys([0, *options.merge]))
    for r in values:
        model.schedule(r)
    folder = prepare_data(options)
    options.out.mkdir(parents=True, exist_ok=True)
    found, keys = [], None
    for r in values:
        file = options.out / f"r{r}.safetensors"
        report = embed(
            model,
            [folder],
            file,
            r=r,
            pool=options.pool,
            normalize=True,
            batch=options.batch,
            workers=options.workers,
            overwrite=True,
        )
        embedded = embeddings.read(file)
        keys = list(embedded.keys)
        if len(keys) < 2:
            raise ValueError(f"{folder} has {len(keys)} images that can be read; there must be two at least")
        neighbours = nearest(embedded.vectors, min(options.neighbours, len(keys) - 1))
        found.append(Found(r, model.token_counts(r)[-1], neighbours))
    assert keys is not None
    labels = labels_of(keys)
    title = f"{name}, fresh weights" if options.fresh else model.card.full_name
    print(f"{len(keys)} images of {folder}, {report.num_unreadable} left out; {title}\n")
    print("\n".join(table(found, labels)))
    if options.fresh:
        print("\n" + FRESH)
    picture = options.out / "neighbours.png"
    draw(picture, found, keys, labels, f"Nearest neighbours, {title}")
    print(f"\nwritten to {options.out}: {', '.join(f'r{r}.safetensors' for r in values)}, {picture.name}")


def main(arguments: Sequence[str] | None = None) -> None:
    try:
        run(read_options(arguments))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"retrieval: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("retrieval: interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
