"""The site: it builds without a warning, has every page and name, leads nowhere that is not there."""

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import mini_flash_attention
from mini_flash_attention import masks

ROOT = Path(__file__).resolve().parents[1]
RESOURCES = {"script", "img", "iframe", "source", "video", "audio", "embed", "input", "track"}
NAME = re.compile(r"\w+(, \w+)*")


class Page(HTMLParser):
    """ids: what a link may lead to. links: those to follow. resources: what a browser fetches by itself."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids, self.links, self.resources = set[str](), list[str](), list[str]()
        self.argument_names: list[str] = []
        self.open_tags: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif tag == "link" and "href" in given and given.get("rel") != "canonical":
            self.resources.append(given["href"])
        elif tag in RESOURCES:
            self.resources += [given[name] for name in ("src", "srcset") if name in given]
        self.open_tags.append(tag)
        if tag == "strong":
            self.argument_names.append("")

    def handle_endtag(self, tag: str) -> None:
        while self.open_tags and self.open_tags.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if "strong" in self.open_tags:
            self.argument_names[-1] += data


def pages_of(site: Path) -> list[Path]:
    """Without the templates among the theme's files."""
    return [path for path in site.rglob("*.html") if "_static" not in path.parts]


def dead_links(site: Path) -> list[str]:
    """Links and resources of the pages of a folder that lead to no file there, or to no place in it."""
    pages, dead = {path: Page(path) for path in pages_of(site)}, []
    for path, page in pages.items():
        for link in page.links + page.resources:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            fragment = unquote(parts.fragment)
            if not target.is_file() or (target in pages and fragment not in pages[target].ids | {""}):
                dead.append(f"{path.relative_to(site)}: {link}")
    return dead


def fetched(site: Path) -> list[str]:
    """What pages and styles would fetch from another host."""
    found = [one for path in pages_of(site) for one in Page(path).resources]
    for path in [*site.rglob("*.css"), *pages_of(site)]:
        found += re.findall(r"(?:url\(|@import)\s*[\"']?([^\"')\s]+)", path.read_text(encoding="utf-8"))
    return [one for one in found if re.match(r"(\w+:)?//", one)]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for library in ("sphinx", "myst_parser", "pydata_sphinx_theme"):
        pytest.importorskip(library)
    folder = tmp_path_factory.mktemp("site").resolve()
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs", ".", str(folder)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    return folder


@pytest.mark.full
@pytest.mark.timeout(600)
def test_every_page(site: Path) -> None:
    """Its Markdown is a page, its HTML is the same file, a step of the ladder shows its program."""
    kernels = (ROOT / "mini_flash_attention/kernels").rglob("*.md")
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("learn/*.md"), *kernels]
    made = [page.relative_to(ROOT).with_suffix(".html") for page in [*pages, *ROOT.glob("learn/*.html")]]
    assert [str(page) for page in made if not (site / page).is_file()] == []
    programs = [page.with_suffix(".py") for page in pages]
    for program in filter(Path.exists, programs):
        assert f">{program.name}<" in (site / "learn" / f"{program.stem}.html").read_text(encoding="utf-8")
    assert (site / "index.html").is_file() and (site / "searchindex.js").is_file()


@pytest.mark.full
@pytest.mark.timeout(600)
def test_no_dead_links(site: Path) -> None:
    assert dead_links(site) == []


@pytest.mark.full
@pytest.mark.timeout(600)
def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    assert fetched(site) == []


@pytest.mark.full
@pytest.mark.timeout(600)
def test_every_public_name(site: Path) -> None:
    reference = Page(site / "docs/api.html")
    of_masks = [name for name, x in vars(masks).items() if getattr(x, "__module__", "") == masks.__name__]
    public = [name for name in of_masks if name[0] != "_" and name != "index_into"]
    names = {f"mini_flash_attention.{name}" for name in mini_flash_attention.__all__}
    names |= {f"mini_flash_attention.masks.{name}" for name in public}
    assert len(public) > 8 and names - reference.ids == set()
    # Lines of Args, Returns and Raises are "name: text"; others would be shown as a name.
    assert [name for name in reference.argument_names if not NAME.fullmatch(name)] == []


def test_what_is_dead(tmp_path: Path) -> None:
    """These checks find what they are for."""
    style = "@import 'https://a.example/b.css'; p { background: url(//c.example/d) }"
    (tmp_path / "style.css").write_text(style)
    (tmp_path / "there.html").write_text("<p id=place>")
    good = ["there.html", "there.html#place", "#here", "style.css", "https://a.example"]
    bad = ["#gone", "gone.html", "gone.svg", "there.html#gone"]
    html = "".join(f'<a href="{link}">' for link in [*good, *bad])
    html += "<p id=here><img src=lost.svg><script src=//a.example/b.js></script>"
    (tmp_path / "page.html").write_text(html)
    assert dead_links(tmp_path.resolve()) == [f"page.html: {link}" for link in [*bad, "lost.svg"]]
    assert fetched(tmp_path) == ["//a.example/b.js", "https://a.example/b.css", "//c.example/d"]
