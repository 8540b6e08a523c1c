"""learn/play.html in a browser: its numbers are Python's; a mouse, keys or a phone are enough to use it.

Chromium, without a window, as the system has it (`apt-get install chromium`); without one these tests skip.
"""

import contextlib
import heapq
import itertools
import json
import math
import operator
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mini_flash_attention.kernels.parts import blocks

LEARN = Path(__file__).resolve().parents[1] / "learn"
PAGE = LEARN / "play.html"
LIMITS = (None, 0, 1, 3, 9)
RULES = ("kernel", "empty", "full", "forget")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright, which drives the browser")
    if CHROMIUM is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser: Any, width: int = 1200, scheme: str = "light") -> Iterator[Any]:
    """The page; at the end nothing may have gone wrong in it, and nothing been asked for."""
    complaints: list[str] = []
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page, url = context.new_page(), PAGE.as_uri()
    page.set_default_timeout(30000)
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: complaints.append(request.url) if request.url != url else None)
    page.goto(url)
    yield page
    context.close()
    assert complaints == []


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    with opened(browser) as page:
        yield page


@pytest.fixture(scope="module")
def functions(browser: Any) -> Any:
    """The page, for tests that call its functions and leave it as it is."""
    page = browser.new_page()
    page.goto(PAGE.as_uri())
    return page


def computed(page: Any, body: str, argument: Any = None) -> Any:
    """What the page's own functions return; as text, which is quicker than value by value."""
    return json.loads(page.evaluate(f"(x) => JSON.stringify(({body})(x))", argument))


def press(page: Any, selector: str, key: str, times: int = 1) -> None:
    for _ in range(times):
        page.locator(selector).press(key)


# The file


def test_the_file_is_small_and_alone() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert len(text.encode()) < 300_000
    assert not re.search(
        r"https?:|//cdn|<link[^>]+stylesheet|<script[^>]+src|@import|fetch\(|import\(|url\((?!#)", text
    )


def test_links_lead_somewhere() -> None:
    """Its own, and those to it."""
    page = PAGE.read_text(encoding="utf-8")
    ids = set(re.findall(r'\bid="([^"]+)"', page))
    own = set(re.findall(r'<a href="([^"]+)"', page))
    assert len(own) >= 5 and all(x[1:] in ids if x[0] == "#" else (LEARN / x).exists() for x in own)
    links = {
        (text.name, anchor)
        for text in LEARN.glob("*.md")
        for anchor in re.findall(r"\]\(play\.html(?:#([^)]+))?\)", text.read_text(encoding="utf-8"))
    }
    assert {name for name, _ in links} >= {"README.md", "02_tiles.md", "08_overlap.md", "13_causal.md"}
    assert {anchor for _, anchor in links if anchor} <= ids


def test_it_loads_without_complaint_or_request(browser: Any) -> None:
    with opened(browser) as page:
        assert page.title() == "Attention, to play with"
        assert page.locator("#numbers dd, #sums p, #slots-K li").count() > 10


# Blocks


def arithmetic(m: int, sizes: tuple) -> list:
    walk = blocks.walk(m, *sizes)
    free = range(walk.free_first, walk.free_end)
    visited = range(walk.start, min(walk.start, walk.first) - 1, -1)
    ranges = blocks.key_blocks(m, *sizes), blocks.unmasked_blocks(m, *sizes), walk
    return [*map(list, ranges), [[n, n not in free] for n in visited]]


ARITHMETIC = """(cases) => cases.map(([tileM, tileN, seqlenQ, seqlenK, left, right]) => {
  const sizes = {tileM, tileN, seqlenQ, seqlenK, left, right};
  return Array.from({length: ceilDiv(seqlenQ, tileM)}, (_, m) => {
    const w = walk(m, sizes);
    const ends = [w.start, w.freeEnd, w.freeFirst, w.first];
    return [keyBlocks(m, sizes), unmaskedBlocks(m, sizes), ends, visits(w)];
  });
})"""


@pytest.mark.parametrize(
    "longest, limits", [(6, LIMITS[:4]), pytest.param(9, LIMITS, marks=pytest.mark.full)]
)
def test_blocks_are_pythons_at_all_small_sizes(functions: Any, longest: int, limits: tuple) -> None:
    tiles = (1, 2, 3), (1, 2, 3)
    cases = list(itertools.product(*tiles, range(1, longest), range(longest), limits, limits))
    for case, got in zip(cases, computed(functions, ARITHMETIC, cases), strict=True):
        assert got == [arithmetic(m, case) for m in range(-(-case[2] // case[0]))], case


def test_blocks_are_pythons_at_real_sizes(functions: Any) -> None:
    draw = random.Random(0)
    limits = (None, 0, 1, 127, 128, 1000)
    cases = [
        [
            draw.choice((64, 128, 192)),
            draw.choice((64, 80, 96, 128)),
            *(draw.randrange(1, 5000) for _ in "qk"),
        ]
        + [draw.choice(limits), draw.choice(limits)]
        for _ in range(200)
    ]
    for case, got in zip(cases, computed(functions, ARITHMETIC, cases), strict=True):
        assert got == [arithmetic(m, case) for m in range(-(-case[2] // case[0]))], case


@pytest.mark.parametrize(
    "longest, limits", [(6, LIMITS[:3]), pytest.param(9, LIMITS, marks=pytest.mark.full)]
)
def test_parts_of_a_tile_are_pythons(functions: Any, longest: int, limits: tuple) -> None:
    """Where warpgroups start."""
    cases = [
        (parts, most, rows * parts, tile_n, *rest)
        for rows, parts, tile_n in ((1, 2, 1), (2, 2, 3), (2, 3, 2), (1, 3, 2))
        for most in (0, 1, 2)
        for rest in itertools.product(range(1, longest), range(longest), limits, limits)
    ]
    got = computed(
        functions,
        """(cases) => cases.map(([parts, most, tileM, tileN, seqlenQ, seqlenK, left, right]) =>
          Array.from({length: ceilDiv(seqlenQ, tileM) * parts}, (_, i) => {
            const sizes = {tileM, tileN, seqlenQ, seqlenK, left, right};
            const w = walkOfPart(floorDiv(i, parts), parts, i % parts, most, sizes);
            return [w.start, w.freeEnd, w.freeFirst, w.first];
          }))""",
        cases,
    )
    for (parts, most, *sizes), walks in zip(cases, got, strict=True):
        m_parts = range(-(-sizes[2] // sizes[0]) * parts)
        of_parts = [list(blocks.walk_of_part(i // parts, parts, i % parts, most, *sizes)) for i in m_parts]
        assert walks == of_parts, (parts, most, sizes)


# The order of tiles, and the SMs


def a_call(**changed: Any) -> dict:
    usual = {"seqlenQ": 1000, "seqlenK": 1000, "left": None, "right": 0, "tileM": 128, "tileN": 128}
    usual |= {"heads": 8, "group": 2, "batch": 1, "headDim": 128, "numSms": 132, "order": "package"}
    return usual | changed


def calls() -> list[dict]:
    draw = random.Random(0)
    made = []
    for _ in range(80):
        group, kv = draw.choice((1, 2, 4)), draw.choice((1, 2, 3, 8))
        made.append(
            a_call(
                seqlenQ=draw.randrange(1, 3000),
                seqlenK=draw.randrange(1, 3000),
                left=draw.choice((None, None, 0, 500)),
                right=draw.choice((None, 0, 0, 200)),
                tileM=draw.choice((64, 128, 192)),
                tileN=draw.choice((64, 96, 128)),
                heads=group * kv,
                group=group,
                batch=draw.choice((1, 1, 3)),
                headDim=draw.choice((64, 128, 256)),
                numSms=draw.choice((1, 7, 40, 132)),
            )
        )
    return made


def swath_of(call: dict) -> int:
    """The package's number."""
    plans = pytest.importorskip("mini_flash_attention.gpu.plans")
    problem = SimpleNamespace(
        longest_q=call["seqlenQ"],
        heads_q=call["heads"],
        batch=call["batch"],
        head_dim=call["headDim"],
        ragged=False,
    )
    return plans.swath(SimpleNamespace(tile_m=call["tileM"]), problem, call["numSms"])


def places(call: dict) -> list[tuple[int, int, int]]:
    """(m, head, batch) of each number: the package's function, on plain integers."""
    scheduler = pytest.importorskip("mini_flash_attention.kernels.parts.scheduler", reason="needs CuTe DSL")
    mask = "full" if call["left"] is None and call["right"] is None else "window"
    config = SimpleNamespace(tile_m=call["tileM"], mask=mask)
    sizes = SimpleNamespace(seqlen_q=call["seqlenQ"], heads=call["heads"], batch=call["batch"])
    tiles, swath = -(-call["seqlenQ"] // call["tileM"]) * call["heads"] * call["batch"], swath_of(call)
    return [scheduler.tile_coords.__wrapped__(config, sizes, swath, number) for number in range(tiles)]


def sizes_of(call: dict) -> tuple:
    return tuple(call[name] for name in ("tileM", "tileN", "seqlenQ", "seqlenK", "left", "right"))


def scheduled(call: dict) -> dict:
    """Who works when: a heap of SMs by the time at which they are free, then by number."""
    free = [(0, sm) for sm in range(call["numSms"])]
    times, tiles, most = [0] * call["numSms"], [], 0
    reads: dict[int, int] = {}
    for number, (m, head, batch) in enumerate(places(call)):
        start, sm = heapq.heappop(free)
        walk = blocks.walk(m, *sizes_of(call))
        end = start + walk.start - min(walk.start, walk.first) + 1
        heapq.heappush(free, (end, sm))
        times[sm] = end
        reads[sm] = batch * (call["heads"] // call["group"]) + head // call["group"]
        most = max(most, len(set(reads.values())))
        tiles.append([number, m, head, batch, sm, start, end])
    balance = sum(times) / len(times) / max(times)
    return {"tiles": tiles, "times": times, "kvHeads": most, "balance": balance}


def test_swaths_are_pythons(functions: Any) -> None:
    """Both round halves to even numbers."""
    names = "tileM", "seqlenQ", "heads", "batch", "headDim", "numSms"
    grid = list(
        itertools.product((64, 128), (1, 500, 4096, 16384), range(1, 70, 4), (1, 2, 5), (64, 256), (16, 132))
    )
    cases = [a_call(**dict(zip(names, values, strict=True))) for values in grid]
    got = computed(functions, "(cases) => cases.map(swathOf)", cases)
    assert got == [swath_of(case) for case in cases]
    assert computed(functions, "(x) => x.map(roundHalfEven)", [0.5, 1.5, 2.5, 2.4, 2.6, 3]) == [
        0,
        2,
        2,
        2,
        3,
        3,
    ]


def test_tiles_and_sms_are_pythons(functions: Any) -> None:
    cases = calls()
    got = computed(
        functions,
        """(cases) => cases.map((call) => {
          const {tiles, times, kvHeads, balance} = schedule(call);
          const drawn = tiles.map((t) => [t.number, t.m, t.head, t.batch, t.sm, t.start, t.end]);
          return {tiles: drawn, times, kvHeads, balance};
        })""",
        cases,
    )
    for case, run in zip(cases, got, strict=True):
        expected = scheduled(case)
        assert run.pop("balance") == pytest.approx(expected.pop("balance"), abs=1e-12)
        assert run == expected, case


@pytest.mark.parametrize("order", ["shortest", "heads"])
def test_other_orders_visit_each_tile_once(functions: Any, order: str) -> None:
    for case in (call | {"order": order} for call in calls()[:30]):
        tiles = computed(functions, "(call) => schedule(call).tiles.map((t) => [t.m, t.head, t.batch])", case)
        m_blocks = range(-(-case["seqlenQ"] // case["tileM"]))
        every = itertools.product(m_blocks, range(case["heads"]), range(case["batch"]))
        assert sorted(map(tuple, tiles)) == sorted(every)


def test_longest_first_is_the_better_order(functions: Any) -> None:
    """What the page says: under a causal mask the package's order ends more evenly than the other two."""
    call = a_call(seqlenQ=4096, seqlenK=4096, heads=16)
    balance = {
        order: computed(functions, "(call) => schedule(call).balance", call | {"order": order})
        for order in ("package", "shortest", "heads")
    }
    assert balance["package"] > max(balance["shortest"], balance["heads"]) + 0.02


def call_on(page: Any) -> dict:
    return computed(page, "() => blocks.call")


def assert_shown(page: Any) -> None:
    """Map, timeline and numbers are those of Python for the call that the controls say."""
    call = call_on(page)
    m_blocks = -(-call["seqlenQ"] // call["tileM"])
    rows = computed(
        page,
        """() => [...document.querySelectorAll('#map [data-m]')].map((row) =>
          [...row.querySelectorAll('[data-first]')]
            .map((x) => [+x.dataset.first, +x.dataset.last, x.classList[0]]))""",
    )
    visited = masked = 0
    assert len(rows) == m_blocks
    for m, runs in enumerate(rows):
        shown = {n: kind for first, last, kind in runs for n in range(first, last + 1)}
        *_, expected = arithmetic(m, sizes_of(call))
        assert shown == {n: "masked" if is_masked else "free" for n, is_masked in expected}
        visited, masked = visited + len(expected), masked + sum(is_masked for _, is_masked in expected)
    run = scheduled(call)
    bars = computed(
        page, "() => [...document.querySelectorAll('#timeline [data-number]')].map((x) => x.dataset.number)"
    )
    assert bars == [str(i) for i in range(len(run["tiles"]))]
    idle = computed(
        page,
        """() => [...document.querySelectorAll('#timeline [data-sm]')]
          .map((x) => [+x.dataset.sm, +x.dataset.time])""",
    )
    assert idle == [[sm, time] for sm, time in enumerate(run["times"]) if time < max(run["times"])]
    numbers = {
        "visited": f"{visited:,}",
        "masked": f"{masked:,}",
        "tiles": f"{len(run['tiles']):,}",
        "swath": str(swath_of(call)),
        "kv": str(run["kvHeads"]),
        "longest": f"{max(run['times']):,}",
        "balance": f"{run['balance']:.3f}",
    }
    assert {name: page.locator(f"#n-{name}").inner_text() for name in numbers} == numbers


def test_blocks_by_mouse(page: Any) -> None:
    for name in ("byHand", "causal", "chunk", "window", "full"):
        page.locator(f"[data-preset={name}]").click()
        assert_shown(page)
    page.locator("[data-preset=byHand]").click()
    tiles = scheduled(call_on(page))["tiles"]
    page.locator("#timeline [data-number='5']").click()
    _, m, head, _, sm, start, end = tiles[5]
    text = page.locator("#tile-text").inner_text()
    assert f"Queries {2 * m} to {2 * m + 1} of head {head} (K and V of head {head // 2})" in text
    assert f"SM {sm}, time {start} to {end}" in text
    assert page.locator("#tile").input_value() == "5"
    assert page.locator("#timeline .later").count() == len(tiles) - 6
    frames = """() => ["#timeline [data-number='5']", "#timeline .chosen"].map((x) =>
      ["x", "y", "width", "height"].map((name) => $(x).getAttribute(name)))"""
    assert operator.eq(*computed(page, frames))
    page.locator("#map [data-m='0']").click(position={"x": 3, "y": 3})
    assert page.locator("#tile-text").inner_text().startswith("Queries 0 to 1 ")


def test_blocks_by_keys(page: Any) -> None:
    page.locator("[data-preset=byHand]").press("Enter")
    page.locator("#sizes [name=seqlenQ]").press("ArrowUp")
    assert call_on(page)["seqlenQ"] == 9
    assert_shown(page)
    mask = page.locator("#sizes [name=mask]")
    mask.press("ArrowDown")
    assert mask.input_value() == "window" and page.locator("#sizes [name=left]").is_enabled()
    for name, value, limit in (("left", "3", 3), ("right", "2", 2), ("left", "-1", None)):
        page.locator(f"#sizes [name={name}]").press("Control+a")
        page.keyboard.type(value)
        assert call_on(page)[name] == limit
        assert_shown(page)
    press(page, "#tile", "Home")
    press(page, "#tile", "ArrowRight", 3)
    assert page.locator("#tile-number").inner_text().startswith("3 of")


def test_wrong_numbers_get_a_sentence(page: Any) -> None:
    """And what was shown before stays."""
    message, before = page.locator("#sizes-message"), page.locator("#n-visited").inner_text()
    for name, value, words in (
        ("seqlenQ", "0", "queries: 1 to 65536"),
        ("seqlenK", "1.5", "keys: 1 to"),
        ("heads", "6", "GQA group: must divide the query heads"),
        ("tileM", "127", "warpgroups of a tile: must divide"),
        ("tileM", "2", "32,768 tiles: at most 8,192"),
        ("numSms", "", "SMs: 1 to 160"),
    ):
        page.locator(f"#sizes [name={name}]").fill(value)
        assert words in message.inner_text()
        assert page.locator("#n-visited").inner_text() == before
        page.locator("[data-preset=causal]").click()
        assert message.inner_text() == ""


def test_warpgroups_that_start_later_are_shown(page: Any) -> None:
    page.locator("[data-preset=chunk]").click()
    shown = computed(
        page,
        """() => [...document.querySelectorAll('#map [data-m]')].map((row) =>
          [...row.querySelectorAll('[data-wg]')].map((x) => [+x.dataset.wg, +x.dataset.start]))""",
    )
    sizes, most = sizes_of(call_on(page)), int(page.locator("#sizes [name=stages]").input_value()) - 1
    for m, late in enumerate(shown):
        starts = [blocks.walk_of_part(m, 2, wg, most, *sizes).start for wg in range(2)]
        assert late == [
            [wg, start] for wg, start in enumerate(starts) if start < blocks.walk(m, *sizes).start
        ]
    assert any(shown)


# The online softmax


def prefix_softmax(scores: torch.Tensor, values: torch.Tensor, seen: list[int], offset: float) -> tuple:
    """(sum, O) of the keys in `seen`, by the definition."""
    P = torch.exp(scores[seen] - (0 if offset == -math.inf else offset))
    return P.sum(), P @ values[seen]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("down", [False, True])
def test_online_softmax_is_pytorchs(functions: Any, down: bool, late: bool) -> None:
    softmax = pytest.importorskip("mini_flash_attention.kernels.parts.softmax", reason="needs CuTe DSL")
    slack = softmax.SLACK * softmax.LN_2
    patterns = ("random", "growing", "falling", "one", "step2")
    cases = list(itertools.product(patterns, (1, 5, 12, 32), (1, 3, 4, 32), (0, 1, 5, 32)))
    got = computed(
        functions,
        """({cases, down, late}) => cases.map(([pattern, keys, width, hidden], seed) => {
          const {scores, values} = drawRow(pattern, keys, seed);
          const seen = scores.map((s, i) => i >= keys - hidden ? -Infinity : s);
          const finite = (x) => x === -Infinity ? "-inf" : x;
          const steps = onlineSoftmax(seen, values, width, {down, late}).map((s) => ({...s, m: finite(s.m)}));
          const {O, lse} = plainSoftmax(seen, values);
          return {scores, values, steps, O, lse: finite(lse), divided: divided(steps.at(-1)), slack: SLACK};
        })""",
        {"cases": cases, "down": down, "late": late},
    )
    stayed = 0
    for (_, keys, width, hidden), x in zip(cases, got, strict=True):
        assert x["slack"] == pytest.approx(slack, rel=1e-15)
        scores, values = (torch.tensor(x[name], dtype=torch.float64) for name in ("scores", "values"))
        scores[max(0, keys - hidden) :] = -math.inf
        order = list(range(-(-keys // width)))[:: -1 if down else 1]
        assert [step["block"] for step in x["steps"]] == [None, *order]
        seen, m = [], -math.inf
        for step in x["steps"][1:]:
            seen += range(step["block"] * width, min(keys, (step["block"] + 1) * width))
            old, largest = m, scores[seen].max().item()
            if not late or old == -math.inf or largest - old > slack:
                m = largest
            stayed += m < largest
            assert float(step["m"]) == m
            total, O = prefix_softmax(scores, values, seen, m)
            assert step["l"] == pytest.approx(total.item(), rel=1e-12)
            assert step["O"] == pytest.approx(O.tolist(), rel=1e-12, abs=1e-12)
            assert step["alpha"] == pytest.approx(1 if old == m else math.exp(old - m), rel=1e-12)
        P = torch.softmax(scores, 0).nan_to_num()  # all masked: 0
        assert x["divided"] == pytest.approx((P @ values).tolist(), rel=1e-12, abs=1e-12)
        assert x["O"] == pytest.approx((P @ values).tolist(), rel=1e-12, abs=1e-12)
        assert float(x["lse"]) == pytest.approx(torch.logsumexp(scores, 0).item(), rel=1e-12)
    assert (stayed > 0) == late  # the cases tell the two apart


def shown_row(page: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and values as the table shows them."""
    scores = [float(x.input_value()) for x in page.locator("#scores input").all()]
    cells = page.locator("#scores tbody td:nth-child(n+4)").all_inner_texts()
    values = torch.tensor([float(cell.replace("−", "-")) for cell in cells], dtype=torch.float64)
    return torch.tensor(scores, dtype=torch.float64), values.reshape(-1, 3)


def ledger(page: Any) -> list[list[float]]:
    rows = [row.inner_text().split() for row in page.locator("#ledger tbody tr").all()]
    return [[float(cell.replace("−", "-").replace("∞", "inf")) for cell in row] for row in rows]


def test_softmax_by_keys(page: Any) -> None:
    """The slider walks; what is shown is PyTorch's, and at the end the plain softmax."""
    for field, value in (("keys", "10"), ("width", "3"), ("hidden", "2")):
        page.locator(f"#row [name={field}]").fill(value)
    page.locator("#scores input").nth(4).fill("7.5")
    scores, values = shown_row(page)
    assert len(scores) == 10 and scores[4] == 7.5
    scores[-2:] = -math.inf
    for walked in range(1, 5):
        press(page, "#block", "ArrowRight")
        seen = list(range(min(10, 3 * walked)))
        m = scores[seen].max().item()
        total, O = prefix_softmax(scores, values, seen, m)
        shown = ledger(page)
        assert len(shown) == walked
        assert [shown[-1][1], *shown[-1][3:]] == pytest.approx([m, total.item(), *O.tolist()], abs=6e-4)
        before = scores[: 3 * (walked - 1)].max().item() if walked > 1 else -math.inf
        assert shown[-1][2] == pytest.approx(math.exp(before - m), rel=0.06, abs=6e-4)
    assert page.locator("#same").inner_text().startswith("The same")
    whole = torch.softmax(scores, 0) @ values
    numbers = re.search(r"the whole row at once: \((.*)\)", page.locator("#sums").inner_text())[1]
    assert [float(x.replace("−", "-")) for x in numbers.split(",")] == pytest.approx(whole.tolist(), abs=6e-4)
    weights = page.locator("#scores td.worth").all_inner_texts()
    expected = torch.exp(scores - scores.max()).tolist()
    assert [float(x.replace("−", "-")) for x in weights] == pytest.approx(expected, rel=0.06, abs=6e-4)


def test_softmax_by_mouse(page: Any) -> None:
    page.locator("#row [name=pattern]").select_option("step2")
    page.locator("#block-next").click()
    page.locator("#block-next").click()
    page.locator("#block-next").click(force=True)  # there is no more
    assert [row[:4] for row in ledger(page)] == [[0, 3, 0, 1.135], [1, 5, 0.135, 1.203]]  # as in 02_tiles.md
    page.locator("#block-back").click()
    assert len(ledger(page)) == 1
    first = shown_row(page)[1]
    page.locator("#draw").click()
    assert not torch.equal(shown_row(page)[1], first)
    page.locator("#row [name=hidden]").fill("4")
    box = page.locator("#block").bounding_box()
    page.mouse.click(box["x"] + box["width"] - 4, box["y"] + box["height"] / 2)
    assert "−∞" in page.locator("#sums").inner_text()
    assert page.locator("#same").inner_text() == "The same: the largest difference is 0"


# The ring


class Mbarrier:
    """An mbarrier of PTX: it completes its phase when all arrivals and all announced bytes are there."""

    def __init__(self, arrivals: int):
        self.arrivals = self.pending = arrivals
        self.bytes = self.phase = 0

    def arrive(self, number: int = 1, announced: int = 0, landed: int = 0) -> None:
        self.pending -= number
        self.bytes += announced - landed
        assert self.pending >= 0 and self.bytes >= 0
        if self.pending == self.bytes == 0:
            self.phase ^= 1
            self.pending = self.arrivals

    def try_wait(self, parity: int) -> bool:
        """Whether the phase of this parity has completed: at first the odd one counts as such."""
        return self.phase != parity


@pytest.fixture
def named_by_kernels(monkeypatch: pytest.MonkeyPatch) -> Any:
    """(kind, use, stages) -> (slot, parity) that a kernel's wait names: Ring of parts/sm90.py."""
    sm90 = pytest.importorskip("mini_flash_attention.kernels.parts.sm90", reason="needs CuTe DSL")
    waits: list[tuple[int, int]] = []
    monkeypatch.setattr(sm90.cute.arch, "mbarrier_wait", lambda *wait: waits.append(wait))

    def named(kind: str, use: int, stages: int) -> tuple[int, int]:
        getattr(sm90.Ring(full=0, empty=0, stages=stages), f"wait_{kind}")(use)
        return waits.pop()

    return named


def test_parities_are_the_kernels(functions: Any, named_by_kernels: Any) -> None:
    cases = list(itertools.product(("full", "empty"), range(40), range(1, 6)))
    got = computed(functions, "(cases) => cases.map(([kind, i, n]) => [i % n, parity(kind, i, n)])", cases)
    assert [tuple(x) for x in got] == [named_by_kernels(*case) for case in cases]


RUN = """({stages, blocks, wgs, rule, seed}) => {
  const {uniform} = generator(seed);
  let state = ringStart({stages, blocks, wgs, latency: 2, rule});
  const history = [];
  for (;;) {
    const actors = ringActors(state.config);
    const able = actors.filter((actor) => canAdvance(state, actor));
    const ops = Object.fromEntries(actors.map((actor) => [actor, nextOp(state, actor)]));
    if (!able.length) return {history, race: state.race, finished: finished(state), stuck: stuck(state)};
    const actor = able[floorDiv(able.length * uniform(), 1)];
    history.push({able, ops, actor});
    state = advance(state, actor);
  }
}"""


def rings(seeds: int) -> list[dict]:
    grid = itertools.product(range(1, 6), (1, 2, 7), (1, 2, 3), range(seeds))
    names = "stages", "blocks", "wgs", "seed"
    return [dict(zip(names, values, strict=True)) for values in grid]


def replay(run: dict, stages: int, wgs: int, named: Any) -> None:
    """Follow a run with mbarriers of our own: whoever could go on there can here, and nobody else."""
    full = {(ring, slot): Mbarrier(1) for ring in "KV" for slot in range(stages)}
    empty = {(ring, slot): Mbarrier(4 * wgs) for ring in "KV" for slot in range(stages)}
    holds: dict[tuple[str, int], int | None] = {}

    def waits(op: dict | None) -> bool:
        if op is None or not op["op"].startswith("wait_"):
            return op is None
        kind = op["op"].removeprefix("wait_")
        slot, parity = named(kind, op["use"], stages)
        return not (full if kind == "full" else empty)[op["ring"], slot].try_wait(parity)

    for moment in run["history"]:
        assert moment["able"] == [actor for actor, op in moment["ops"].items() if not waits(op)]
        op = moment["ops"][moment["actor"]]
        slot = op["ring"], op["use"] % stages
        if op["op"] == "load":
            holds[slot] = None
            full[slot].arrive(announced=1)
        elif op["op"] == "arrive":
            holds[slot] = op["use"]
            full[slot].arrive(0, landed=1)
        elif op["op"] == "read":
            assert holds[slot] == op["use"]
        elif op["op"] == "release":
            assert holds[slot] == op["use"]
            empty[slot].arrive(4)


def test_ring_runs_as_mbarriers_do(functions: Any, named_by_kernels: Any) -> None:
    """In random interleavings: no race, no end before the end, and each wait as long as it must be."""
    cases = rings(seeds=2)
    runs = computed(functions, f"(cases) => cases.map({RUN})", [case | {"rule": "kernel"} for case in cases])
    for case, run in zip(cases, runs, strict=True):
        assert run["finished"] and not run["race"] and not run["stuck"], case
        replay(run, case["stages"], case["wgs"], named_by_kernels)


def test_roles_do_what_the_kernels_do(functions: Any) -> None:
    """Loads and products in the order of forward/sm90_produce.py and sm90_consume.py."""
    producer, consumer = computed(functions, "() => [producerProgram(4), consumerProgram(4)]")
    loads = [f"{op['ring']}{op['use']}" for op in producer if op["op"] == "load"]
    assert loads == ["K0", "K1", "V0", "K2", "V1", "K3", "V2", "V3"]
    for wait, load in zip(producer[::2], producer[1::2], strict=True):
        assert wait == load | {"op": "wait_empty"}
    short = {"wait_full": "w", "read": "r", "release": "e", "softmax": "s"}
    text = " ".join(f"{short[op['op']]}{op['ring']}{op['use']}" for op in consumer)
    step = "wK{1} rK{1} wV{0} rV{0} eK{1} sK{1} eV{0}"
    assert text == " ".join(["wK0 rK0 eK0 sK0", *(step.format(i, i + 1) for i in range(3)), "wV3 rV3 eV3"])


def test_wrong_rules_are_found_out(functions: Any) -> None:
    found = {rule: set() for rule in RULES}
    for rule in RULES:
        runs = computed(
            functions, f"(cases) => cases.map({RUN})", [case | {"rule": rule} for case in rings(1)]
        )
        for run in runs:
            found[rule].add("race" if run["race"] else "stuck" if run["stuck"] else "finished")
    assert found["kernel"] == {"finished"}
    assert found["empty"] == {"stuck"}  # the first round finds no slot empty
    assert "race" in found["full"]  # a later round is read before it has arrived
    assert found["forget"] == {"stuck", "finished"}  # finished: fewer blocks than slots


def test_the_shown_run_ends(functions: Any) -> None:
    """Whatever is chosen; its clock never goes back, and no product begins while another WG's runs."""
    cases = [case | {"rule": "kernel", "latency": latency} for case in rings(1) for latency in (2, 14)]
    got = computed(
        functions,
        """(cases) => cases.map((config) => {
          const history = [ringStart(config)];
          history.push(...runOn(history));
          const {clock, times} = clockOf(history);
          return {done: finished(history.at(-1)), times, spans: clock.spans, steps: history.length};
        })""",
        cases,
    )
    for case, run in zip(cases, got, strict=True):
        assert run["done"] and run["times"] == sorted(run["times"])
        products = [span for span in run["spans"] if span["row"] == "tensor cores"]
        assert len(products) == 2 * case["blocks"] * case["wgs"]
        assert all(a["end"] <= b["start"] for a, b in itertools.pairwise(products))
        held = [span for span in run["spans"] if span["kind"] == "holding"]
        assert len(held) == 2 * case["blocks"]


def bits(page: Any) -> dict[str, list[str]]:
    """The phase bits that are shown, slot by slot."""
    return computed(
        page,
        """() => Object.fromEntries(["K", "V"].flatMap((ring) => ["full", "empty"].map((kind) =>
          [`${ring} ${kind}`, [...document.querySelectorAll(`#slots-${ring} [data-bit=${kind}]`)]
            .map((x) => x.textContent)])))""",
    )


def test_ring_by_mouse(page: Any) -> None:
    """Each role by its own button; who waits stays where he is."""

    def go(actor: str) -> None:
        page.locator(f"[data-actor='{actor}'] button").click(force=True)  # those who wait are aria-disabled

    def card(actor: str) -> str:
        return page.locator(f"[data-actor='{actor}']").inner_text()

    assert "wait_empty(K0)" in card("producer") and "parity 1" in card("producer")
    assert "the wait passes" in card("producer") and "phase 0 has not completed, it waits" in card("WG 0")
    go("WG 0")  # waits for K0
    assert page.locator("#moment").input_value() == "0"
    for _ in range(6):  # K0, K1, V0 are asked for
        go("producer")
    assert "K1, arriving" in page.locator("#slots-K").inner_text()
    assert bits(page)["K full"] == ["0", "0"]
    go("TMA")
    assert bits(page) == {
        "K full": ["1", "0"],
        "K empty": ["0", "0"],
        "V full": ["0"] * 2,
        "V empty": ["0"] * 2,
    }
    assert "wait_empty(K2)" in card("producer") and "round 1, so parity 0" in card("producer")
    assert "phase 0 has not completed, it waits" in card("producer")
    for actor in ("WG 0", "WG 1"):
        assert bits(page)["K empty"] == ["0", "0"]
        for _ in range(3):
            go(actor)
    assert bits(page)["K empty"] == ["1", "0"] and "the wait passes" in card("producer")
    assert page.locator("#moment-text").inner_text() == "WG 1: S0 is there: releases K0."
    page.locator("#moment-back").click()
    assert bits(page)["K empty"] == ["0", "0"]
    page.locator("#again").click()
    steps = page.locator("#moment").get_attribute("max")
    page.locator("#moment").fill(steps)
    assert page.locator("#ring-verdict").inner_text() == "All blocks are done, and all slots released."
    page.locator("#ring-form [name=rule]").select_option("empty")
    assert page.locator("#ring-verdict").inner_text() == "Everybody waits, for ever."


def test_ring_by_keys(page: Any, named_by_kernels: Any) -> None:
    """The slider, step by step: slots and phase bits are those of mbarriers of our own."""
    press(page, "#ring-form [name=stages]", "ArrowUp")
    assert page.locator("#slots-K li").count() == 3
    full, empty = ([Mbarrier(n) for _ in range(3)] for n in (1, 8))
    states = computed(page, "() => ring.history.map(({last}) => last)")
    press(page, "#moment", "Home")
    for last in states[1:50]:
        press(page, "#moment", "ArrowRight")
        if last["ring"] == "K" and last["op"] in ("load", "arrive", "release"):
            slot = last["use"] % 3
            if last["op"] == "load":
                full[slot].arrive(announced=1)
            elif last["op"] == "arrive":
                full[slot].arrive(0, landed=1)
            else:
                empty[slot].arrive(4)
            shown = bits(page)
            assert shown["K full"] == [str(x.phase) for x in full]
            assert shown["K empty"] == [str(x.phase) for x in empty]
    page.locator("#moment").press("End")
    assert "All blocks are done" in page.locator("#ring-verdict").inner_text()
    page.locator("[data-actor='WG 0'] button").press("Enter")  # has nothing more to do
    assert page.locator("#moment").input_value() == page.locator("#moment").get_attribute("max")


# For everybody

# Each text that is seen: its size, and its contrast with all that may lie behind it.
TEXTS = """() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = ([r, g, b, a], below) => [r, g, b].map((x, i) => x * a + below[i] * (1 - a));
  const luminance = (color) => {
    const linear = (x) => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
    const [r, g, b] = color.map((x) => linear(x / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const contrast = (a, b) => {
    const [low, high] = [luminance(a), luminance(b)].sort((x, y) => x - y);
    return (high + 0.05) / (low + 0.05);
  };
  const behind = (element) => { // colours, of which any may be behind a text of this element
    if (!element) return [[255, 255, 255]];
    const style = getComputedStyle(element);
    const below = rgba(style.backgroundColor)[3] === 1 ? [[0, 0, 0]] : behind(element.parentElement);
    const plain = below.map((color) => over(rgba(style.backgroundColor), color));
    const drawn = style.backgroundImage.match(/(?:rgba?|color)\\([^)]*\\)/g) ?? [];
    return [...plain, ...drawn.flatMap((color) => plain.map((x) => over(rgba(color), x)))];
  };
  const found = [];
  const note = (element, text) => {
    const box = element.getBoundingClientRect();
    if (!box.width || !box.height || element.closest("defs, option, title")) return;
    const style = getComputedStyle(element);
    const inSvg = element instanceof SVGElement;
    let colors = behind(inSvg ? element.closest("svg") : element);
    if (element.classList.contains("on-bar")) {
      const bar = element.previousElementSibling;
      const fill = getComputedStyle(bar).fill;
      if (fill !== "none" && !fill.startsWith("url")) colors = [rgba(fill)];
    }
    const color = rgba(inSvg ? style.fill : style.color);
    const least = Math.min(...colors.map((x) => contrast(over(color, x), x)));
    found.push({text: text.trim().slice(0, 40), size: parseFloat(style.fontSize), contrast: least});
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const {textContent, parentElement: element} = walker.currentNode;
    if (textContent.trim() && !element.closest("script, style, noscript")) note(element, textContent);
  }
  const fields = document.querySelectorAll("input[type=number], select");
  for (const field of fields) note(field, field.name || field.ariaLabel);
  return found;
}"""


def show_much(page: Any) -> None:
    """A walk that has come far, a ring with waits, text on bars."""
    page.locator("[data-preset=byHand]").click()
    page.locator("#block").fill("2")
    page.locator("#moment").fill("21")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(browser: Any, scheme: str) -> None:
    with opened(browser, scheme=scheme) as page:
        check_contrast(page, scheme)


def check_contrast(page: Any, scheme: str) -> None:
    show_much(page)
    for change in (lambda: None, lambda: page.locator("#ring-form [name=rule]").select_option("empty")):
        change()
        page.locator("#sizes [name=heads]").fill("3")  # and a message
        texts = computed(page, TEXTS)
        assert len(texts) > 200 and any("must divide" in text["text"] for text in texts)
        assert [text for text in texts if text["contrast"] < 4.5] == []
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", background)[:3])) < 200) == (scheme == "dark")


def test_fits_a_phone(browser: Any) -> None:
    with opened(browser, width=390) as page:
        check_on_a_phone(page)


def check_on_a_phone(page: Any) -> None:
    show_much(page)
    for name in ("causal", "window", "chunk", "byHand"):
        page.locator(f"[data-preset={name}]").click()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.locator("#ring-form [name=stages]").fill("5")
    page.locator("#row [name=pattern]").select_option("one")
    page.locator("#block").fill("3")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert [text for text in computed(page, TEXTS) if text["size"] < 12] == []
    outside = computed(
        page,
        """() => [...document.querySelectorAll("body *")]
          .filter((x) => !x.closest(".scroll, svg > *, option"))
          .filter((x) => x.getBoundingClientRect().right > 391).map((x) => x.outerHTML.slice(0, 80))""",
    )
    assert outside == []
    sizes = computed(
        page,
        """() => [...document.querySelectorAll("button, input, select")]
          .map((x) => [x.outerHTML.slice(0, 60), x.getBoundingClientRect().height])""",
    )
    assert [x for x in sizes if x[1] < 24] == []
    assert min(text["size"] for text in computed(page, TEXTS) if text["text"] in ("seqlenQ", "pattern")) >= 16


def test_every_control_has_a_name_and_a_turn(page: Any) -> None:
    """Labels, and Tab reaches all of them."""
    names = computed(
        page,
        """() => [...document.querySelectorAll("button, input, select, a[href]")].map((x) =>
          (x.labels?.[0]?.textContent ?? x.ariaLabel ?? x.textContent).trim())""",
    )
    assert all(names) and len(names) > 50
    controls = "button, input:not(:disabled), select, a[href], [tabindex='0']"
    page.evaluate(f"[...document.querySelectorAll(`{controls}`)].forEach((x, i) => x.dataset.turn = i)")
    number = page.locator("[data-turn]").count()
    turns = []
    for _ in range(number):
        page.keyboard.press("Tab")
        turns.append(int(page.evaluate("document.activeElement.dataset.turn ?? -1")))
    assert turns == list(range(number))
    assert page.evaluate("parseFloat(getComputedStyle(document.activeElement).outlineWidth)") >= 2
    images = computed(page, "() => [...document.querySelectorAll('svg[role=img]')].map((x) => x.ariaLabel)")
    assert len(images) == 3 and all(images)
    assert page.locator("[aria-live], [role=status]").count() >= 6
    levels = computed(page, "() => [...document.querySelectorAll('h1, h2, h3')].map((x) => +x.tagName[1])")
    assert levels[0] == 1 and all(b <= a + 1 for a, b in itertools.pairwise(levels))
