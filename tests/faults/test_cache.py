"""A cache that lost a fight: power failures, other users, other disks, odd places. It works, or says what helps."""

from __future__ import annotations

import codecs
import errno
import importlib
import os
import random
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file

import tomevit
from tests import foreign
from tests.elsewhere import Elsewhere
from tests.faults.special import SPECIAL
from tests.fetching import CUT, DATA, at, card, converted_from, kept, obtain, on_hub, sha256
from tests.outcomes import survives
from tests.server import Fault, Server
from tomevit.config import Source
from tomevit.errors import DownloadError
from tomevit.weights import servers
from tomevit.weights.cache import fetch, home

pytestmark = [
    pytest.mark.usefixtures("set_environment", "naps"),
    pytest.mark.skipif(sys.platform == "win32", reason="of links, pipes and permissions as Windows has not"),
]

KIND = "cache and network"
ZEROED = survives(KIND, "a cached file that a power failure zeroed or cut", "is noticed, said and made again")
REPLACED = survives(KIND, "pipes, devices, directories and links where the cache has files", "are made again")
NOTES = survives(KIND, "a damaged note of a download that was cut", "is as good as none: the download begins anew")
ELSEWHERE = survives(KIND, "parts of the cache on other file systems", "work as on one")
USERS = survives(KIND, "a cache of another user's", "is read; else one sentence has the path and TOMEVIT_HOME")
PLACES = survives(KIND, "a cache directory of any name that the file system allows", "works, to the bit")
NO_PLACE = survives(KIND, "a cache directory that cannot be", "one sentence has the path and TOMEVIT_HOME")
KILLS = survives(KIND, "a hundred kills at any moment of download and conversion", "whole files or none; it goes on")


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """A checkpoint of the smallest published size."""
    return foreign.fill(foreign.deit(foreign.sizes(tomevit.card("deit_ti16").config)))


@pytest.fixture(scope="module")
def published(weights: dict[str, torch.Tensor], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return foreign.write(tmp_path_factory.mktemp("published") / "w.pth", weights).read_bytes()


def create(url: str, weights: dict[str, torch.Tensor]) -> None:
    """A model is as it was published, whatever lies in the cache."""
    model = tomevit.create("deit_ti16", pretrained=url)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


# Power failures.


def zero(path: Path, start: int, end: int | None = None) -> None:
    content = bytearray(path.read_bytes())
    end = len(content) if end is None else end
    content[start:end] = bytes(end - start)
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "all zeros": lambda path: zero(path, 0),
    "zeros from the middle on": lambda path: zero(path, 10_000_000),
    "zeros in the middle": lambda path: zero(path, 4096 * 100, 4096 * 101),
    "zeros at the end": lambda path: zero(path, path.stat().st_size // 4096 * 4096 - 4096),
    "empty": lambda path: os.truncate(path, 0),
    "cut by one byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "longer": lambda path: os.truncate(path, path.stat().st_size + 4096),
}


@ZEROED
def test_damage_is_noticed_said_and_mended(
    server: Server, published: bytes, weights: dict[str, torch.Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    url = server.put("/w.pth", published)
    create(url, weights)
    (path,) = (home() / "weights").iterdir()
    for i, (what, damage) in enumerate(DAMAGE.items()):
        damage(path)
        caplog.clear()
        create(url, weights)
        assert f"{path} is damaged, or of a newer version: it is made again" in caplog.text, what
        assert len(server.requests) == i + 2
        assert kept() == [f"weights/{path.name}"]
    caplog.clear()
    create(url, weights)
    assert caplog.text == ""


@ZEROED
def test_zeros_that_belong_there_are_no_damage(server: Server, tmp_path: Path) -> None:
    model = tomevit.create("deit_ti16")
    for parameter in model.head.parameters():
        torch.nn.init.zeros_(parameter)
    tensors = dict(model.state_dict())
    url = server.put("/w.pth", foreign.write(tmp_path / "w.pth", tensors).read_bytes())
    for _ in range(2):
        create(url, tensors)
    assert len(server.requests) == 1


@ZEROED
def test_names_are_durable_after_their_contents(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    did: list[tuple[str, str]] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor: int) -> None:
        did.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink().name))
        fsync(descriptor)

    def noted_replace(path: Path, target: Path) -> Path:
        did.append(("name", path.name))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    obtain(card(at(server.put("/w.pth", DATA))))
    files = ["w.pth.part", "converted.safetensors"]
    assert did == [*((what, file) for file in files for what in ("sync", "name")), ("sync", "weights")]


# What is no file, and what is no note.


@REPLACED
@pytest.mark.parametrize("kind", [*SPECIAL, "a directory", "a link to nothing", "a link to itself"])
def test_what_is_no_file_gives_way(server: Server, tmp_path: Path, kind: str) -> None:
    def put(path: Path) -> None:
        if path.exists():
            path.unlink()
        if kind in SPECIAL:
            SPECIAL[kind](path)
        elif kind == "a directory":
            path.mkdir()
            (path / "file").touch()
        else:
            path.symlink_to(path if kind == "a link to itself" else tmp_path / "none")

    given = card(at(server.put("/w.pth", DATA)))
    path = obtain(given)
    unfinished = home() / "unfinished" / "vit_x1.tag"
    put(path)
    for name in ("w.pth", "w.pth.part", "w.pth.json", "converted"):
        unfinished.mkdir(parents=True, exist_ok=True)
        put(unfinished / name)
    put(home() / "locks" / "vit_x1.tag.lock")
    assert obtain(given) == path
    assert converted_from(path) == DATA
    assert kept() == [f"weights/{path.name}"]
    path.unlink()
    put(unfinished)
    assert converted_from(obtain(given)) == DATA


NOTE = b'{"url": "URL", "validator": "VALIDATOR", "size": 300000}'
BAD_NOTES = {
    "empty": b"",
    "zeros": bytes(100),
    "cut": NOTE[:20],
    "text": b"nonsense",
    "bytes": b"\xff\xfe\x00",
    "nested": b"[" * 50_000,
    "large": b" " * 100_000 + NOTE,
    "a list": b"[]",
    "a number": b"1",
    "none": b"null",
    "without an address": b"{}",
    "of another": NOTE.replace(b"URL", b"http://127.0.0.1/"),
    "unknown": NOTE[:-1] + b', "more": 1}',
    "numbers": b'{"url": 1, "validator": 2, "size": 3}',
    "a validator that is none": NOTE.replace(b'"VALIDATOR"', b'["a"]'),
    "a size that is none": NOTE.replace(b"300000", b'"300000"'),
    "a size beyond all": NOTE.replace(b"300000", b"1e999"),
    "digits": NOTE.replace(b"300000", b"9" * 5000),
}


@NOTES
@pytest.mark.parametrize("content", BAD_NOTES.values(), ids=BAD_NOTES)
def test_a_damaged_note_is_none(server: Server, content: bytes) -> None:
    given = card(at(server.put("/w.pth", DATA), sha256=sha256(DATA)))
    server.faults["/w.pth"] = [Fault(cut=CUT)] + [Fault(status=500)] * 4
    with pytest.raises(DownloadError):
        obtain(given)
    (note,) = home().rglob("*.json")
    assert note.read_bytes().startswith(NOTE[:9])
    note.write_bytes(content.replace(b"URL", f"{server.url}/w.pth".encode()))
    assert converted_from(obtain(given)) == DATA
    assert server.requests[-1].range is None
    assert len(kept()) == 1


# Other file systems.


@ELSEWHERE
def test_a_rename_across_devices_becomes_a_copy(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = Path.replace

    def refuse(path: Path, target: Path) -> Path:
        if path.parent.parent.parent.name == "unfinished" and Path(target).parent.name == "weights":
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(path), None, str(target))
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", refuse)
    path = obtain(card(at(server.put("/w.pth", DATA))))
    assert converted_from(path) == DATA
    assert kept() == [f"weights/{path.name}"]
    assert [each.name for each in path.parent.iterdir()] == [path.name]


@ELSEWHERE
@pytest.mark.parametrize("name", ["weights", "unfinished", "downloads", "locks"])
def test_each_directory_may_be_a_link_to_another_disk(server: Server, tmp_path: Path, name: str) -> None:
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("there is no other file system")
    with tempfile.TemporaryDirectory(dir=memory) as elsewhere:
        home().mkdir()
        (home() / name).symlink_to(elsewhere)
        given = card(at(server.put("/w.pth", DATA)))
        path = obtain(given)
        assert converted_from(path) == DATA
        assert obtain(given) == path
        with fetch(given) as fetched:
            assert fetched.path.read_bytes() == DATA
        assert (home() / name).is_symlink()
        assert len(server.requests) == 2


# Other users.


def as_nobody(source: Source) -> str:
    # What is imported later may not be theirs to read.
    servers.http_library()
    importlib.import_module("huggingface_hub.file_download")
    codecs.lookup("idna")
    if os.geteuid() == 0:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    return str(obtain(card(source)))


@pytest.fixture
def shared(environment: dict[str, str]) -> Iterator[dict[str, str]]:
    """An environment whose caches lie where every user may go."""
    with tempfile.TemporaryDirectory(prefix="tomevit-test-") as directory:
        Path(directory).chmod(0o755)
        yield environment | {"TOMEVIT_HOME": f"{directory}/home", "HF_HOME": f"{directory}/hf"}


@USERS
@pytest.mark.parametrize("what", ["a file", "weights", "the whole", "a download", "a part", "a lock", "unfinished"])
def test_a_cache_that_another_user_closed(
    server: Server, shared: dict[str, str], set_environment: Callable[..., None], what: str
) -> None:
    set_environment(**shared)
    source = at(server.put("/w.pth", DATA))
    path = obtain(card(source))
    for directory in (home(), *(each for each in home().rglob("*") if each.is_dir())):
        directory.chmod(0o777)
    unfinished = home() / "unfinished" / "vit_x1.tag"
    brought = home() / "downloads" / "vit_x1.tag" / "w.pth"
    closed = {
        "a file": path,
        "weights": path.parent,
        "the whole": home(),
        "a download": brought,
        "a part": unfinished / "w.pth.part",
        "a lock": home() / "locks" / "vit_x1.tag.lock",
        "unfinished": unfinished,
    }[what]
    if closed not in (path, path.parent, home()):
        path.unlink()
    if not closed.exists():
        closed.parent.mkdir(parents=True, exist_ok=True)
        closed.mkdir() if what == "unfinished" else closed.write_bytes(DATA)
    closed.chmod(0)
    if what == "a part":
        closed.parent.chmod(0o755)
    if what != "a lock":
        (home() / "locks" / "vit_x1.tag.lock").chmod(0o666)
    expected = r"(read|written): Permission denied: set TOMEVIT_HOME to a directory"
    try:
        with pytest.raises(DownloadError, match=expected) as caught:
            Elsewhere(shared, as_nobody, source).result()
        said = str(caught.value)
        assert str(closed) in said or str(closed.parent) in said
        assert said.isprintable()
    finally:
        closed.chmod(0o755)


@USERS
def test_a_cache_that_another_user_left_open_is_read(
    server: Server, shared: dict[str, str], set_environment: Callable[..., None]
) -> None:
    set_environment(**shared)
    source = at(server.put("/w.pth", DATA))
    path = obtain(card(source))
    for each in (home(), *home().rglob("*")):
        each.chmod(0o755 if each.is_dir() else 0o644)
    server.requests.clear()
    assert Elsewhere(shared, as_nobody, source).result() == str(path)
    assert not server.requests


@USERS
def test_a_cache_of_the_hubs_that_another_user_closed(
    server: Server, shared: dict[str, str], set_environment: Callable[..., None]
) -> None:
    set_environment(**shared)
    server.put_hub("owner/repo", "w.pth", DATA)
    source = on_hub(file="w.pth")
    obtain(card(source))
    shutil.rmtree(home())
    for blob in Path(shared["HF_HOME"]).rglob("blobs/*"):
        blob.chmod(0)
    ours = shared | {"TOMEVIT_HOME": tempfile.mkdtemp(dir=Path(shared["HF_HOME"]).parent)}
    Path(ours["TOMEVIT_HOME"]).chmod(0o777)
    with pytest.raises(DownloadError, match=r"cannot be (read|written): Permission denied: set HF_HOME to"):
        Elsewhere(ours, as_nobody, source).result()


# Places.

NAMES = {
    "spaces": b" a  b ",
    "a newline": b"a\nb",
    "quotes": b"a'b\"c`d$e",
    "signs of addresses": b"100%25#frag?query&a=b;c:d@e",
    "a pattern": b"[a-z]*{b}?!",
    "no UTF-8": b"caf\xe9\xff",
    "emoji": "🙂é\u202e".encode(),
    "an escape": b"\x1b[31m",
    "a backslash": b"a\\b",
    "255 bytes": b"a" * 255,
    "a dash": b"-rf",
    "a tilde": b"~nobody-there",
    "dots": b"...",
}


def at_place(tmp_path: Path, name: bytes) -> str:
    return os.fsdecode(os.fsencode(tmp_path) + b"/" + name)


@PLACES
@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_any_name_will_do(server: Server, tmp_path: Path, set_environment: Callable[..., None], name: bytes) -> None:
    place = at_place(tmp_path, name)
    set_environment(TOMEVIT_HOME=place)
    given = card(at(server.put("/w.pth", DATA)))
    for _ in range(2):
        assert converted_from(obtain(given)) == DATA
    assert len(server.requests) == 1
    assert len(list(Path(place, "weights").iterdir())) == 1
    with pytest.raises(DownloadError) as caught:
        obtain(card(at(f"{server.url}/none.pth")))
    assert str(caught.value).isprintable()


@PLACES
@pytest.mark.parametrize("name", [b" 'a' \"b\"\n%#?*[c]\\", b"caf\xe9"])
def test_models_come_from_there(
    server: Server,
    published: bytes,
    weights: dict[str, torch.Tensor],
    tmp_path: Path,
    set_environment: Callable[..., None],
    name: bytes,
) -> None:
    set_environment(TOMEVIT_HOME=at_place(tmp_path, name))
    url = server.put("/w.pth", published)
    for _ in range(2):
        create(url, weights)
    assert len(server.requests) == 1


@PLACES
@pytest.mark.parametrize("name", ["-rf", "a/../b", "./c//", "."])
def test_so_will_a_relative_path(
    server: Server, tmp_path: Path, set_environment: Callable[..., None], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "here" / "a").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    set_environment(TOMEVIT_HOME=name)
    given = card(at(server.put("/w.pth", DATA)))
    path = obtain(given)
    assert path.is_absolute()
    assert converted_from(path) == DATA
    assert obtain(given) == path


def deep(directory: Path, length: int) -> Path:
    """A path of so many bytes."""
    while (left := length - len(str(directory))) > 1:
        directory /= "d" * min(200, left - 1 if left <= 201 else 200)
    return directory


@NO_PLACE
@pytest.mark.parametrize("length", range(3880, 4200, 20))
def test_a_path_of_nearly_any_length(server: Server, tmp_path: Path, set_environment: Callable[..., None], length: int):
    set_environment(TOMEVIT_HOME=str(deep(tmp_path, length)))
    given = card(at(server.put("/w.pth", DATA)))
    said = ""
    try:
        assert converted_from(obtain(given)) == DATA
    except DownloadError as error:
        said = str(error)
    assert not said or "File name too long: set TOMEVIT_HOME to a directory" in said
    assert length > 3980 if said else length < 4090


UNUSABLE = [*SPECIAL, "a file", "a link to itself", "a link to nothing", "in a file", "in /proc", "256 bytes"]


@NO_PLACE
@pytest.mark.parametrize("kind", UNUSABLE)
def test_places_that_cannot_be(server: Server, tmp_path: Path, set_environment: Callable[..., None], kind: str) -> None:
    place = {"in a file": tmp_path / "file" / "home", "in /proc": Path("/proc/none/home")}.get(kind, tmp_path / "home")
    (tmp_path / "file").touch()
    if kind in SPECIAL:
        SPECIAL[kind](place)
    elif kind == "a file":
        place.touch()
    elif kind.startswith("a link"):
        place.symlink_to(place if "itself" in kind else tmp_path / "none" / "none")
    elif kind == "256 bytes":
        place = tmp_path / ("a" * 256)
    set_environment(TOMEVIT_HOME=str(place))
    with pytest.raises(DownloadError, match=r"cannot be (written|read): .*: set TOMEVIT_HOME to a directory") as caught:
        obtain(card(at(server.put("/w.pth", DATA))))
    assert str(caught.value).isprintable()
    assert not server.requests


@NO_PLACE
def test_without_a_home_the_variable_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def nobody() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    monkeypatch.delenv("TOMEVIT_HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.raises(DownloadError, match=r"no home directory to keep weights in: set TOMEVIT_HOME to a directory"):
        home()
    monkeypatch.setenv("TOMEVIT_HOME", "~nobody-there/cache")
    with pytest.raises(DownloadError, match="set TOMEVIT_HOME"):
        home()
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    monkeypatch.setenv("TOMEVIT_HOME", "cache")
    with pytest.raises(DownloadError, match="set TOMEVIT_HOME"):
        home()


# Kills.


def obtain_by_address(url: str) -> bytes:
    return converted_from(obtain(card(at(url, sha256=sha256(DATA)))))


@KILLS
@pytest.mark.soak
def test_a_hundred_kills(server: Server, environment: dict[str, str]) -> None:
    url, chance, wait = server.put("/w.pth", DATA), random.Random(0), threading.Event()
    server.forever["/w.pth"] = Fault(trickle=100_000)
    finished = 0
    for _ in range(100):
        process = Elsewhere(environment, obtain_by_address, url)
        wait.wait(chance.uniform(0.0, 0.7))
        process.kill()
        for path in home().glob("weights/*"):
            assert load_file(path)["bytes"].tobytes() == DATA
            path.unlink()
            finished += 1
    assert 0 < finished < 100
    assert Elsewhere(environment, obtain_by_address, url).result() == DATA
    assert [Path(name).parent.name for name in kept()] == ["weights"]
