"""What tests of downloads and of the cache need: files to serve, cards of them, and what stands in for a conversion."""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from tomevit.cards import Card, Header, encode_header
from tomevit.config import Source
from tomevit.weights.cache import Fetched, cached, home

DATA = random.Random(0).randbytes(300_000)
OTHER = random.Random(1).randbytes(250_000)
CUT = 100_000


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def convert(given: Card, fetched: Fetched, draft: Path) -> None:
    """Stands in for the conversion: the file's bytes, as a safetensors file that says what it was made from."""
    header = encode_header(Header(replace(given, origin=fetched.source), "of the tensors"))
    save_file({"bytes": np.fromfile(fetched.path, dtype=np.uint8)}, draft, metadata=header)


def obtain(given: Card, convert: Callable[[Card, Fetched, Path], None] = convert) -> Path:
    return cached(given, partial(convert, given))


def converted_from(path: Path) -> bytes:
    return load_file(path)["bytes"].tobytes()


def card(*sources: Source, licence: str = "apache-2.0") -> Card:
    return Card(name="vit_x1", weights="tag", licence=licence, sources=sources)


def at(url: str, **fields: Any) -> Source:
    return Source(format="timm", url=url, **fields)


def on_hub(repo: str = "owner/repo", **fields: Any) -> Source:
    return Source(format="timm", hub=repo, **fields)


def kept(directory: str = "") -> list[str]:
    """All files under a directory of ours, locks aside."""
    root = home() / directory
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    return [name for name in files if not name.endswith(".lock")]


def until(condition: Callable[[], Any]) -> None:
    wait = threading.Event()
    for _ in range(3000):
        if condition():
            return
        wait.wait(0.01)
    raise AssertionError("it never happened")
