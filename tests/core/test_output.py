"""Results appear whole or not at all, never over an input, and never in place of what is no regular file."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from safetensors import SafetensorError

import tomevit
from tests.helpers import tiny
from tomevit.errors import OutputError
from tomevit.output import check_output, check_outputs, make_directory, new_file

posix = pytest.mark.skipif(os.name != "posix", reason="pipes and devices of POSIX")


def put(path: Path, text: str = "new") -> None:
    with new_file(path) as draft:
        draft.write_text(text)


def test_a_file_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "result.txt"
    with new_file(path) as draft:
        draft.write_text("half")
        assert not path.exists()
    assert path.read_text() == "half"
    assert [*tmp_path.iterdir()] == [path]


def test_what_was_there_stays_where_the_work_fails(tmp_path: Path) -> None:
    path = tmp_path / "result.txt"
    path.write_text("old")

    def fail() -> None:
        with new_file(path) as draft:
            draft.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert path.read_text() == "old"
    assert [*tmp_path.iterdir()] == [path]


@posix
def test_a_link_stays_a_link_and_its_target_is_written(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    for target in (tmp_path / "real" / "old.txt", tmp_path / "real" / "none.txt"):
        link = tmp_path / f"to {target.name}"
        link.symlink_to(target)
        put(link)
        assert link.is_symlink()
        assert target.read_text() == "new"


@posix
def test_the_mode_of_the_file_that_was_there_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "secret.txt"
    path.write_text("old")
    for mode in (0o600, 0o664, 0o755):
        path.chmod(mode)
        put(path)
        assert path.stat().st_mode & 0o777 == mode
    umask = os.umask(0)
    os.umask(umask)
    put(tmp_path / "fresh.txt")
    assert (tmp_path / "fresh.txt").stat().st_mode & 0o777 == 0o666 & ~umask


@posix
def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    put(pipe)
    reader.join(timeout=10)
    assert read == ["new"]
    assert pipe.is_fifo()
    assert [*tmp_path.iterdir()] == [pipe]


@posix
def test_devices_stay_devices() -> None:
    put(Path("/dev/null"))
    tomevit.save(tiny(), "/dev/null")
    assert Path("/dev/null").is_char_device()


STANDARD_OUTPUT = """
from pathlib import Path
from tomevit.output import new_file
print("before", flush=True)
with new_file("{path}") as draft:
    draft.write_text("new\\n")
print("behind")
"""


@posix
@pytest.mark.parametrize("path", ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"])
@pytest.mark.parametrize("to", ["pipe", "file"])
def test_standard_output_is_gone_on_with(path: str, to: str, tmp_path: Path) -> None:
    if path.startswith("/proc") and not sys.platform.startswith("linux"):
        pytest.skip("Linux alone has /proc")
    command = [sys.executable, "-c", STANDARD_OUTPUT.format(path=path)]
    if to == "pipe":
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    else:
        with (tmp_path / "said").open("w") as file:
            subprocess.run(command, stdout=file, check=True)
        said = (tmp_path / "said").read_text()
    assert said == "before\nnew\nbehind\n"


def test_an_input_is_not_written_over(tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    photo.write_bytes(b"pixels")
    (tmp_path / "link.png").symlink_to(photo)
    for out in (photo, tmp_path / "link.png", tmp_path / "." / "photo.png"):
        with pytest.raises(ValueError, match=r"is what would be read: name another file to write"):
            check_output(out, inputs=["-", photo])
        with pytest.raises(ValueError, match="is what would be read"), new_file(out, inputs=[photo]):
            raise AssertionError
    assert photo.read_bytes() == b"pixels"


@pytest.mark.parametrize(
    ("name", "endings", "refused"),
    [
        ("x.pth", (".safetensors",), True),
        ("x.JPG", (".json", ".txt"), True),
        ("x.safetensors", (".json",), True),
        ("x.json", (".json",), False),
        ("x.JSON", (".json",), False),
        ("x", (".safetensors",), False),
        ("x.v2", (".safetensors",), False),  # promises nothing
        ("x.pth", (), False),
    ],
)
def test_an_ending_that_promises_something_else_is_refused(
    name: str, endings: tuple[str, ...], refused: bool, tmp_path: Path
) -> None:
    if not refused:
        assert check_output(tmp_path / name, endings=endings) == tmp_path / name
        return
    with pytest.raises(ValueError, match=r"something else than its name says: it must end in \."):
        check_output(tmp_path / name, endings=endings)


def test_a_model_is_not_saved_as_what_it_is_not(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"it must end in \.safetensors"):
        tomevit.save(tiny(), tmp_path / "x.pth")
    assert [*tmp_path.iterdir()] == []


def test_no_place(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="is a directory; name the file to write"):
        put(tmp_path)
    with pytest.raises(FileNotFoundError, match="there is no directory"):
        put(tmp_path / "none" / "x")
    with pytest.raises(ValueError, match="named for two results"):
        check_outputs(tmp_path / "x", None, tmp_path / "." / "x")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "full"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_sentence(error: Exception, tmp_path: Path) -> None:
    path = tmp_path / "x"
    with pytest.raises(OutputError) as caught, new_file(path):
        raise error
    assert str(caught.value) == f"{path} cannot be written: {os.strerror(errno.ENOSPC)}"
    assert caught.value.errno == errno.ENOSPC
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_errors_of_other_files_are_not_the_outputs(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, new_file(tmp_path / "x"):
        (tmp_path / "input").read_bytes()
    assert caught.value.filename == str(tmp_path / "input")


@posix
@pytest.mark.skipif(os.name == "posix" and os.geteuid() == 0, reason="root may write everywhere")
def test_what_is_read_only_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    path.chmod(0o400)
    with pytest.raises(OutputError, match=r"x cannot be written: Permission denied"):
        put(path)
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match=r"y cannot be written: Permission denied"):
        check_outputs(tmp_path / "y")


KILLED = """
import os, signal
from tomevit.output import new_file
with new_file("{path}") as draft:
    draft.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@posix
def test_drafts_of_killed_processes_are_removed_and_no_others(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    subprocess.run([sys.executable, "-c", KILLED.format(path=path)], check=False)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".x.txt.")
    elsewhere = left.with_name(left.name.replace(".x.txt.", ".x.txt.elsewhere"))  # another machine's, on a shared disk
    elsewhere.write_text("half")
    (tmp_path / ".x.txt.backup").write_text("a user's own")
    with new_file(path) as mine:  # a process that lives has drafts too
        mine.write_text("a")
        put(path)
        assert mine.exists()
    assert {file.name for file in tmp_path.iterdir()} == {"x.txt", elsewhere.name, ".x.txt.backup"}


def test_names_as_long_as_the_file_system_takes(tmp_path: Path) -> None:
    path = tmp_path / ("ü" * 125 + ".txt")
    put(path)
    assert path.read_text() == "new"


def test_a_directory_for_results_is_made_or_refused_in_a_sentence(tmp_path: Path) -> None:
    for _ in range(2):
        make_directory(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").touch()
    for wrong in ("file", "file/a", "file/a/b"):
        with pytest.raises(OutputError, match=rf"^{tmp_path / wrong} cannot be written: "):
            make_directory(tmp_path / wrong)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a directory in which nobody can make a file")
def test_what_refuses_a_file_is_told_before_a_writer_tries() -> None:
    with pytest.raises(OutputError, match=r"^/proc/a.pth cannot be written: "), new_file("/proc/a.pth"):
        pytest.fail("torch.save would have told it in words of its own")
