"""Frames as a file that moves: GIF, which Pillow writes, or MP4, which needs PyAV."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from io import BytesIO
from itertools import chain, repeat
from pathlib import Path

import numpy as np

SUFFIXES = (".gif", ".mp4")
RATE = 20  # frames per second of an MP4
COLOURS = 256  # of a GIF


def require_encoder(suffix: str) -> None:
    """Say so before any work is done, if a film of this kind cannot be written.

    Raises:
        ValueError: PyAV is not installed.
    """
    if suffix.lower() == ".mp4" and find_spec("av") is None:
        raise ValueError("writing .mp4 needs PyAV: pip install 'tomevit[video]'; a .gif needs nothing more")


def write(path: Path, suffix: str, frames: Sequence[np.ndarray], seconds: Sequence[float]) -> None:
    """Write frames, each of which stays for some seconds. A GIF begins again for ever.

    Args:
        path: the file to write.
        suffix: ".gif" or ".mp4", whatever the path's.
        frames: (height, width, 3) uint8, all alike.
        seconds: for each frame.
    """
    encode = _gif if suffix.lower() == ".gif" else _mp4
    path.write_bytes(encode(frames, seconds))


def _gif(frames: Sequence[np.ndarray], seconds: Sequence[float]) -> bytes:
    """One palette for all frames, and no dither: what stays the same takes no space, and does not flicker.

    The palette is improved by k-means: without it a photograph leaves no bright colours for thin lines.
    """
    from PIL import Image

    some = np.concatenate([frames[0], frames[len(frames) // 2], frames[-1]])
    palette = Image.fromarray(some).quantize(COLOURS, kmeans=2)
    first, *others = (Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames)
    durations = [round(1000 * each) for each in seconds]
    file = BytesIO()
    first.save(file, "gif", save_all=True, append_images=others, duration=durations, loop=0)
    return file.getvalue()


def _mp4(frames: Sequence[np.ndarray], seconds: Sequence[float]) -> bytes:
    import av

    file = BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("h264", rate=RATE, options={"crf": "18", "tune": "animation"})
        height, width = (length // 2 * 2 for length in frames[0].shape[:2])  # what all players show has even edges
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        times = (repeat(frame, max(1, round(each * RATE))) for frame, each in zip(frames, seconds, strict=True))
        for frame in chain.from_iterable(times):
            pixels = np.ascontiguousarray(frame[:height, :width])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return file.getvalue()
