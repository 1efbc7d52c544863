"""The names of ImageNet's classes, made from the lists that timm ships.

python -m docs.class_names            write tomevit/assets/imagenet_classes.tsv.gz
python -m docs.class_names --check    exit with 1 if it is not what timm's lists say

One line for each class of ImageNet-1k, 12k and 21k, in the order of the heads of 1000, 11821 and 21843 outputs: its
number in WordNet, which of the three it is in, its synonyms. One class of ImageNet-1k, the teddy bear, is not in
ImageNet-21k.
"""

from __future__ import annotations

import csv
import gzip
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks.peers import timm

DATA = Path(__file__).parent.parent / "tomevit" / "assets" / "imagenet_classes.tsv.gz"
LISTS = Path(timm.__file__).parent / "data" / "_info"
HEADER = """\
# The classes of ImageNet-1k, 12k and 21k, in the order of heads of 1000, of 11821 and of 21843 outputs.
# Numbers and words are WordNet's, Copyright 2006 by Princeton University, all rights reserved: see LICENSE.wordnet.
# The choice of classes and their order are those of the lists in timm/data/_info.
"""


def table() -> str:
    """The whole file, unpacked."""
    files = {"1k": "imagenet", "12k": "imagenet12k", "21k": "imagenet21k_goog"}
    members = {
        name: set((LISTS / f"{file}_synsets.txt").read_text(encoding="utf-8").split()) for name, file in files.items()
    }
    with (LISTS / "imagenet_synset_to_lemma.txt").open(encoding="utf-8", newline="") as file:
        words = dict(csv.reader(file, delimiter="\t"))
    lines = []
    for synset in sorted(set().union(*members.values())):
        lists = [name for name in members if synset in members[name]]
        lines.append(f"{synset}\t{' '.join(lists)}\t{words[synset]}\n")
    return HEADER + "".join(lines)


def main(arguments: Iterable[str]) -> str | None:
    """What went wrong, if anything did."""
    new = table()
    if list(arguments) == ["--check"]:
        old = gzip.decompress(DATA.read_bytes()).decode("utf-8")
        return None if old == new else f"{DATA} is stale: python -m docs.class_names"
    if arguments:
        return str(__doc__)
    DATA.write_bytes(gzip.compress(new.encode("utf-8"), 9, mtime=0))
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
