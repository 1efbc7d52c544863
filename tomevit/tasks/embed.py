"""Images to feature vectors at scale: streamed, resumable, by one process or by many.

    tomevit.tasks.embed.embed(model, ["photographs/"], "photographs.safetensors", r=16, workers=4)
    found = tomevit.tasks.embedding_files.read("photographs.safetensors")     # found.vectors (N, D), found.keys

While it works, finished parts lie in a directory beside the output. A part is made of the same images in the same
batches whoever makes it: so a run that was interrupted ends in the same bytes as one that was not, and several
processes write the same file as one. At the end the parts are joined and removed.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from tomevit.config import ARCHITECTURE, Config
from tomevit.data import images, shards
from tomevit.data.distributed import broadcast_from_rank0, fail_together, processes, require_same, wait_for_all
from tomevit.data.images import Strings
from tomevit.errors import join_with_or
from tomevit.layers.pool import mean_patch, token_beside_mean
from tomevit.locks import hold_lock
from tomevit.measure.memory import explain_out_of_memory
from tomevit.models import VisionTransformer, unwrap_replicas
from tomevit.opening import open_file, read_small_file
from tomevit.output import check_output, is_stream, new_file
from tomevit.schedule import Schedule, schedule_to_json
from tomevit.tasks import embedding_files
from tomevit.tasks.embedding_files import DTYPES, SUFFIXES, Part
from tomevit.tasks.launching import batches_in_flight, launch_ahead, read_back, to_device
from tomevit.transform import Transform, transform
from tomevit.weights import checkpoint

Pool = Literal["cls", "mean", "cls+mean", "map", "proj"]
#: What a model without one of them lacks.
LACKED = {"cls": "class token", "cls+mean": "class token", "map": "attention pooling", "proj": "projection"}

#: A run over files has about so many parts; each is one batch at least, and so many images at most.
PARTS, MOST = 1000, 8192
#: Of a shard, whose length is not known, a part is so many samples.
OF_SHARD = 1024
#: In the directory of parts: what they are of, DIGEST bytes for each file of its data, and what the run holds.
PLAN, DIGESTS, LOCK = "run.json", "data.bin", ".lock"
DIGEST = 8
#: Of a file as much is looked at to know it again, in pieces from its beginning to its end: so many of an image, and so
#: many of a shard.
PIECE, OF_IMAGE, OF_A_SHARD = 2**12, 4, 64
#: The file names so many of the images that could not be read.
LISTED = 10_000


# ------------------------------------------------------------------------------------------------------------ features


def extractor(model: VisionTransformer, pool: Pool | None = None) -> Callable[..., Tensor]:
    """A function from images (B, C, H, W), and r if it is not to be the model's, to feature vectors (B, D).

    They are what a head would read: pooled, after the final norm; D is `width(model.config, pool)`. The function
    shares the model's weights, and runs in evaluation mode. Where the model, without a head, answers with these
    vectors, the function is the model itself, as `tomevit.optimize` compiled it.

    Args:
        model: any; it stays as it is.
        pool: "cls" for the class token, "mean" for the mean patch, in which a merged token counts as often as the
            patches it stands for, "cls+mean" for the one beside the other, "map" for attention pooling, and "proj" for
            what the projection makes of the pooled vector. None: what the model answers without a head; of a distilled
            model the mean of its two tokens.

    Raises:
        ValueError: there is no such pooling, or not in this model.
    """
    model = unwrap_replicas(model)
    check_pool(pool, model.config)
    own = pool in (None, pooling(model.config))
    if own and not (model.config.num_classes or model.training):
        return model
    weights = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, weights).eval()
    twin.reset_classifier(0)
    if own:
        return twin

    def features(images: Tensor, r: Schedule | None = None) -> Tensor:
        tokens = twin.forward_features(images, r, trace=False)
        if pool == "map" and twin.attn_pool is not None:
            return twin.fc_norm(twin.attn_pool(tokens))
        if twin.config.pool == "token_avg" and pool == "cls+mean":
            return twin.fc_norm(token_beside_mean(tokens, twin.config.num_prefix))
        found = {"cls": tokens.x[:, 0], "mean": mean_patch(tokens, twin.config.num_prefix)}
        return torch.cat([twin.fc_norm(found[name]) for name in found if name in str(pool).split("+")], -1)

    return features


def check_pool(pool: Pool | None, config: Config) -> None:
    """Raises ValueError unless there is such a pooling in models of this config."""
    if pool not in (None, *get_args(Pool)):
        raise ValueError(f"pool is {pool!r}, and must be {join_with_or(get_args(Pool))}")
    if config.pool == "token_avg" and config.pool_norm == "after" and pool in ("cls", "mean"):
        raise ValueError("this model norms its class token beside the mean patch: pool must be cls+mean")
    there = {"cls": config.class_token, "mean": True, "cls+mean": config.class_token}
    there |= {"map": config.pool == "map", "proj": config.proj_dim > 0}
    if pool is not None and not there[pool]:
        others = join_with_or([name for name in there if there[name]])
        raise ValueError(f"this model has no {LACKED[pool]}: pool must be {others}")


def pooling(config: Config) -> str:
    """What a model answers without a head, as `extractor` names it; of a distilled model "cls+dist"."""
    if config.dist_token:
        return "cls+dist"
    return (
        "proj" if config.proj_dim else {"token": "cls", "avg": "mean", "token_avg": "cls+mean"}.get(config.pool, "map")
    )


def width(config: Config, pool: Pool | None = None) -> int:
    """Numbers in a feature vector."""
    name = pool or pooling(config)
    return config.proj_dim if name == "proj" else config.embed_dim * (2 if name == "cls+mean" else 1)


def is_compared_by_angle(config: Config, pool: Pool | None = None) -> bool:
    """Whether vectors were trained to be compared by cosine, as those of towers that were trained beside texts are.

    Those are what a model without a head answers, from a projection or attention pooling (CLIP, SigLIP, PE core).
    """
    name = pooling(config)
    return not config.num_classes and name in ("proj", "map") and pool in (None, name)


# ----------------------------------------------------------------------------------------------------------- the whole


class Report(NamedTuple):
    """What a file of embeddings holds."""

    rows: int
    dim: int
    num_unreadable: int  # images that were left out
    unreadable: list[tuple[str, str]]  # their names and reasons, of LISTED at most


def embed(
    model: VisionTransformer,
    sources: Iterable[str | PathLike[str]] | Data,
    out: str | PathLike[str],
    *,
    r: Schedule | None = None,
    pool: Pool | None = None,
    normalize: bool | None = None,
    dtype: torch.dtype = torch.float32,
    batch: int = 32,
    workers: int = 0,
    upright: bool = False,
    overwrite: bool = False,
    progress: Callable[[str, int, int | None], object] = lambda *_: None,
) -> Report:
    """Write a feature vector for every image into one file, which appears whole or not at all.

    Memory does not grow with the number of images, but for their names. Interrupted or killed, the same call goes on
    after the last part that was finished; while another writes to the same file, it waits. In a process group of
    torch.distributed the processes share the work, if they see the same directories; the first one writes the file, and
    all return when it is there.

    Args:
        model: on the device and in the dtype to compute in.
        sources: files, folders and patterns of images (`tomevit.data.images.find`), or of WebDataset shards
            (`tomevit.data.shards.find_shards`); or what `locate` found.
        out: the .safetensors or .parquet file to write, as `tomevit.tasks.embedding_files` describes it. Parts lie in
            OUT.parts until it is there.
        r: instead of the model's own.
        pool: as in `extractor`.
        normalize: to unit length, so that a product of two vectors is the cosine of the angle between them. None: if
            the vectors were trained for that (`is_compared_by_angle`).
        dtype: of what is stored, float32 or float16.
        batch: images per call; but for rounding, no result depends on it.
        workers: processes that read images; 0: this one.
        upright: turn photographs as their EXIF data says.
        overwrite: begin anew, whatever an earlier run left.
        progress: is told "embedding" or "writing", how many images of this process's share are done, and of how many;
            None while that is not known, as with shards.

    Raises:
        ValueError: an argument does not fit; an earlier run with other settings left parts or a file; a batch does not
            fit into memory; a vector is not finite.
        OSError: a file cannot be written.
    """
    model = unwrap_replicas(model)
    device, out = model.device, Path(out)
    normalize = is_compared_by_angle(model.config, pool) if normalize is None else normalize
    parts = out.with_name(f"{out.name}.parts")

    def check_all() -> tuple[Callable[..., Tensor], Data, bytes, dict[str, Any]]:
        check_suffix(out)
        _check_arguments(dtype, batch, workers)
        features, data = extractor(model, pool), sources if isinstance(sources, Data) else locate(sources)
        check_output(out, inputs=data.names)
        digests = digests_of(data)
        settings = run_settings(model, data, digests, r=r, pool=pool, normalize=normalize, dtype=dtype, upright=upright)
        return features, data, digests, settings

    features, data, digests, settings = fail_together(check_all)
    require_same({**settings, "batch": batch})
    launch = partial(
        _launch_vectors, features, device=device, r=r, normalize=normalize, dtype=dtype, width=width(model.config, pool)
    )
    with ExitStack() as lock:
        size = broadcast_from_rank0(lambda: _begin(out, parts, settings, data, digests, batch, overwrite, lock))
        if size is None:
            return broadcast_from_rank0(lambda: _report(embedding_files.read_info(out)))
        todo = _remaining(parts, data, size, *processes())
        pieces = _read_pieces(data, todo, transform(model), size=size, batch=batch, workers=workers, upright=upright)
        with images.reading(), explain_out_of_memory(batch, device):
            _make_parts(parts, pieces, todo, launch, progress, batches_in_flight(device))
        wait_for_all()
        return broadcast_from_rank0(lambda: _join_parts(out, parts, settings, data, progress))


def _launch_vectors(
    features: Callable[..., Tensor],
    prepared: Tensor,
    *,
    device: torch.device,
    r: Schedule | None,
    normalize: bool,
    dtype: torch.dtype,
    width: int,
) -> Callable[[], list[Tensor]]:
    """What waits for the vectors of a batch, one tensor (B, D) as it is stored; a shard's last batch may be empty."""
    if not len(prepared):
        return read_back(torch.empty(0, width, dtype=dtype, device="cpu"))
    found = features(to_device(prepared, device), r=r).float()
    return read_back((F.normalize(found, dim=1) if normalize else found).to(dtype))


def check_suffix(out: Path) -> None:
    """Raise ValueError if no such file can be written."""
    if out.suffix not in SUFFIXES:
        raise ValueError(f"{out} ends in {out.suffix or 'no suffix'}, and must end in {join_with_or(SUFFIXES)}")
    if out.suffix == ".parquet" and find_spec("pyarrow") is None:
        raise ValueError("parquet needs pyarrow: pip install 'tomevit[parquet]'")


def _check_arguments(dtype: torch.dtype, batch: int, workers: int) -> None:
    if dtype not in (known for known, _ in DTYPES.values()):
        raise ValueError(f"dtype is {dtype}, and must be torch.{join_with_or(DTYPES)}")
    if batch < 1:
        raise ValueError(f"batch is {batch}, and must be at least 1")
    if workers < 0:
        raise ValueError(f"workers is {workers}, and must be at least 0")


# ---------------------------------------------------------------------------------------------------------- what it is


class Data(NamedTuple):
    """What to embed."""

    names: Strings  # paths of images, or of shards
    sharded: bool
    passed_over: str = ""  # what is no image there, in words


def locate(sources: Iterable[str | PathLike[str]]) -> Data:
    """What sources name: shards if all of them do, else images.

    Raises:
        ValueError: a source names nothing, or some name shards and some images.
    """
    expanded = [name for source in sources for name in shards.expand_braces(fspath(source))]
    if not expanded:
        raise ValueError("there is nothing to embed: name files, folders, patterns or shards")
    found = [shards.find_shards(source) for source in expanded]
    if all(found):
        return Data(Strings(name for names in found for name in names), sharded=True)
    if any(found):
        of_shards, other = (
            next(s for s, names in zip(expanded, found, strict=True) if bool(names) is b) for b in (True, False)
        )
        raise ValueError(f"{of_shards} is of WebDataset, and {other} is not: embed the two one after the other")
    located = images.search(expanded)
    return Data(Strings(located.files), sharded=False, passed_over=located.passed_over())


def run_settings(
    model: VisionTransformer,
    data: Data,
    digests: bytes,
    *,
    r: Schedule | None = None,
    pool: Pool | None = None,
    normalize: bool | None = None,
    dtype: torch.dtype = torch.float32,
    upright: bool = False,
) -> dict[str, Any]:
    """All that embeddings depend on, but for rounding, as JSON has it: runs of the same settings share their parts.

    Args:
        digests: of the data (`digests_of`).
    """
    r = model.r if r is None else model.plain(r)
    model.schedule(r)
    config, matching = asdict(model.config), model.config.matching
    settings = {
        "model": model.card.full_name,
        "computed": str(model.dtype).removeprefix("torch."),
        "weights": checkpoint.digest_of(model.state_dict()),
        "architecture": {name: config[name] for name in ARCHITECTURE},
        "prop_attn": model.config.prop_attn,
        "matching": matching if isinstance(matching, str) else f"{matching.__module__}.{matching.__qualname__}",
        "r": schedule_to_json(r),
        "pool": pool or pooling(model.config),
        "normalize": is_compared_by_angle(model.config, pool) if normalize is None else normalize,
        "dtype": str(dtype).removeprefix("torch."),
        "dim": width(model.config, pool),
        "preprocess": asdict(model.card.preprocess),
        "upright": upright,
        "data": f"{len(data.names)} {'shards' if data.sharded else 'files'}, "
        f"sha256 {hashlib.sha256(digests).hexdigest()}",
    }
    return json.loads(json.dumps(settings))


def digests_of(data: Data) -> bytes:
    """DIGEST bytes for each file: of its name, its size and some of its content, but not its time.

    Data may be copied anew for each run. To read all of it would take as long as to embed it on a fast device.
    """
    return b"".join(_digest(name, OF_A_SHARD if data.sharded else OF_IMAGE) for name in data.names)


def _digest(name: str, pieces: int) -> bytes:
    sha = hashlib.sha256(name.encode("utf-8", "surrogateescape"))
    try:
        with open_file(name) as file:
            size = os.fstat(file.fileno()).st_size
            sha.update(f"\0{size}\0".encode())
            if size <= pieces * PIECE:
                sha.update(file.read(pieces * PIECE))
            else:
                for i in range(pieces):
                    file.seek(i * (size - PIECE) // (pieces - 1))
                    sha.update(file.read(PIECE))
    except OSError:  # it will be named among what cannot be read
        sha.update(b"\0-1\0")
    return sha.digest()[:DIGEST]


def _difference(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> tuple[str, Any, Any] | None:
    """The first setting that differs: its name, and both values."""
    for name in {**old, **new}:
        before, now = old.get(name), new.get(name)
        if isinstance(before, dict) and isinstance(now, dict):
            if inside := _difference(before, now, f"{name}."):
                return inside
        elif before != now:
            return f"{prefix}{name}", before, now
    return None


# ------------------------------------------------------------------------------------------------------- begin and end


def _begin(
    out: Path,
    parts: Path,
    settings: dict[str, Any],
    data: Data,
    digests: bytes,
    batch: int,
    overwrite: bool,
    lock: ExitStack,
) -> int | None:
    """Hold the directory of parts, and see what an earlier run left.

    Returns:
        The number of images in a part; None if the output is there.

    Raises:
        ValueError: an earlier run had other settings; the message names one.
    """
    if _is_done(out, settings, overwrite) and not _is_left(parts, settings):
        return None
    lock.enter_context(_hold_parts(parts))
    # A run may have ended meanwhile; or it was killed while it removed its parts.
    try:
        done = _is_done(out, settings, overwrite)
    except ValueError:
        _leave(parts)
        raise
    if done:
        (_remove if _is_left(parts, settings) else _leave)(parts)
        return None
    if (begun := _begun(parts)) is not None:
        other = _difference(begun.settings, settings)
        if other is None:
            if begun.size % batch:
                raise ValueError(f"{parts} has parts of {begun.size} images, which batches of {batch} do not divide")
            return begun.size
        if not overwrite:
            raise ValueError(f"{parts} was begun with {_sentence(other, _first_changed(parts, data, digests))}")
        _clear(parts)
    if data.sharded:
        size = batch * math.ceil(OF_SHARD / batch)
    else:
        size = batch * min(math.ceil(len(data.names) / (PARTS * batch)), max(1, MOST // batch))
    with new_file(parts / PLAN) as unfinished:  # the first, for it says that the directory is ours
        unfinished.write_text(json.dumps({"settings": settings, "size": size}, indent=2), encoding="utf-8")
    with new_file(parts / DIGESTS) as unfinished:
        unfinished.write_bytes(digests)
    return size


class _Plan(NamedTuple):
    """What a directory of parts is of."""

    settings: dict[str, Any]
    size: int  # images in a part


def _begun(parts: Path) -> _Plan | None:
    """What the run was of that left the directory of parts; None if none did. Raises ValueError if that is damaged."""
    try:
        found = json.loads(read_small_file(parts / PLAN))
        plan = _Plan(found["settings"], found["size"])
        if isinstance(plan.settings, dict) and type(plan.size) is int and plan.size > 0:
            return plan
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError, RecursionError):
        pass
    raise ValueError(f"{parts / PLAN} is damaged, or no plan of embeddings: remove {parts} to begin anew")


def _is_done(out: Path, settings: Mapping[str, Any], overwrite: bool) -> bool:
    """Whether the output is there already. Raises ValueError if it was made with other settings, or holds others."""
    if overwrite or is_stream(out) or not out.exists():
        return False
    info = embedding_files.read_info(out)
    if other := _difference({name: info.get(name) for name in settings}, dict(settings)):
        raise ValueError(f"{out} was made with {_sentence(other)}")
    return True


def _is_left(parts: Path, settings: Mapping[str, Any]) -> bool:
    """Whether the directory of parts is of a run with these settings."""
    with suppress(ValueError):
        begun = _begun(parts)
        return begun is not None and begun.settings == settings
    return False


def _first_changed(parts: Path, data: Data, digests: bytes) -> str:
    """The first file that is another than when the directory of parts was begun, in words; "" if that is not known."""
    try:
        before = read_small_file(parts / DIGESTS, max(2**26, 2 * len(digests)))
    except (OSError, ValueError):
        return ""
    for place, name in enumerate(data.names):
        begin, end = place * DIGEST, (place + 1) * DIGEST
        if before[begin:end] != digests[begin:end]:
            return f"; the first file that is not as it was is {name}"
    return ""


def _clear(parts: Path) -> None:
    """Remove all parts, and at last what says that they are ours."""
    for path in parts.glob("*.safetensors"):
        path.unlink()
    for name in (DIGESTS, PLAN):
        (parts / name).unlink(missing_ok=True)


def _remove(parts: Path) -> None:
    _clear(parts)
    shutil.rmtree(parts, ignore_errors=True)  # a lock, and drafts of killed runs


def _leave(parts: Path) -> None:
    """Remove the directory of parts if nothing was begun in it."""
    if not (parts / PLAN).exists():
        with suppress(OSError):  # it holds something else
            (parts / LOCK).unlink()
            parts.rmdir()


def _sentence(other: tuple[str, Any, Any], more: str = "") -> str:
    name, before, now = other
    return f"{name} {before}, not {now}{more}: give the same again, name another file, or overwrite"


@contextmanager
def _hold_parts(parts: Path) -> Iterator[None]:
    """Keep other runs out of the directory of parts, which is made if need be, while the block runs.

    Raises:
        ValueError: it is none of ours.
    """
    with ExitStack() as lock:
        held = False
        while not held:
            parts.mkdir(exist_ok=True)
            with suppress(FileNotFoundError):  # the run that held it is done, and has removed the directory
                held = not lock.enter_context(hold_lock(parts / LOCK, f"writing to {parts}")) or (parts / LOCK).exists()
            if not held:
                lock.close()
        if not (parts / PLAN).exists() and any(not path.name.startswith(".") for path in parts.iterdir()):
            raise ValueError(f"{parts} is in the way: parts are kept there, and it holds something else")
        yield


def _join_parts(
    out: Path,
    parts: Path,
    settings: dict[str, Any],
    data: Data,
    progress: Callable[[str, int, int | None], object],
) -> Report:
    """Join all parts into the output, and remove them."""
    places: dict[Path, int] = {}  # of the shard of each part
    rows = num_unreadable = 0
    unreadable: list[tuple[str, str]] = []
    for place, part in _all_parts(parts, data):
        places[_path(parts, *place)] = place[0]
        rows += part.rows
        num_unreadable += len(part.unreadable)
        unreadable += part.unreadable[: LISTED - len(unreadable)]
    info = {
        **settings,
        **({"shards": list(data.names)} if data.sharded else {}),
        "rows": rows,
        "num_unreadable": num_unreadable,
        "unreadable": unreadable,
    }
    written = 0

    def tell(more: int) -> None:
        nonlocal written
        written += more
        progress("writing", written, rows)

    with new_file(out) as draft:
        embedding_files.join(draft, out.suffix, places, info, tell)
    _remove(parts)
    return _report(info)


def _report(info: Mapping[str, Any]) -> Report:
    """What the metadata of a file says."""
    return Report(info["rows"], info["dim"], info["num_unreadable"], [(name, why) for name, why in info["unreadable"]])


# --------------------------------------------------------------------------------------------------------------- parts

#: Where a part belongs: its shard, or 0 for images, and its number in it.
Place = tuple[int, int]


def _path(parts: Path, shard: int, number: int) -> Path:
    return parts / f"{shard:08}-{number:08}.safetensors"


def _all_parts(parts: Path, data: Data) -> Iterator[tuple[Place, Part]]:
    """Every part in order; raises ValueError if one is not there."""
    for shard in range(len(data.names) if data.sharded else 1):
        part, number = None, 0
        while part is None or not part.last:
            part = embedding_files.read_part(_path(parts, shard, number))
            if part is None:
                raise ValueError(f"{_path(parts, shard, number)} is missing or damaged; the same call makes it again")
            yield (shard, number), part
            number += 1


class Todo(NamedTuple):
    """What a process has to do."""

    begin: list[Place]  # parts of images, each; or of shards, the part in each to go on with
    done: int  # images, of this process's share
    total: int | None


def _remaining(parts: Path, data: Data, size: int, rank: int, world: int) -> Todo:
    """What is not done of the share of one of several processes."""
    begin: list[Place] = []
    done = 0
    if not data.sharded:
        count = len(data.names)
        total = 0
        for number in range(rank, math.ceil(count / size), world):
            images_in_it = min(size, count - number * size)
            total += images_in_it
            if embedding_files.read_part(_path(parts, 0, number)) is None:
                begin.append((0, number))
            else:
                done += images_in_it
        return Todo(begin, done, total)
    for shard in range(rank, len(data.names), world):
        number = 0
        while (part := embedding_files.read_part(_path(parts, shard, number))) is not None:
            done += part.images
            number += 1
            if part.last:
                break
        else:
            begin.append((shard, number))
    return Todo(begin, done, total=None)


class Piece(NamedTuple):
    """A batch, and the part that it belongs to."""

    place: Place
    keys: list[str]
    images: Tensor  # (B, C, H, W)
    unreadable: list[tuple[str, str]]  # names and reasons
    ends: bool  # the part
    last: bool  # that there is of the shard


def _read_pieces(
    data: Data, todo: Todo, transform: Transform, *, size: int, batch: int, workers: int, upright: bool
) -> Iterator[Piece]:
    """All batches that are to do; of each part they come in order."""
    names = data.names
    if data.sharded:
        begin = [(shard, number * size) for shard, number in todo.begin]
        for found in shards.stream_samples(
            names, transform, batch=batch, workers=workers, begin=begin, upright=upright
        ):
            ends = found.last or (found.first + batch) % size == 0
            place = found.shard, found.first // size
            yield Piece(place, found.keys, found.images, found.unreadable, ends, found.last)
        return
    indices = array("q")
    for _, number in todo.begin:
        indices.extend(range(number * size, min((number + 1) * size, len(names))))
    seen = 0
    for read in images.stream(names, transform, batch=batch, workers=workers, indices=indices, upright=upright):
        places = read.places.tolist()
        final = indices[seen + len(places) + len(read.unreadable) - 1]
        seen += len(places) + len(read.unreadable)
        last = final == len(names) - 1
        keys, unreadable = [names[place] for place in places], [(names[place], why) for place, why in read.unreadable]
        yield Piece((0, final // size), keys, read.images, unreadable, last or (final + 1) % size == 0, last)


def _make_parts(
    parts: Path,
    pieces: Iterable[Piece],
    todo: Todo,
    launch: Callable[[Tensor], Callable[[], list[Tensor]]],
    progress: Callable[[str, int, int | None], object],
    in_flight: int,
) -> None:
    """Embed batches, and write each part as soon as it is whole: so many are in memory as processes read shards."""
    done = todo.done
    progress("embedding", done, todo.total)
    unfinished: dict[Place, list[tuple[Piece, Tensor]]] = {}

    def launch_piece(piece: Piece) -> Callable[[], tuple[Piece, Tensor]]:
        wait = launch(piece.images)
        piece = piece._replace(images=torch.empty(0, device="cpu"))
        return lambda: (piece, wait()[0])

    with torch.inference_mode():
        for piece, found in launch_ahead(pieces, launch_piece, in_flight=in_flight):
            if not found.isfinite().all():
                key = piece.keys[int(found.isfinite().all(1).int().argmin())]
                raise ValueError(f"{key}: its vector is not finite; compute or store in another dtype")
            group = unfinished.setdefault(piece.place, [])
            group.append((piece, found))
            if piece.ends:
                _write_part(_path(parts, *piece.place), unfinished.pop(piece.place))
            done += len(piece.keys) + len(piece.unreadable)
            progress("embedding", done, todo.total)


def _write_part(path: Path, group: list[tuple[Piece, Tensor]]) -> None:
    keys = [key for piece, _ in group for key in piece.keys]
    unreadable = [name for piece, _ in group for name in piece.unreadable]
    with new_file(path) as draft:
        found = torch.cat([found for _, found in group])
        embedding_files.write_part(draft, found, keys, unreadable, last=group[-1][0].last)
