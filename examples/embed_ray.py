"""Images to feature vectors on a Ray cluster, by Ray Data: what `tomevit embed` does, for many machines.

    python -m examples.embed_ray photographs/ --out vectors/ --model vit_b16 --merge 16 --models 8 --gpus 1
    python -m examples.embed_ray 'train-{000..099}.tar' --out vectors/ --model vit_b16

CPUs read and prepare images, wherever there are some; models, one process each, take batches as they come. Paths must
be the same on every machine; folders of images may also be in a cloud, as in s3://bucket/photographs. The folder that
is written holds Parquet files with the columns key, embedding and unreadable: an image that cannot be read has its
reason there, and no vector. The order is Ray's. On one machine, and to go on where a run was stopped: `tomevit embed`.

Needs `pip install '.[ray]'`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import torch

import tomevit
from tomevit.data import images, shards
from tomevit.errors import ImageError
from tomevit.tasks import embed
from tomevit.transform import Transform

Row = dict[str, Any]
BLOCKS = 1000  # at most so many pieces of work


def load(name: str, r: int | None) -> tomevit.VisionTransformer:
    """A model in a file that tomevit wrote, or of the zoo, whose weights each machine downloads once."""
    model = tomevit.load(name) if Path(name).is_file() else tomevit.create(name, pretrained=True)
    model.r = model.r if r is None else r
    return model


def row(key: str, image: torch.Tensor | str, transform: Transform) -> Row:
    """A prepared image, or the reason why there is none."""
    if isinstance(image, str):
        blank = np.zeros((len(transform.preprocess.mean), *transform.size), np.float32)
        return {"key": key, "image": blank, "unreadable": image}
    return {"key": key, "image": image.numpy(), "unreadable": ""}


def prepared(source: Row, transform: Transform) -> Iterator[Row]:
    """The rows of an image, in memory if it has "bytes", or of all images in a shard."""
    path, image = source["path"], source.get("bytes")
    if image is not None or not path.lower().endswith(shards.ENDINGS):
        yield row(path, images.prepare_image(path if image is None else image, transform), transform)
        return
    try:
        for sample in shards.samples(path):
            image = shards.prepare_sample(sample, transform)
            yield row(f"{path}/{sample.name}" if isinstance(image, str) else sample.key, image, transform)
    except ImageError as error:
        yield row(error.path, error.reason, transform)


class Embedder:
    """A model in a process of its own."""

    def __init__(self, name: str, r: int | None, pool: embed.Pool | None, gpus: float) -> None:
        self.device = torch.device("cuda" if gpus else "cpu")
        self.features = embed.extractor(load(name, r).to(self.device), pool)

    @torch.inference_mode()
    def __call__(self, batch: dict[str, np.ndarray[Any, Any]]) -> pa.Table:
        vectors = self.features(torch.from_numpy(batch["image"].copy()).to(self.device)).float().cpu().numpy()
        reasons = pa.array([reason or None for reason in batch["unreadable"]], pa.string())
        embedding = pa.FixedSizeListArray.from_arrays(
            pa.array(vectors.reshape(-1)), vectors.shape[1], mask=reasons.is_valid()
        )
        return pa.table({"key": pa.array(batch["key"], pa.string()), "embedding": embedding, "unreadable": reasons})


def read_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", help="folders of images, or WebDataset shards")
    parser.add_argument("--out", type=Path, required=True, help="the folder for Parquet files; there must be none")
    parser.add_argument("--model", default="vit_b16", help="a name of the zoo, or a file that tomevit wrote")
    parser.add_argument("--merge", type=int, dest="r", help="r: tokens that merge in each block; default: the model's")
    parser.add_argument("--pool", choices=get_args(embed.Pool), help="as tomevit embed; default: the model's own")
    parser.add_argument("--batch", type=int, default=64, help="images per call")
    parser.add_argument("--models", type=int, default=1, help="processes with a model")
    parser.add_argument("--gpus", type=float, default=0, help="for each of them; 0: they run on CPUs")
    return parser.parse_args(arguments)


def enough(resources: Mapping[str, float], options: argparse.Namespace) -> None:
    """Raise ValueError if Ray would wait for ever: models hold what they have, and images must be read beside them."""
    cpus, gpus = resources.get("CPU", 0), resources.get("GPU", 0)
    if options.models >= cpus:
        raise ValueError(f"--models {options.models} leaves no CPU to read images: this cluster has {cpus:g}")
    if options.models * options.gpus > gpus:
        needed = options.models * options.gpus
        raise ValueError(f"--models {options.models} --gpus {options.gpus:g} needs {needed:g} GPUs: there are {gpus:g}")


def run(options: argparse.Namespace) -> int:
    """Embed; the number of images that could not be read.

    Raises:
        ValueError, OSError: an option does not fit.
    """
    # What is wrong is told before a cluster is started, or waited for.
    if options.out.exists():
        raise ValueError(f"{options.out} is there already; name another folder")
    remote = [source for source in options.sources if "://" in source]
    if remote and len(remote) < len(options.sources):
        raise ValueError(f"{remote[0]} is in a cloud, and others are not: embed the two one after the other")
    names = [] if remote else list(embed.locate(options.sources).names)
    model = load(options.model, options.r)
    embed.extractor(model, options.pool)

    import ray

    ray.init()
    enough(ray.cluster_resources(), options)
    if remote:
        suffixes = [suffix[1:] for suffix in images.SUFFIXES]
        found = ray.data.read_binary_files(remote, include_paths=True, file_extensions=suffixes)
    else:
        found = ray.data.from_items([{"path": name} for name in names], override_num_blocks=min(len(names), BLOCKS))
    found.flat_map(partial(prepared, transform=tomevit.transform(model))).map_batches(
        Embedder,
        fn_constructor_args=(options.model, options.r, options.pool, options.gpus),
        batch_size=options.batch,
        compute=ray.data.ActorPoolStrategy(size=options.models),
        num_gpus=options.gpus,
    ).write_parquet(str(options.out.absolute()))

    rows, unreadable = 0, 0
    written = pyarrow.dataset.dataset(options.out, format="parquet")
    for batch in written.to_batches(columns=["key", "unreadable"]):
        rows += len(batch)
        for key, reason in zip(batch["key"].to_pylist(), batch["unreadable"].to_pylist(), strict=True):
            if reason is not None:
                unreadable += 1
                print(f"embed_ray: {key}: {reason}", file=sys.stderr)
    print(f"{options.out}: {rows - unreadable:,} vectors of {embed.width(model.config, options.pool)} numbers")
    return unreadable


def main(arguments: Sequence[str] | None = None) -> None:
    try:
        unreadable = run(read_options(arguments))
    except (ValueError, OSError) as error:
        print(f"embed_ray: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(1 if unreadable else 0)


if __name__ == "__main__":
    main()
