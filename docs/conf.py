"""The site that `make docs` builds: the Markdown of this repository, and one notebook made from docs/tour.py.

Links lead to files, as on any view of the repository; here those to pages become pages, and other files are copied.
Nothing is fetched, neither now nor by a reader's browser.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent.parent))

import tomevit
from docs import tables
from tomevit.schedule import Schedule

project = "tomevit"
author = "The tomevit authors"
version = release = tomevit.__version__
html_title = "tomevit"
html_show_copyright = html_show_sourcelink = html_show_sphinx = False

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.githubpages",  # an empty .nojekyll: folders whose names begin with _ are served too
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md", "docs/tour.py", "benchmarks/NOTES.md", "examples/README.md"]
exclude_patterns = [".*", "build", "demo", "tests", "tomevit"]
html_theme = "furo"
html_static_path = ["style.css"]
html_css_files = ["style.css"]
html_extra_path = ["root"]  # index.html, which leads to docs/
pygments_style, pygments_dark_style = "default", "github-dark"
myst_heading_anchors = 3  # as repositories are browsed
nb_custom_formats = {".py": "docs.notebook.executed"}
nb_execution_mode = "off"  # it comes executed

default_role = "py:obj"  # `name` in a docstring: a link, if there is something of that name here
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"
autodoc_inherit_docstrings = False
autodoc_type_aliases = {"Image": "PIL.Image.Image"}  # imported for type checkers alone
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100

GENERATED = re.compile(r"<!-- generated: (.+?) -->")
SCHEDULE = str(Schedule)
FIELD = type(tomevit.Tokens.x)  # of a named tuple
ALIAS = re.compile(r"TypeAliasForwardRef\('([\w.]+)'\)")  # within a union
BACK = re.compile(r'(href="[./]*)(docs/api\w*)\.html#([\w.]+)"')
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")


def prepare(app: Sphinx, docname: str, content: list[str]) -> None:
    """Put in what is generated, and say of links to files that are no pages what to make of them."""
    page = Path(app.env.doc2path(docname))
    if page.suffix == ".md":
        text = GENERATED.sub(lambda marker: tables.SITE[marker[1]](), content[0])
        content[0] = LINK.sub(partial(_lead, page.parent), text)


def _lead(folder: Path, link: re.Match[str]) -> str:
    text, target, _ = link.groups()
    if (folder / target).is_dir():
        return text
    is_page = target.endswith(".md") or target == "tour.py"
    return link[0] if is_page else f"[{text}](path:{target})"


def tell_fields(_: Sphinx, what: str, __: str, obj: Any, ___: object, lines: list[str]) -> None:
    """The fields of data, each with the comment after it in the source."""
    if what != "class" or not _is_data(obj):
        return
    source = inspect.getsource(obj)
    below = source.splitlines()
    (written,) = ast.parse(source).body
    assert isinstance(written, ast.ClassDef)
    for node in written.body:
        if isinstance(node, ast.AnnAssign) and node.end_lineno:
            comment = below[node.end_lineno - 1].partition("  # ")[2]
            lines += [f"* ``{ast.unparse(node)}``" + (f" – {comment}" if comment else "")]
    lines.append("")


def leave_out(_: Sphinx, what: str, __: str, obj: Any, ___: bool, ____: object) -> bool | None:
    """Fields are told with their class, and constants where they matter."""
    is_constant = what == "module" and not (inspect.isclass(obj) or inspect.isroutine(obj))
    return True if is_constant or isinstance(obj, FIELD) else None


def tell_schema(_: Sphinx, __: str, name: str, ___: Any, ____: object, lines: list[str]) -> None:
    """What a JSON file has is aligned in columns, below one sentence."""
    if name.endswith((".as_json", ".to_json")):
        lines[1:] = ["", ".. code-block:: text", "", *(f"   {line}" for line in lines[2:])]


def shorten(_: Sphinx, what: str, __: str, obj: Any, ___: object, arguments: str | None, returned: str | None) -> Any:
    """Data are told by their fields, and a long union by its name."""
    if what == "class" and _is_data(obj):
        return "", None
    return None if arguments is None else (ALIAS.sub(r"\1", arguments).replace(SCHEDULE, "Schedule"), returned)


def _is_data(obj: Any) -> bool:
    return hasattr(obj, "__dataclass_fields__") or hasattr(obj, "_fields")


def mend_links_from_source(app: Sphinx, page: str, __: str, context: dict[str, Any], ___: object) -> None:
    """Of a module whose names are documented in two places viewcode takes all for documented in one."""
    if page.startswith("_modules/"):
        documented = app.env.get_domain("py").data["objects"]
        context["body"] = BACK.sub(partial(_mended, documented), context["body"])


def _mended(documented: Mapping[str, Any], link: re.Match[str]) -> str:
    """The link to a page and a name there, with the name that it has there."""
    before, page, name = link.groups()
    if name not in documented:
        last = name.rpartition(".")[2]
        there = [n for n, e in documented.items() if e.docname == page and n.endswith(f".{last}")]
        # A method shares its class with the name that it has there; a function may share its own name with a method.
        of_class = name.rsplit(".", 2)[1]
        name = min(there, key=lambda n: (n.rsplit(".", 2)[1] != of_class, n.count(".")))
    return f'{before}{page}.html#{name}"'


def write_page(app: Sphinx, failed: Exception | None) -> None:
    """What `tomevit visualize` writes, for docs/looking.md to show."""
    if failed is None and app.builder.format == "html":
        (app.outdir / "docs" / tables.VISUALIZED).write_text(tables.visualized(), encoding="utf-8")


def setup(app: Sphinx) -> None:
    app.connect("html-page-context", mend_links_from_source)
    app.connect("build-finished", write_page)
    app.connect("source-read", prepare)
    app.connect("autodoc-process-docstring", tell_fields)
    app.connect("autodoc-process-docstring", tell_schema, priority=400)  # before napoleon
    app.connect("autodoc-skip-member", leave_out)
    app.connect("autodoc-process-signature", shorten)
