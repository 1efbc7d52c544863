"""What merging does to an image: `tomevit visualize`."""

from __future__ import annotations

from pathlib import Path

import click
from tqdm import tqdm

from tomevit.cli import options
from tomevit.cli.console import echo
from tomevit.cli.options import Many, R
from tomevit.cli.running import card_of_argument, device_of, trained
from tomevit.data import images
from tomevit.measure.defaults import default_r
from tomevit.output import check_outputs
from tomevit.schedule import Schedule, distinct_schedules
from tomevit.tasks.visualize import ANIMATIONS, PAGE, file_kind, pictures
from tomevit.tasks.visualize import visualize as make


@click.command(cls=Many)
@click.argument("image", type=click.Path())
@options.model(default="vit_b16", show_default=True)
@click.option(
    "--r",
    "r_values",
    type=R(),
    multiple=True,
    help=f"Values to compare; default: 0, three that fit the depth, and those with published accuracies. "
    f"An r: {options.FORMS_OF_R}.",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="A page, .html, or a picture, .png, .svg or .pdf.",
)
@click.option(
    "--show",
    type=click.Choice(pictures.SHOW),
    help="Of a picture: the image beside what the last block leaves; a strip over blocks; or where the class token "
    "looks in these.  [default: strip]",
)
@click.option("--block", "blocks", type=int, multiple=True, help="Of a strip: which blocks; default: six.")
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
    """Which patches of IMAGE are one token behind each block, at several r, and where the class token looks.

    A page is one file without network: a slider over blocks, the group behind each patch, tokens and FLOPs. A picture
    is one for print. Both show the pixels that the model saw, resized and cropped.
    """
    check_outputs(out, inputs=[image, model])
    kind = file_kind(out, as_picture=bool(show or blocks))
    if kind in (PAGE, *ANIMATIONS) and (show or blocks):
        raise ValueError(
            f"--{'show' if show else 'block'} is for pictures, and {out.name} is none: it shows everything"
        )
    if show == "picture" and blocks:
        raise ValueError("--block is for strips, and --show picture shows the last block")
    place = device_of(device)
    photograph = images.read(image, upright=True)
    card_of_argument(model, r_values, img_size)  # before a download
    subject = trained(model, img_size=img_size).to(place)
    pictures.blocks_to_show(subject.config, show or "strip", blocks)
    r_values = tuple(distinct_schedules(r_values or [0, *default_r(subject.card)]))

    with tqdm(total=len(r_values), delay=2, unit="r", leave=False, disable=None) as bar:
        observation = make(subject, photograph, r_values, title=Path(image).name, progress=bar.update)
    observation.save(out, show=show, blocks=blocks)
    echo(f"written to {out}", err=True)
