"""What merging does to an image: `tomevit visualize`."""

from __future__ import annotations

from pathlib import Path

import click

from tomevit.cli import options
from tomevit.cli.console import echo
from tomevit.cli.options import Command, R
from tomevit.cli.running import card_of_argument, device_of, trained
from tomevit.data import images
from tomevit.measure.defaults import default_r
from tomevit.output import check_outputs
from tomevit.progress import progress_bar
from tomevit.schedule import Schedule, distinct_schedules
from tomevit.tasks.visualize import PAGE, file_kind, pictures
from tomevit.tasks.visualize import visualize as make
from tomevit.tasks.visualize.film import SUFFIXES as ANIMATIONS


@click.command(cls=Command)
@click.argument("image", type=options.FilePath(path_type=str))
@options.model(default="vit_b16", show_default=True)
@click.option(
    "--r",
    "r_values",
    type=R(),
    multiple=True,
    help=f"Values to compare; default: 0, three that fit the depth, and those with published accuracies; of an "
    f"animation 0 and one. An r: {options.FORMS_OF_R}.",
)
@click.option(
    "-o",
    "--out",
    type=options.FilePath(dir_okay=False),
    required=True,
    help="A page, .html, a picture, .png, .jpg, .webp, .svg or .pdf, or an animation, .gif or .mp4.",
)
@click.option(
    "--show",
    type=click.Choice(pictures.SHOW),
    help="Of a picture: the image beside what the last block leaves; a strip over blocks; or where the class token "
    "looks in these. Of an animation: the tokens, or where the class token looks.  [default: strip]",
)
@click.option("--block", "blocks", type=int, multiple=True, help="Of a strip: which blocks; default: four.")
@options.img_size
@options.device
def visualize(
    image: str,
    model: str,
    r_values: tuple[Schedule, ...],
    out: Path,
    show: pictures.Show | None,
    blocks: tuple[int, ...],
    img_size: tuple[int, int] | None,
    device: str,
) -> None:
    """Which patches of IMAGE are one token after each block, at several r, and where the class token looks.

    A page is one file without network: a slider over blocks, the token of each patch, tokens and FLOPs. A picture
    is one for print. An animation goes through the blocks. All show the pixels that the model saw, resized and cropped.
    """
    check_outputs(out, inputs=[image, model])
    kind = file_kind(out, as_picture=bool(show or blocks))
    if kind == PAGE and (show or blocks):
        raise ValueError(
            f"--{'show' if show else 'block'} is for pictures, and {out.name} is none: it shows everything"
        )
    if blocks and kind in ANIMATIONS:
        raise ValueError(f"--block is for strips, and {out.name} is an animation over all blocks")
    if blocks and show == "picture":
        raise ValueError("--block is for strips, and --show picture shows the last block")
    place = device_of(device)
    photograph = images.read(image, upright=True)
    card_of_argument(model, r_values, img_size)  # before a download
    subject = trained(model, img_size=img_size).to(place)
    pictures.blocks_to_show(subject.config, show or "strip", blocks)
    fitting = default_r(subject.card)
    if kind in ANIMATIONS:
        fitting = [subject.r or fitting[len(fitting) // 2]]
    r_values = tuple(distinct_schedules(r_values or [0, *fitting]))

    with progress_bar(total=len(r_values), unit="r") as bar:
        observation = make(subject, photograph, r_values, title=Path(image).name, progress=bar.update)
    observation.save(out, show=show, blocks=blocks)
    echo(f"written to {out}", err=True)
