"""The site, by Sphinx, of the repository's own pages, where they lie: their links hold in both places."""

import contextlib
import io
import re
import sys
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

project = html_title = "mini-flash-attention"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
root_doc = "README"
include_patterns = ["README.md", "docs/*.md", "learn/*.md", "mini_flash_attention/kernels/**README.md"]
exclude_patterns = [".*", "build", "dist"]
highlight_language = "text"
myst_heading_anchors = 3

autodoc_mock_imports = ["vllm"]
default_role = "any"
smartquotes = False
maximum_signature_line_length = 80
napoleon_custom_sections = [("Returns", "params_style"), ("Raises", "params_style")]
python_use_unqualified_type_names = True

html_theme = "pydata_sphinx_theme"
html_theme_options = {
    "header_links_before_dropdown": 7,
    "navbar_align": "left",
    "footer_start": [],
    "footer_end": [],
    "secondary_sidebar_items": ["page-toc"],
    "show_prev_next": True,
}
html_sidebars: dict[str, list[str]] = {
    page: [] for page in ("docs/api", "docs/speed", "docs/house", "docs/worklog")
}
html_extra_path = ["index.html"]
html_static_path, html_css_files = ["site.css"], ["site.css"]
html_copy_source = False

KERNELS = "mini_flash_attention/kernels"
HTML = re.compile(r"\[([^]]+)\]\(((?:[\w.]+/)*\w+\.html(?:#[\w-]+)?)\)")
HELP = re.compile(r"(?m)^<!-- help of (\w+) -->$")


def contents(name: str) -> list[str]:
    """What is below a page. The guides' order is that of docs/README.md, the steps' that of their numbers."""
    if name == root_doc:
        sections = "Learn <learn/README>", "Guides <docs/README>", "API <docs/api>", "Speed <docs/speed>"
        return [*sections, "House <docs/house>", f"Kernels <{KERNELS}/README>", "Worklog <docs/worklog>"]
    if name == "docs/README":
        pages = re.findall(r"\]\((\w+)\.md\)", (ROOT / "docs/README.md").read_text(encoding="utf-8"))
        return [page for page in pages if page not in ("api", "speed", "house", "worklog")]
    if name == "learn/README":
        return sorted(page.stem for page in (ROOT / "learn").glob("*.md") if page.stem != "README")
    kernels = "forward/README", "decode/README", "backward/README"
    return [*kernels] if name == f"{KERNELS}/README" else []


def on_source(app: Any, name: str, source: list[str]) -> None:
    """What a page has on the site only: its contents, and under a step of learn/ its program."""
    text = HELP.sub(lambda command: f"```\n{help_of(command[1])}```", source[0])
    text = HTML.sub(r'<a href="\2">\1</a>', text)  # to open, not to download
    below = contents(name)
    if below:
        text += "\n```{toctree}\n:hidden:\n\n" + "\n".join(below) + "\n```\n"
    program = Path(f"{name}.py")
    if (ROOT / program).exists():
        text += f"\n## {program.name}\n\n```{{literalinclude}} {program.name}\n:language: python\n```\n"
    source[0] = text


def help_of(command: str) -> str:
    """What the command line prints with --help."""
    from mini_flash_attention import __main__

    printed = io.StringIO()
    with contextlib.ExitStack() as changed:
        changed.enter_context(mock.patch("sys.argv", ["mini_flash_attention", *command.split(), "--help"]))
        changed.enter_context(mock.patch.dict("os.environ", COLUMNS="100"))
        changed.enter_context(contextlib.redirect_stdout(printed))
        with contextlib.suppress(SystemExit):
            __main__.main()
    return printed.getvalue()


def on_docstring(app: Any, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are plain text with names in backticks: an indented block is code, a page's path a link."""
    text = re.sub(r"([*|\\])", r"\\\1", "\n".join(lines))
    text = re.sub(r"\bdocs/(\w+)\.md", r":doc:`/docs/\1`", text)
    if what == "module":
        text = re.sub(r"(?m)(?<=\n\n)(?= {4})", ".. code-block:: python\n\n", text)
    lines[:] = text.split("\n")


def on_missing(app: Any, env: Any, node: Any, content: Any) -> Any:
    """A name in backticks that has no place in the reference is no link."""
    return content if node["reftype"] == "any" else None


def on_finished(app: Any, exception: Exception | None) -> None:
    """Pages of learn/ that are HTML already. Their links to Markdown lead to what was made of it."""
    for page in (ROOT / "learn").glob("*.html") if exception is None else ():
        html = re.sub(r'(href="[^":]*)\.md(?=["#])', r"\1.html", page.read_text(encoding="utf-8"))
        (Path(app.outdir) / "learn" / page.name).write_text(html, encoding="utf-8")


def setup(app: Any) -> None:
    app.connect("source-read", on_source)
    app.connect("autodoc-process-docstring", on_docstring, priority=1)  # before napoleon
    app.connect("missing-reference", on_missing)
    app.connect("build-finished", on_finished)
