"""An observation as a page: one HTML file that needs nothing else, no network either."""

from __future__ import annotations

import base64
import hashlib
import html as escaping
import json
import re
from collections.abc import Mapping
from importlib import resources
from io import BytesIO
from itertools import groupby
from typing import Any

import numpy as np
from torch import Tensor

from tomevit.config import POOLED, Config
from tomevit.errors import printable
from tomevit.flops import flops
from tomevit.schedule import format_schedule
from tomevit.tasks import plots
from tomevit.tasks.visualize import Observation, Run, prefix_names
from tomevit.version import __version__

#: Larger than this, in bytes, an image is a JPEG.
LOSSLESS = 100_000
QUALITY = 92
SHORT, MOST_ALIKE = 40, 4  # characters, or groups of alike blocks, of a schedule that is spelled out


def html(observation: Observation, title: str) -> str:
    """A page with a slider over the blocks, the tokens or the class token's attention, and all runs to switch between.

    Nothing is loaded, and a policy within forbids it. The text may hold anything: it is escaped.

    Args:
        observation: what to show; its groups must be fewer than 65536, and so be stored in two bytes.
        title: the image's name, say.

    Raises:
        ValueError: the image has more patches than that.
    """
    if observation.config.num_patches > 2**16:
        raise ValueError(f"a page holds up to {2**16} patches, and this image has {observation.config.num_patches}")
    files = resources.files("tomevit.tasks.visualize")
    names = ("page.html", "page.css", "gif.js", "page.js")
    template, style, *scripts = ((files / name).read_text(encoding="utf-8") for name in names)
    style = _fill(style, {"ink": plots.INK, "grey": plots.GREY, "faint": plots.FAINT, "blue": plots.COLOURS[1]})
    script = "".join(scripts)
    # In a script, only < could end it or begin a comment.
    data = json.dumps(_data(observation), separators=(",", ":")).replace("<", "\\u003c")
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {_hash(script)}; "
        f"base-uri 'none'; form-action 'none'"
    )
    filled = {
        "policy": policy,
        "title": escaping.escape(printable(title)),
        "style": style,
        "script": script,
        "data": data,
    }
    return _fill(template, filled)


def _fill(text: str, filled: Mapping[str, str]) -> str:
    return re.sub(r"\{\{(\w+)\}\}", lambda found: filled[found[1]], text)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _data(observation: Observation) -> dict[str, Any]:
    config, card = observation.config, observation.card
    (height, width), (rows, columns) = config.img_size, config.grid
    prefix = prefix_names(config)
    notes = [
        "FLOPs are multiply-adds of matrix products, as the ToMe paper counts them.",
        f"Counts of tokens include those that never merge: {', '.join(f'the {name} token' for name in prefix)}."
        if prefix
        else "",
        "" if config.class_token else "This model has no class token, whose attention could be shown.",
        f"Made with tomevit {__version__}.",
    ]
    name = printable(card.full_name) or "a model without a name"
    return {
        "setting": f"{name}, {width} × {height} pixels, {columns} × {rows} patches",
        "name": name,
        "notes": " ".join(filter(None, notes)),
        "reads": _reads(config),
        "size": [height, width],
        "grid": [rows, columns],
        "prefix": prefix,
        "unmerged": flops(config),
        "edges": base64.b64encode((255 * plots.edge_colours(rows, columns)).round().byte().numpy().tobytes()).decode(),
        "light": [*bytes.fromhex(plots.LIGHT[1:])],
        "dim": plots.DIM,
        "lit": plots.LIT,
        "image": _image(observation.image),
        "runs": [_run(run) for run in observation.runs],
    }


def _reads(config: Config) -> str:
    """What the class token's attention does not show."""
    aside = ", not the class token" if config.pool == "avg" else ""
    return "" if config.pool == "token" else f" The head reads the {POOLED[config.pool]}{aside}."


def _in_short(run: Run) -> str:
    """What an r in words comes to; of a long one alike blocks together; "" where that says no more, or too much."""
    if run.plain == run.r:
        return ""
    written = format_schedule(run.plain)
    if len(written) <= SHORT or not isinstance(run.plain, list):
        return written
    alike = [(format_schedule(entry), len(list(blocks))) for entry, blocks in groupby(run.plain)]
    if len(alike) > MOST_ALIKE or [entry for entry, _ in alike] == [format_schedule(run.r)]:
        return ""
    return ", ".join(entry if count == 1 else f"{count} × {entry}" for entry, count in alike)


def _run(run: Run) -> dict[str, Any]:
    data: dict[str, Any] = {
        "r": format_schedule(run.r),
        "tokens": run.tokens,
        "flops": run.flops,
        "plain": _in_short(run),
        "dropped": run.dropped,
        "groups": _words(run.groups.remainder(2**16)),  # a dropped patch has a number that no token of the step has
        "attention": None,
        "answers": [[printable(answer.name), answer.probability] for answer in run.answers],
    }
    if run.attention is not None and run.prefix_attention is not None:
        most = run.attention.amax((1, 2))
        data["most"] = most.tolist()
        data["attention"] = _words((run.attention / most[:, None, None] * (2**16 - 1)).round())
        data["prefix"] = run.prefix_attention.tolist()
    return data


def _words(values: Tensor) -> str:
    """Integers below 65536, in two bytes each, the low one first, in base64."""
    return base64.b64encode(values.numpy().astype(np.dtype("<u2")).tobytes()).decode()


def _image(image: Tensor) -> str:
    """An image (C, H, W) uint8 as a data URI."""
    from PIL import Image

    pixels = image.permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels[..., 0] if len(image) == 1 else pixels)
    file, kind = BytesIO(), "png"
    picture.save(file, kind, optimize=True)
    if file.tell() > LOSSLESS:
        file, kind = BytesIO(), "jpeg"
        picture.save(file, kind, quality=QUALITY, subsampling=0)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
