"""The pictures of the pages, drawn from what the library does.

python -m docs.pictures            write them into docs/images; needs pip install '.[plot,train]'
python -m docs.pictures FOLDER     write them there

The photographs come with scikit-learn: china.jpg by danielbuechele and flower.jpg by vultilion, both on Flickr, both
CC BY 2.0, here cropped, scaled and painted over. Models that see them have fresh weights; the digits' are trained.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor

import tomevit
from docs import tables
from tomevit.layers import bipartite_soft_matching, merge_mean
from tomevit.schedule import Schedule, format_schedule
from tomevit.tasks import demo, plots
from tomevit.tasks.visualize import Observation, Run, observe, pictures

IMAGES = Path(__file__).parent / "images"
HERO = "digits_p2.tome_r13"  # the trained model that the first picture is drawn from
HERO_DIGIT = 3
SCHEDULES: tuple[Schedule, ...] = (0, 8, 0.08, 13, 16, (13, -1.0))  # from the dearest to the cheapest
EVEN, ODD, MERGED = plots.COLOURS[0], plots.COLOURS[1], plots.COLOURS[2]


def photograph(name: str, size: int) -> Tensor:
    """The largest square in the middle of one of scikit-learn's photographs: (3, size, size) uint8."""
    image = Image.fromarray(load_sample_image(f"{name}.jpg"))
    edge = min(image.size)
    left, top = (image.width - edge) // 2, (image.height - edge) // 2
    square = image.crop((left, top, left + edge, top + edge)).resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)


def one_step(path: Path, *, count: int = 12, r: int = 4) -> None:
    """Bipartite matching on a row of patches, with their own colours for keys: the sets, the pairs, what comes out."""
    row = photograph("flower", 480)[:, 250:290].to(torch.float32)
    patches = rearrange(row, "c h (n w) -> n c h w", n=count)
    colours = reduce(patches, "n c (a h) (b w) -> n (c a b)", "mean", a=2, b=2)
    key = (colours - colours.mean(0))[None]
    merge = bipartite_soft_matching(key, r, 0)
    even, odd = (F.normalize(key[0, start::2], dim=-1) for start in (0, 1))
    similarity, nearest = (even @ odd.mT).max(-1)
    mean, _ = merge_mean(patches.flatten(1)[None], torch.ones(1, count, 1), merge)
    leaving = merge.src[0].tolist()

    figure = plots._figure(10.4, 5.4)
    above, below = figure.subplots(2, 1, gridspec_kw={"height_ratios": (36, 17)})
    for i, patch in enumerate(patches):
        _patch(above, patch, str(i), i, 0 if i % 2 else 1.9, colour=ODD if i % 2 else EVEN, below=bool(i % 2))
    for i, (value, j) in enumerate(zip(similarity.tolist(), nearest.tolist(), strict=True)):
        chosen, start, end = 2 * i in leaving, (2 * i, 1.45), (2 * j + 1, 0.46)
        colour, width = (MERGED, 2.6) if chosen else (plots.FAINT, 1.3)
        arrow = {"arrowstyle": "-|>", "shrinkA": 0, "shrinkB": 0, "color": colour, "linewidth": width}
        above.annotate("", end, start, arrowprops=arrow, zorder=2 if chosen else 1)
        label = [0.72 * a + 0.28 * b for a, b in zip(start, end, strict=True)]
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.2}
        above.text(
            *label,
            f"{value:.2f}",
            ha="center",
            va="center",
            fontsize=9,
            color=plots.INK if chosen else plots.GREY,
            bbox=box,
        )
    for i, first in enumerate(merge.keep[0].tolist()):
        members = sorted([first, *merge.src[0][merge.dst[0] == i].tolist()])
        colour = MERGED if len(members) > 1 else ODD if first % 2 else EVEN
        picture = mean[0, i].view(patches[0].shape)
        _patch(below, picture, " + ".join(map(str, members)), i, 0, colour=colour, below=True)
    titles = (
        f"{count} patches in two sets, even and odd; each even one finds the odd one that it is most similar to",
        f"the r = {r} most similar pairs merge into their mean; {count - r} tokens remain: even ones, then odd ones",
    )
    for axis, title, top in zip((above, below), titles, (2.7, 0.8), strict=True):
        axis.set_title(title, fontsize=11, color=plots.INK, loc="left", x=0.01)
        axis.set_xlim(-0.6, count - 0.4)
        axis.set_ylim(-0.9, top)
        axis.set_aspect("equal")
        axis.axis("off")
    plots.save(figure, path)


def _patch(axis: Axes, picture: Tensor, name: str, x: float, y: float, *, colour: str, below: bool) -> None:
    """A patch with a frame around it and its name above or below."""
    left, right, bottom, top = x - 0.4, x + 0.4, y - 0.4, y + 0.4
    axis.imshow((picture / 255).permute(1, 2, 0).numpy(), extent=(left, right, bottom, top), interpolation="nearest")
    axis.add_patch(Rectangle((left, bottom), 0.8, 0.8, fill=False, edgecolor=colour, linewidth=2.2))
    axis.text(x, bottom - 0.25 if below else top + 0.25, name, ha="center", va="center", color=plots.INK, fontsize=9)


@torch.inference_mode()
def over_depth(path: Path) -> None:
    """Photographs, and what remains of their patches after some blocks of ViT-S/16 with fresh weights."""
    torch.manual_seed(0)
    model = tomevit.create("vit_s16", r=16)
    names, blocks = ("china", "flower"), (1, 3, 5, 7, 9, 12)
    images = torch.stack([photograph(name, model.config.img_size[0]) for name in names])
    every = model.forward_intermediates(tomevit.transform(model)(images))
    steps = [every[block - 1] for block in blocks]
    prefix, grid = model.config.num_prefix, model.config.grid
    slots = [tokens.slots for tokens in steps if tokens.slots is not None]  # traced, so all of them
    remaining = [tokens.x.shape[1] for tokens in steps]
    plots.merged_tokens(
        path,
        [photograph(name, 24 * grid[0]) for name in names],  # a patch is drawn with 24 pixels
        [[step[i, prefix:].view(grid) for step in slots] for i in range(len(names))],
        [
            f"image\n{model.config.num_tokens} tokens",
            *(f"after block {block}\n{count} tokens" for block, count in zip(blocks, remaining, strict=True)),
        ],
        [""] * len(names),
        f"ViT-S/16 with fresh weights, r = {model.r}; the class token is counted",
    )


def schedules(path: Path) -> None:
    """Tokens that enter each block of ViT-B/16, for some r."""
    model = tomevit.create("vit_ti16")  # as deep as ViT-B, with as many tokens
    config = tomevit.card("vit_b16").config
    figure = plots._figure(7.6, 4.6)
    axis = figure.subplots()
    for i, r in enumerate(SCHEDULES):
        counts, ratio = model.token_counts(r), tomevit.flops(config) / tomevit.flops(config, r)
        label = f"r = {format_schedule(r)}: {ratio:.2f} times fewer FLOPs" if r else "r = 0"
        colour = plots.shade(i / (len(SCHEDULES) - 1))
        axis.plot(
            range(len(counts)), counts, label=label, linewidth=1.8, marker="os^Dv*"[i], markersize=5, color=colour
        )
    axis.set_xticks(range(config.depth + 1), [*map(str, range(1, config.depth + 1)), "remain"])
    axis.set_ylim(bottom=0)
    axis.set_xlabel("block", fontsize=10.5, color=plots.INK)
    axis.set_ylabel("tokens that enter it", fontsize=10.5, color=plots.INK)
    axis.set_title("Tokens in ViT-B/16, the class token included, and what merging saves", fontsize=12, color=plots.INK)
    axis.legend(frameon=False, fontsize=9.5, labelcolor=plots.INK, loc="lower left")
    plots._tidy(axis)
    plots.save(figure, path)


def hero(path: Path) -> None:
    """A digit that the model knows, merged or not: the image, and its tokens block by block."""
    model = tomevit.create(HERO, pretrained=True)
    images, labels = demo.held_out("digits_p2")
    config, r = model.config, model.r
    blocks = pictures.blocks_to_show(config, "strip")
    seen = _first_right(model, images[labels == HERO_DIGIT], str(HERO_DIGIT))
    plain, merged = seen.runs
    scale = max(8, 448 // config.grid[0])
    figure = plots.panels(
        [[seen.image / 255, *(plots.draw_groups(seen.image, merged.groups[i], scale, scale // 7) for i in blocks)]],
        [f"image\n{config.num_tokens} tokens", *(f"after block {i}\n{merged.tokens[i]} tokens" for i in blocks)],
        [""],
        f"A trained ViT merges r = {format_schedule(r)} tokens in each block: "
        f"{tomevit.flops(config, computed=True) / tomevit.flops(config, r, computed=True):.1f} times fewer FLOPs, "
        "the same answer",
        f"{model.card.full_name}. {plots.MERGED_NOTE}\nThe class token, which never merges, is counted.",
        captions=[[_answer(plain), *[""] * (len(blocks) - 1), _answer(merged)]],
        inches=1.9,
    )
    plots.save(figure, path)


def _first_right(model: tomevit.VisionTransformer, images: Tensor, name: str) -> Observation:
    """What becomes of the first of some images that the model takes for what it is, unmerged and merged."""
    for image in images:
        seen = observe(model, image, [0, model.r])
        if all(run.answers[0].name == name for run in seen.runs):
            return seen
    raise ValueError(f"{model.card.full_name} knows no {name}")


def _answer(run: Run) -> str:
    return f"{run.answers[0].name}, {100 * run.answers[0].probability:.0f} %"


def digits(path: Path) -> None:
    """As `tomevit demo` draws them."""
    demo._draw_merging(path, tomevit.create(HERO, pretrained=True), *demo.held_out("digits_p2"))


def eight(path: Path) -> None:
    """As `tomevit visualize` draws it."""
    observation = tables.observed((8, 16))
    pictures.draw(path, ".png", observation, f"{tables.digit()[1]} in {observation.card.full_name}")


PICTURES: dict[str, Callable[[Path], None]] = {
    "hero.png": hero,
    "matching.png": one_step,
    "photographs.png": over_depth,
    "schedules.png": schedules,
    "merged_tokens.png": digits,
    "eight.png": eight,
}


def main(folder: Path = IMAGES) -> None:
    for name, draw in PICTURES.items():
        draw(folder / name)


if __name__ == "__main__":
    places = [Path(argument) for argument in sys.argv[1:]]
    if len(places) > 1 or not all(place.is_dir() for place in places):
        sys.exit(__doc__)
    main(*places)
