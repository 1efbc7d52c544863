"""What files and directories are that are no checkpoints tomevit reads, each with the way to one that is."""

from __future__ import annotations

import codecs
import html
import os
import re
from collections.abc import Iterable
from pathlib import Path


def _savez(arrays: str) -> str:
    """The command that makes an .npz file of what a library reads."""
    return f'`python -c "import numpy as np, {arrays}"` makes an .npz of it'


_KERAS = "keras; np.savez('w.npz', **{w.path: w.numpy() for w in keras.saving.load_model('FILE').weights})"
_GGUF = (
    "gguf; r = gguf.GGUFReader('FILE'); "
    "np.savez('w.npz', **{t.name: gguf.dequantize(t.data, t.tensor_type) for t in r.tensors})"
)
_FLAX = (
    "flax.serialization as s, flax.traverse_util as t; "
    "np.savez('w.npz', **t.flatten_dict(s.msgpack_restore(open('FILE', 'rb').read()), sep='/'))"
)
_ONNX = (
    "onnx; from onnx.numpy_helper import to_array; "
    "np.savez('w.npz', **{t.name: to_array(t) for t in onnx.load('FILE').graph.initializer})"
)
_SAVED_MODEL = "tensorflow as tf; np.savez('w.npz', **{v.name: v for v in tf.saved_model.load('DIR').variables})"
_TENSORFLOW = "which tomevit does not read: " + _savez(
    "tensorflow as tf; r = tf.train.load_checkpoint('DIR'); "
    "np.savez('w.npz', **{n: r.get_tensor(n) for n in r.get_variable_to_shape_map()})"
)
_PROGRAM = "which holds a program, not named weights: take the checkpoint that it was made of"
DISTRIBUTED = (
    "part of a distributed checkpoint: `python -m torch.distributed.checkpoint.format_utils dcp_to_torch DIR FILE` "
    "makes one file of its directory"
)
ZERO = (
    "one part of a DeepSpeed ZeRO checkpoint: in its directory, `python zero_to_fp32.py . pytorch_model.bin` makes one "
    "file of all parts"
)
_FSDP = (
    "a checkpoint of FSDP in parts: `accelerate merge-weights DIR/pytorch_model_fsdp_0 OUT` makes OUT/model.safetensors"
)
ADAPTER = (
    "an adapter beside a model (peft): load both, save model.merge_and_unload() by save_pretrained, and give what that "
    "writes"
)
_ORBAX = (
    "orbax.checkpoint as ocp, flax.traverse_util as t; "
    "np.savez('w.npz', **t.flatten_dict(ocp.PyTreeCheckpointer().restore('DIR'), sep='/'))"
)
#: The first bytes of files that are no checkpoints: what they are, and the way to one that is.
_FILES = {
    rb"version https://git-lfs": "a git-lfs pointer, which only names the file: run `git lfs pull`",
    rb"\x1f\x8b": "gzip-compressed: unpack it first",
    rb"BZh": "bzip2-compressed: unpack it first",
    rb"\xfd7zXZ": "xz-compressed: unpack it first",
    rb"\x28\xb5\x2f\xfd": "zstd-compressed: unpack it first",
    rb"7z\xbc\xaf\x27\x1c": "a 7z archive: unpack it first",
    rb"Rar!": "a rar archive: unpack it first",
    rb"\x89HDF": f"an HDF5 file (Keras, TensorFlow), which tomevit does not read: {_savez(_KERAS)}",
    rb"\x93NUMPY": "a single numpy array, not a state dict",
    rb"GGUF": f"a GGUF file, which tomevit does not read: {_savez(_GGUF)}, but under names of its own",
    # a map whose first key is a text
    rb"(?:[\x81-\x8f]|\xde..|\xdf....)[\xa0-\xbf\xd9]": f"Flax's msgpack, which tomevit does not read: {_savez(_FLAX)}",
    rb"[fp]trt": "an engine of TensorRT, of which no weights can be read: take the checkpoint that it was made of",
    rb"....TFL3": f"a TensorFlow Lite model, {_PROGRAM}",
    rb"....ET\d\d": f"an ExecuTorch program, {_PROGRAM}",
    rb"\x08\x01\x12": f"a TensorFlow SavedModel, which tomevit does not read: {_savez(_SAVED_MODEL)}",
    rb"\x08[\x02-\x0f]\x12.{1,2}\n": f"a Core ML model, {_PROGRAM}",
    rb"\x08[\x03-\x1f][\x12\x1a]": f"an ONNX model, which tomevit does not read: {_savez(_ONNX)}",
    rb"model_checkpoint_path: ": f"the index of a TensorFlow checkpoint, {_TENSORFLOW}",
    rb"%PDF": "a PDF document",
    rb"\x89PNG": "a picture",
    rb"\xff\xd8\xff": "a picture",
}
TORCHSCRIPT = "a TorchScript archive: load it with torch.jit.load, and torch.save its state_dict()"
#: Names of entries in zip archives that are no checkpoints.
_ARCHIVES = {
    r"(^|/)(archive_format|serialized_exported_program\.json|models/model\.json)$": (
        "a program of torch.export: load it with torch.export.load, and torch.save its state_dict"
    ),
    r"(^|/)(constants\.pkl|code/|model\.json)": TORCHSCRIPT,
    r"^model\.weights\.h5$": f"a Keras archive, which tomevit does not read: {_savez(_KERAS)}",
}


def describe_file(path: str, head: bytes, tail: bytes) -> str | None:
    """What a file is by its first bytes and its last eight; None: unknown. The values of TensorFlow have but a name."""
    if tail == b"\x57\xfb\x80\x8b\x24\x75\x47\xdb" or re.search(r"\.data-\d{5}-of-\d{5}$", path):  # of a LevelDB table
        return f"part of a TensorFlow checkpoint, {_TENSORFLOW}"
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it first"
    return next((what for magic, what in _FILES.items() if re.match(magic, head, re.DOTALL)), None)


def describe_text(head: bytes) -> str | None:
    """What a file is that begins with text; None: it does not."""
    try:
        text = codecs.getincrementaldecoder("utf-8-sig")().decode(head)  # may end within a character
    except UnicodeDecodeError:
        return None
    text = text.strip()[:4096]
    if text.startswith("<"):
        title = re.search(r"<title[^>]*>(.*?)</title|<message>(.*?)</message", text, re.IGNORECASE | re.DOTALL)
        words = html.unescape(title[1] or title[2]) if title else re.sub(r"<[^>]*>", " ", text)
        return f'a web page ("{shorten(words)}")'
    if text.isprintable() or re.fullmatch(r"[^\x00-\x08\x0e-\x1f\x7f]*", text):
        return f'text ("{shorten(text)}"), not weights'
    return None


def describe_archive(names: Iterable[str]) -> str | None:
    """What a zip archive of these entries is; None: unknown."""
    names = list(names)
    return next((what for pattern, what in _ARCHIVES.items() if any(re.search(pattern, name) for name in names)), None)


def is_part_of_distributed(path: str, head: bytes) -> bool:
    """Whether a file is of `torch.distributed.checkpoint`: values, which begin as torch's archives do, or the index."""
    return path.endswith(".distcp") or b"torch.distributed.checkpoint.metadata" in head[:2048]


def describe_directory(path: str | os.PathLike[str]) -> str | None:
    """What a directory is that holds no checkpoint file but weights of another kind, with the way to a file of them."""
    path = Path(path)
    distributed = _FSDP if path.name.startswith("pytorch_model_fsdp") else DISTRIBUTED.removeprefix("part of ")
    zero = ZERO.replace("one part of a", "a")
    marks = {
        "adapter_config.json": ADAPTER,
        "adapter_model.*": ADAPTER,
        "pytorch_model_fsdp_*/.metadata": _FSDP,
        "pytorch_model_fsdp_*rank*.bin": "a checkpoint of FSDP in parts: save it anew with the type FULL_STATE_DICT",
        ".metadata": distributed,
        "*.distcp": distributed,
        "zero_to_fp32.py": zero,
        "*_optim_states.pt": zero,
        "global_step*/*_optim_states.pt": zero,
        "saved_model.pb": f"a TensorFlow SavedModel, which tomevit does not read: {_savez(_SAVED_MODEL)}",
        "*.index": f"a TensorFlow checkpoint, {_TENSORFLOW}",
        "*.data-?????-of-?????": f"a TensorFlow checkpoint, {_TENSORFLOW}",
        "Manifest.json": f"a Core ML package, {_PROGRAM}",
        "_METADATA": f"an Orbax checkpoint (JAX), which tomevit does not read: {_savez(_ORBAX)}",
        "manifest.ocdbt": f"an Orbax checkpoint (JAX), which tomevit does not read: {_savez(_ORBAX)}",
        "data.pkl": "a file of torch.save, unpacked: `zip -0 -r weights.pth DIR`, run in the directory above, packs it",
    }
    return next((f"is {what}" for mark, what in marks.items() if any(path.glob(mark))), None)


def shorten(text: str, length: int = 100) -> str:
    """A text in one line, and no longer than this."""
    text = " ".join(text.split())
    return f"{text[:length]}…" if len(text) > length else text
