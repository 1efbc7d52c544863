"""The site that `make docs` builds: every page, every link, every public name, nothing loaded from elsewhere."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tomevit
import tomevit.layers
from docs import tables
from tests.project.test_docs import PAGES, ROOT
from tomevit import cli

pytestmark = pytest.mark.site


class Page(HTMLParser):
    """What a page of the site links, loads and names."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.text: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if "id" in given:
            self.ids.append(given["id"])
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and "href" in given:
            self.loads.append(given["href"])
        self.loads += [given["src"]] if "src" in given else []

    def handle_data(self, data: str) -> None:
        self.text.append(data)


SITE = ROOT / "build" / "site"


@pytest.fixture(scope="session")
def site() -> Path:
    """The folder of the site, as `make docs` has built it."""
    assert (SITE / "docs" / "index.html").is_file(), "make docs builds the site and then tests it"
    return SITE


@pytest.fixture(scope="session")
def pages(site: Path) -> dict[Path, Page]:
    return {path: Page(path) for path in sorted(site.rglob("*.html"))}


def test_every_page_is_on_the_site(pages: Mapping[Path, Page], site: Path) -> None:
    written = {str(path.relative_to(site).with_suffix(".md")) for path in pages}
    assert written >= set(PAGES)
    assert site / "docs" / "tour.html" in pages
    assert pages[site / "index.html"].links == ["docs/index.html"]


def test_every_link_within_the_site_leads_somewhere(pages: Mapping[Path, Page]) -> None:
    lost = []
    for path, page in pages.items():
        for link in page.links:
            if re.match(r"[a-z]+:", link):
                assert link.startswith("https://"), (path, link)
                continue
            target, _, anchor = link.partition("#")
            there = (path.parent / target).resolve() if target else path
            if not there.is_file() or (anchor and there.suffix == ".html" and anchor not in pages[there].ids):
                lost.append((path.name, link))
    assert lost == []


def test_readers_browsers_load_nothing_from_elsewhere(pages: Mapping[Path, Page], site: Path) -> None:
    elsewhere = [(path.name, load) for path, page in pages.items() for load in page.loads if re.match(r"\w+:|//", load)]
    assert [(name, load) for name, load in elsewhere if not load.startswith("data:")] == []
    for path in site.rglob("*.css"):
        assert re.findall(r"(?:url\(|@import)[\s'\"]*(?:https?:|//)[^)]*", path.read_text(encoding="utf-8")) == [], path


#: Names of the modules on docs/api_modules.md that their page leaves out: they serve a command and nobody else.
NOT_IN_THE_REFERENCE = {
    *(
        "tomevit.data.labelled_images.Classes",
        "tomevit.data.labelled_images.is_imagenet",
        "tomevit.data.images.Strings",
    ),
    *("tomevit.tasks.visualize.group_sizes", "tomevit.tasks.visualize.undo_normalisation"),
    "tomevit.tasks.visualize.visualize",  # it is there as tomevit.visualize
}


def public_names() -> set[str]:
    names = {f"tomevit.{name}" for name in tomevit.__all__}
    names |= {f"tomevit.layers.{name}" for name in tomevit.layers.__all__ if name not in tomevit.__all__}
    described = re.findall(r"automodule:: (\S+)", (ROOT / "docs" / "api_modules.md").read_text(encoding="utf-8"))
    for module in map(import_module, described):
        own = (name for name, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__)
        public = (*own, *getattr(module, "__all__", ()))
        names |= {f"{module.__name__}.{name}" for name in public if not name.startswith("_")}
    return names


def test_the_reference_has_every_public_name_once(pages: Mapping[Path, Page]) -> None:
    anchors = [name for page in pages.values() for name in page.ids if name.startswith("tomevit.")]
    assert len(anchors) == len(set(anchors))
    public = public_names()
    assert public >= NOT_IN_THE_REFERENCE
    assert public - NOT_IN_THE_REFERENCE - set(anchors) == set(), "add them to docs/api.md"
    assert NOT_IN_THE_REFERENCE & set(anchors) == set()
    assert [name for name in anchors if "._" in name] == []


def test_the_reference_says_what_fields_are(pages: Mapping[Path, Page], site: Path) -> None:
    text = "".join(pages[site / "docs" / "api.html"].text)
    assert "img_size: tuple[int, int] = (224, 224) – height, width in pixels" in text
    assert "src: Tensor – (B, S) int64: the tokens in that join another" in text
    modules = "".join(pages[site / "docs" / "api_modules.html"].text)
    assert "tokens: int – leaving the last block" in modules
    assert 'command      "eval"' in modules  # columns stay columns


def test_models_and_commands_are_all_there(pages: Mapping[Path, Page], site: Path) -> None:
    zoo_text, command_text, weights_text = (
        "".join(pages[site / "docs" / f"{name}.html"].text) for name in ("zoo", "commands", "weights")
    )
    assert [name for name in tomevit.list_models() if f"{name}\n" not in zoo_text] == []
    for name in cli.VERBS:
        command = cli.load_command(name)
        assert f"tomevit-{name}" in pages[site / "docs" / "commands.html"].ids
        for option in (option for parameter in command.params for option in parameter.opts if option.startswith("--")):
            assert option in command_text
    downloaded = [name for name in tomevit.list_models(weights=True) if "." in name and "digits" not in name]
    assert [name for name in downloaded if name not in weights_text] == []


def test_what_works_with_the_models_is_shown(pages: Mapping[Path, Page], site: Path) -> None:
    shown = [text.replace("’", "'") for text in pages[site / "docs" / "works_with.html"].text]  # as Sphinx sets "'"
    assert [row["tried"] for row in json.loads(tables.OUTCOMES.read_text("utf-8")) if row["tried"] not in shown] == []


def test_the_notebook_was_run(site: Path) -> None:
    (path,) = site.rglob("tour.ipynb")
    cells = [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert {output["output_type"] for output in outputs} == {"execute_result", "stream", "display_data"}
    assert {output.get("name") for output in outputs if output["output_type"] == "stream"} == {"stdout"}
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == len({output["data"]["image/png"] for output in pictures}) == 2
    assert "".join(cells[-1]["outputs"][0]["data"]["text/plain"]) == "('digits_p1.tome_r16', 12, True)"


def test_the_page_that_visualize_writes_is_shown(pages: Mapping[Path, Page], site: Path) -> None:
    assert pages[site / "docs" / "looking.html"].loads.count("visualized.html") == 1
    assert "digits_p1.tome_r16" in (site / "docs" / "visualized.html").read_text(encoding="utf-8")
    assert (site / ".nojekyll").exists()


def test_search_finds_words_of_every_page(site: Path) -> None:
    index = (site / "searchindex.js").read_text(encoding="utf-8")
    found = json.loads(index.removeprefix("Search.setIndex(").removesuffix(")"))
    for word, page in (("unmerg", "docs/merging"), ("inflect", "docs/choosing_r"), ("onnxruntim", "docs/export")):
        where = found["terms"][word]
        assert page in [found["docnames"][i] for i in (where if isinstance(where, list) else [where])]
    assert set(found["docnames"]) >= {page.removesuffix(".md") for page in PAGES}


def test_the_pictures_are_what_their_programs_draw(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="the photographs come from scikit-learn")
    from docs import pictures

    pictures.main(tmp_path)
    assert pictures.PICTURES.keys() == {path.name for path in tmp_path.iterdir()}
    for path in tmp_path.iterdir():
        ours, theirs = (
            np.asarray(Image.open(file).convert("RGB"), float) for file in (path, pictures.IMAGES / path.name)
        )
        assert ours.shape == theirs.shape, f"{path.name} is stale: python -m docs.pictures"
        assert abs(ours - theirs).mean() < 2, f"{path.name} is stale: python -m docs.pictures"
