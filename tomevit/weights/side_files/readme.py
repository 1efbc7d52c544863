"""README.md, the model card of a repository on the hub: the licence in its metadata."""

from __future__ import annotations

import re
from pathlib import Path

from tomevit.opening import open_file
from tomevit.weights.side_files.common import MOST_BYTES, MOST_CHARACTERS

_FRONT_MATTER = re.compile(r"---[ \t]*\r?$(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)
_LICENCE = re.compile(r"^(license(?:_name)?):(?=\s)(.{,512})$(?!\n[ \t]+[^\s#])", re.MULTILINE)
# What YAML takes for a text on one line: quoted without escapes, or plain. Lists, aliases, blocks, numbers are none.
_NO_TEXT = r"(?:null|true|false|yes|no|on|off|[\d.:-]+)\s*(?:\s#|$)"
_TEXT = re.compile(rf"""(?:"([^"\\]*)"|'([^']*)'|(?!(?i:{_NO_TEXT}))([^\W_](?:[^#:]|:(?=\S))*))\s*(?:(?<=\s)#.*)?""")


def read_licence(readme: Path) -> str | None:
    """The licence in a model card's metadata, where it is stated plainly: people write it, and it may be anything."""
    with open_file(readme) as file:
        front = _FRONT_MATTER.match(file.read(MOST_BYTES).decode("utf-8-sig", "replace"))
    stated: dict[str, str] = dict(_LICENCE.findall(front[1])) if front else {}
    match = _TEXT.fullmatch(stated.get("license_name", stated.get("license", "")).strip())
    licence = (match[1] or match[2] or match[3] or "").strip() if match else ""
    return licence if 0 < len(licence) <= MOST_CHARACTERS and licence.isprintable() else None
