"""In a real browser the Space's controls do what they say, on a desktop and on a phone."""

import io
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from dataload import CLASSES
from tests.conftest import PROJECT
from tests.served import copy_space, export_other, files_of, serve, wait_until
from tests.test_space import NO_LONGER_THERE, NO_MISTAKES, NOT_A_PICTURE

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
]
STAGES = [
    f"layer{number} ({size}x{size} feature maps)" for number, size in enumerate((32, 16, 8, 4), 1)
]
PATIENCE = 60_000  # milliseconds
expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        missing = "NO CHROMIUM: install it, so that the Space's page is tried in a browser"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server(browser, exported_space, tmp_path_factory):
    folder = copy_space(exported_space, tmp_path_factory.mktemp("browsed") / "space")
    with serve(folder, tmp_path_factory.mktemp("uploads")) as address:
        yield address


@pytest.fixture
def open_page(browser: Browser, server):
    """Open the page; at the end nothing may have left this machine, and no error been logged."""
    errors, requests, contexts = [], [], []

    def opened(
        width: int = 1280, height: int = 800, query: str = "", address: str = server
    ) -> Page:
        contexts.append(browser.new_context(viewport={"width": width, "height": height}))
        contexts[-1].grant_permissions(["clipboard-read", "clipboard-write"])
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.on(
            "console",
            lambda message: errors.append(message.text) if message.type == "error" else None,
        )
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(f"{address}/{query}")
        expect(page.get_by_role("button", name="Classify")).to_be_visible(timeout=30_000)
        shown(page, 2, [])  # the answer to the first example
        return page

    yield opened
    for context in contexts:
        context.close()
    assert errors == []
    assert [
        url for url in requests if not url.startswith(("http://127.0.0.1:", "data:", "blob:"))
    ] == []


@pytest.fixture
def picture(tmp_path) -> Path:
    pixels = np.random.default_rng(5).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    return tmp_path / "noise.png"


def sources(page: Page) -> list[str]:
    return page.locator(".thumbnail-item:visible img").evaluate_all(
        "images => images.map(image => image.src)"
    )


def shown(page: Page, count: int, not_these: list[str]) -> None:
    """Wait until the gallery has so many images that stay for half a second, none of the others."""
    page.wait_for_function(
        """([count, old]) => {
            const images = [...document.querySelectorAll('.thumbnail-item img')]
                .filter(image => image.offsetParent)
            return images.length == count && images.every(image => !old.includes(image.src))
        }""",
        arg=[count, not_these],
    )
    for _ in range(PATIENCE // 500):
        before = sources(page)
        page.wait_for_timeout(500)
        if sources(page) == before and len(before) == count:
            return
    pytest.fail("the gallery did not settle")


def pixels(page: Page) -> list[np.ndarray]:
    """The pixels of the gallery's images, each (H, W, 3)."""
    bodies = [page.request.get(url).body() for url in sources(page)]
    return [np.asarray(Image.open(io.BytesIO(body))) for body in bodies]


def upload(page: Page, picture: Path) -> None:
    """Put a picture in the place of the one that is shown, and wait for its heatmaps."""
    old = sources(page)
    page.get_by_label("Remove Image").click()
    page.set_input_files("input[type=file]", picture)
    shown(page, 2, old)


def choose_example(page: Page, name: str) -> None:
    old = sources(page)
    page.locator(".examples button", has_text=name).click()
    shown(page, 2, old)


def set_number(page: Page, label: str, value: float) -> None:
    box = page.locator(f"input[aria-label='number input for {label}']:visible")
    box.fill(str(value))
    box.press("Tab")


def no_sideways_scroll(page: Page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def place(page: Page, selector: str) -> dict:
    """The bounding box of the first visible element."""
    return page.locator(f"{selector}:visible").first.bounding_box()


# The parts of the page in the order in which they are read: picture, answer, heatmaps, controls.
PARTS = (".image-frame img", ".confidence-set", ".thumbnail-item img", "input[type=range]")


def test_the_page_opens_with_the_answer_to_the_first_example_in_sight(open_page, exported_space):
    page = open_page(1280, 800)
    expect(page.locator(".confidence-set")).to_have_count(3)
    captions = page.locator(".thumbnail-item .caption-label:visible").all()
    seen = [*page.locator(".confidence-set").all(), *page.locator(".image-frame img").all()]
    seen += [*captions, page.locator(".colour-bar:visible")]
    assert len(captions) == 2 and len(seen) == 3 + 2 + 2 + 1
    for part in seen:
        box = part.bounding_box()
        assert box["y"] >= 0 and box["y"] + box["height"] <= 800, box
    assert page.evaluate("window.scrollY") == 0


def test_an_upload_gets_its_ten_classes(open_page, picture):
    page = open_page()
    set_number(page, "Top classes", 10)
    expect(page.locator(".confidence-set")).to_have_count(10)
    upload(page, picture)
    expect(page.locator(".confidence-set")).to_have_count(10)
    set_number(page, "Top classes", 50)
    expect(page.locator(".confidence-set")).to_have_count(10)
    set_number(page, "Top classes", 1)
    page.get_by_role("button", name="Classify").click()
    expect(page.locator(".confidence-set")).to_have_count(1)


LISTEN = """() => {
  window.heard = []
  for (const region of document.querySelectorAll("[role=status]"))
    new MutationObserver(() => window.heard.push(region.textContent))
      .observe(region, { subtree: true, childList: true, characterData: true })
}"""


def test_a_screen_reader_hears_answers_and_no_progress(open_page, picture):
    page = open_page()
    page.evaluate(LISTEN)
    upload(page, picture)
    page.get_by_role("button", name="Classify").click()
    page.wait_for_timeout(2000)
    heard = page.evaluate("window.heard")
    assert heard and not any("processing" in text or "queue" in text for text in heard)


def test_an_example_and_a_pasted_picture_are_classified(open_page):
    page = open_page()
    choose_example(page, "frog")
    expect(page.locator(".confidence-set")).to_have_count(3)
    old = sources(page)
    page.get_by_label("Remove Image").click()
    page.evaluate(
        """async () => {
            const canvas = new OffscreenCanvas(64, 64)
            canvas.getContext('2d').fillRect(0, 0, 64, 32)
            const blob = await canvas.convertToBlob({type: 'image/png'})
            await navigator.clipboard.write([new ClipboardItem({'image/png': blob})])
        }"""
    )
    page.get_by_label("Paste from clipboard").click()
    shown(page, 2, old)


@pytest.mark.numeric
@pytest.mark.parametrize("stage", [STAGES[0], STAGES[-1]])
def test_opacity_of_each_stage_goes_from_the_picture_to_the_heatmap(open_page, picture, stage):
    page = open_page()
    upload(page, picture)
    old = sources(page)
    if stage != STAGES[-1]:  # the default
        page.locator("input[aria-label='Stage']:visible").click()
        page.get_by_role("option", name=stage).click()
        shown(page, 2, old)
    at = {}
    for opacity in (0, 0.5, 1):
        old = sources(page)
        set_number(page, "Heatmap opacity", opacity)
        shown(page, 2, old)
        at[opacity] = pixels(page)[0].astype(float)
    enlarged = np.asarray(Image.open(picture)).repeat(8, axis=0).repeat(8, axis=1)
    assert np.array_equal(at[0], enlarged)
    assert np.abs(at[0.5] - (at[0] + at[1]) / 2).max() <= 1 and np.abs(at[1] - at[0]).mean() > 20


def test_opacity_moved_while_maps_are_computed_is_the_one_that_is_shown(open_page, picture):
    page = open_page()
    upload(page, picture)
    old = sources(page)
    set_number(page, "Number of heatmaps", 10)
    set_number(page, "Heatmap opacity", 0)
    enlarged = np.asarray(Image.open(picture)).repeat(8, axis=0).repeat(8, axis=1)

    def is_shown() -> bool:
        shown(page, 10, old)
        return all(np.array_equal(panel, enlarged) for panel in pixels(page))

    wait_until(is_shown)
    page.wait_for_timeout(1000)
    assert is_shown()  # and stays


def test_maps_can_be_counted_and_switched_off(open_page, picture):
    page = open_page()
    upload(page, picture)
    set_number(page, "Number of heatmaps", 10)
    shown(page, 10, [])
    page.get_by_label("Show Grad-CAM").uncheck()
    expect(page.locator(".thumbnail-item:visible")).to_have_count(0)


def test_five_misclassified_images_stand_beside_their_heatmaps(open_page):
    page = open_page()
    page.get_by_role("tab", name="Misclassified images").click()
    shown(page, 6, [])
    old = sources(page)
    set_number(page, "Number of images", 5)
    shown(page, 5, old)
    page.get_by_label("With Grad-CAM").check()
    shown(page, 15, [])
    assert len(page.locator(".thumbnail-item:visible .caption-label").all_inner_texts()) == 15
    grid = page.locator(".grid-wrap:visible")
    assert grid.evaluate(
        "grid => grid.scrollHeight <= grid.clientHeight + 1"
    )  # nothing is hidden in the gallery
    page.get_by_label("Show misclassified images").uncheck()
    expect(page.locator(".thumbnail-item:visible")).to_have_count(0)


def test_misclassified_images_are_filtered_by_class(open_page):
    page = open_page()
    page.get_by_role("tab", name="Misclassified images").click()
    shown(page, 6, [])
    old = sources(page)
    choose(page, "True class", "cat")
    captions = page.locator(".thumbnail-item:visible .caption-label")
    shown(page, 2, old)
    assert all(text.startswith("cat, predicted as deer") for text in captions.all_inner_texts())
    choose(page, "Predicted class", "truck")
    expect(page.locator(".thumbnail-item:visible")).to_have_count(0)
    expect(page.get_by_text("Showing 0 of 0")).to_be_visible()


@pytest.mark.numeric
def test_the_method_can_be_chosen(open_page, picture):
    page = open_page()
    upload(page, picture)
    old = sources(page)
    choose(page, "Stage", STAGES[1])
    shown(page, 2, old)
    before, old = pixels(page), sources(page)
    choose(page, "Method", "LayerCAM")
    shown(page, 2, old)
    assert not np.array_equal(before[0], pixels(page)[0])


def test_the_keyboard_alone_is_enough(open_page):
    """Tab from the top; Enter takes an example, Space hides heatmaps, an arrow adds a class."""
    page = open_page()
    for name in ("Classify", "Misclassified images", "About"):
        focus(page, name, lambda name=name: says(page, name))
        page.keyboard.press("ArrowRight")
    page.get_by_role("tab", name="Classify").click()
    old = sources(page)
    focus(page, "cat", lambda: says(page, "cat"))
    page.keyboard.press("Enter")
    shown(page, 2, old)
    focus(page, "classify", lambda: says(page, "Classify"))
    focus(page, "show", lambda: is_type(page, "checkbox"))
    page.keyboard.press("Space")
    expect(page.locator(".thumbnail-item:visible")).to_have_count(0)
    focus(page, "top classes", lambda: focused(page, "Top classes") and is_type(page, "range"))
    page.keyboard.press("ArrowRight")
    expect(page.locator(".confidence-set")).to_have_count(4)
    for label in ("Stage", "Method", "Heatmap opacity"):
        focus(page, label, lambda label=label: focused(page, label))


def says(page: Page, text: str) -> bool:
    """Whether the element that has the focus shows this text."""
    return page.evaluate("document.activeElement.innerText.trim()") == text


def is_type(page: Page, kind: str) -> bool:
    return page.evaluate("document.activeElement.type") == kind


def focused(page: Page, label: str) -> bool:
    """Whether the element that has the focus is called so by a screen reader."""
    return page.evaluate(
        """label => {
            const element = document.activeElement
            const labels = [...(element.labels ?? [])].map(label => label.innerText)
            const names = [element.getAttribute('aria-label'), ...labels]
            return names.some(name => name?.includes(label))
        }""",
        label,
    )


def focus(page: Page, name: str, reached) -> None:
    """Press Tab until that is so."""
    for _ in range(60):
        page.keyboard.press("Tab")
        if reached():
            return
    raise AssertionError(f"Tab does not lead to {name}")


def choose(page: Page, label: str, option: str) -> None:
    page.locator(f"input[aria-label='{label}']:visible").click()
    page.get_by_role("option", name=option, exact=True).click()


def test_the_page_of_the_committed_space_has_its_picture_taken(browser, tmp_path_factory):
    """With UPDATE_SCREENSHOT set, that becomes the picture in the README."""
    folder = copy_space(PROJECT / "space", tmp_path_factory.mktemp("committed") / "space")
    with serve(folder, tmp_path_factory.mktemp("uploads")) as address:
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.goto(address)
        shown(page, 2, [])
        choose_example(page, "frog")
        expect(page.locator(".confidence-set")).to_have_count(3)
        expect(page.locator(".confidence-set").first).to_contain_text("frog")
        page.mouse.move(0, 0)
        taken = Image.open(
            io.BytesIO(page.screenshot(full_page=True, animations="disabled"))
        ).convert("RGB")
        page.close()
    file = tmp_path_factory.mktemp("screenshot") / "space.png"
    taken.save(file, optimize=True)
    assert taken.width == 1280 and 30_000 < file.stat().st_size < 500_000
    if os.environ.get("UPDATE_SCREENSHOT"):
        shutil.copyfile(file, PROJECT / "images/space.png")


def is_said_once(page: Page, words: str) -> bool:
    """Whether this and nothing else is said; the message is closed then."""
    expect(page.get_by_text(words).first).to_be_visible()
    page.wait_for_timeout(2500)
    texts = page.locator(".toast-body").all_inner_texts()
    page.locator(".toast-close").first.click()
    expect(page.locator(".toast-body")).to_have_count(0)
    return len(texts) == 1 and texts[0].count(words) == 1


MOVES = {"Top classes": 5, "Number of heatmaps": 3, "Heatmap opacity": 0.1}


def test_a_file_that_is_no_picture_gets_one_sentence(open_page, tmp_path):
    (tmp_path / "text.png").write_text("not a picture")
    page = open_page()
    page.get_by_label("Remove Image").click()
    page.set_input_files("input[type=file]", tmp_path / "text.png")
    expect(page.get_by_text(NOT_A_PICTURE)).to_be_visible()  # in place of the last answer
    expect(page.get_by_role("status").filter(has_text=NOT_A_PICTURE)).to_have_count(1)  # read out
    expect(page.locator(".thumbnail-item:visible")).to_have_count(0)
    assert page.locator(".toast-body").count() == 0
    for label, value in MOVES.items():
        set_number(page, label, value)
        assert is_said_once(page, NOT_A_PICTURE)


def are_whole(page: Page) -> bool:
    """Whether the browser has the pixels of every image that it shows."""
    return page.evaluate(
        """[...document.querySelectorAll('img')].filter(image => image.offsetParent)
           .every(image => image.complete && image.naturalWidth > 0)"""
    )


def test_what_is_deleted_is_computed_again_or_said_to_be_gone(
    open_page, exported_space, picture, tmp_path
):
    """With a time of six seconds instead of fifty minutes."""
    folder = copy_space(exported_space, tmp_path / "space")
    (tmp_path / "uploads").mkdir()
    with serve(folder, tmp_path / "uploads", UPLOADS_KEEP_SECONDS="6") as server:
        kept = files_of(tmp_path / "uploads")

        def wait_for_the_sweep() -> None:
            wait_until(lambda: files_of(tmp_path / "uploads") <= kept)
            page.wait_for_timeout(6000)  # what the server remembers of the page goes as well

        page = open_page(address=server)
        page.get_by_role("tab", name="Misclassified images").click()
        shown(page, 6, [])
        page.get_by_role("tab", name="Classify").click()
        upload(page, picture)
        wait_for_the_sweep()
        for label, value in MOVES.items():
            set_number(page, label, value)
            assert is_said_once(page, NO_LONGER_THERE)
        assert len(sources(page)) == 2  # nothing is emptied
        page.get_by_role("tab", name="Misclassified images").click()
        shown(page, 6, [])
        assert are_whole(page)
        wait_for_the_sweep()
        old = sources(page)
        set_number(page, "Heatmap opacity", 0.1)
        shown(page, 6, old)
        assert are_whole(page)
        page.close()  # before its server


def test_an_example_can_be_explained_again_at_any_time(open_page, exported_space, tmp_path):
    folder = copy_space(exported_space, tmp_path / "space")
    (tmp_path / "uploads").mkdir()
    with serve(folder, tmp_path / "uploads", UPLOADS_KEEP_SECONDS="6") as server:
        kept = files_of(tmp_path / "uploads")
        page = open_page(address=server)
        choose_example(page, "frog")
        wait_until(lambda: files_of(tmp_path / "uploads") <= kept)
        page.wait_for_timeout(6000)
        old = sources(page)
        set_number(page, "Heatmap opacity", 1)  # its panels are no longer stored
        shown(page, 2, old)
        assert are_whole(page) and page.locator(".toast-body").count() == 0
        page.close()


def test_no_mistakes_and_no_evidence_are_said(open_page, tmp_path, tmp_path_factory):
    folder = export_other(tmp_path_factory.getbasetemp(), tuple(CLASSES), 0)
    with serve(folder, tmp_path) as server:
        page = open_page(address=server)
        choose_example(page, "frog")
        set_number(page, "Number of heatmaps", 10)
        shown(page, 10, [])
        expect(page.get_by_text("no evidence found for truck")).to_be_visible()
        page.get_by_role("tab", name="Misclassified images").click()
        expect(page.get_by_text(NO_MISTAKES)).to_be_visible()
        assert page.locator(".thumbnail-item:visible").count() == 0
        page.close()


def test_asking_without_a_picture_is_refused_once(open_page):
    page = open_page()
    page.get_by_label("Remove Image").click()
    page.get_by_role("button", name="Classify").click()
    assert is_said_once(page, "Upload a picture or pick an example first.")


def test_a_phone_shows_one_column_without_scrolling_sideways(open_page, picture):
    page = open_page(390, 844)
    upload(page, picture)
    assert no_sideways_scroll(page)
    boxes = [place(page, selector) for selector in PARTS]
    assert [box["y"] for box in boxes] == sorted({box["y"] for box in boxes})
    left = [
        page.get_by_text(text, exact=True).first.bounding_box()["x"]
        for text in ("Your picture", "Grad-CAM heatmaps")
    ]
    assert abs(left[0] - left[1]) < 20
    for name in ("Misclassified images", "About", "Classify"):
        page.get_by_role("tab", name=name).click()
        page.wait_for_timeout(300)
        assert no_sideways_scroll(page), name


@pytest.fixture(scope="session")
def axe(tmp_path_factory) -> str:
    """The source of axe-core, in the version whose rules are meant here."""
    if not shutil.which("npm"):
        pytest.skip("npm is not installed: it fetches axe-core, which checks the page")
    folder = tmp_path_factory.mktemp("axe")
    command = ["npm", "pack", "--silent", "--prefer-offline", "axe-core@4.14.1"]
    command += ["--fetch-retries=0", "--fetch-timeout=30000"]  # milliseconds
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        pytest.skip("npm could not fetch axe-core in two minutes")
    if done.returncode:
        pytest.skip(f"npm could not fetch axe-core: {done.stderr.strip()[:200]}")
    with tarfile.open(folder / done.stdout.split()[-1]) as package:
        return package.extractfile("package/axe.min.js").read().decode()


def violations(page: Page, axe: str) -> set[tuple[str, str]]:
    """What breaks rules of WCAG 2.2, level A or AA: the rule and the element's HTML."""
    page.mouse.move(0, 0)
    page.evaluate(axe)
    tags = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]
    found = page.evaluate("tags => axe.run({runOnly: tags})", tags)["violations"]
    return {(rule["id"], node["html"]) for rule in found for node in rule["nodes"]}


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_no_violation_not_even_of_gradio(open_page, axe, theme):
    page = open_page(query=f"?__theme={theme}")
    assert violations(page, axe) == set()
    page.get_by_role("tab", name="Misclassified images").click()
    shown(page, 6, [])
    assert violations(page, axe) == set()
    page.get_by_role("tab", name="About").click()
    page.wait_for_timeout(500)
    assert violations(page, axe) == set()


def test_dark_mode_loads(open_page):
    page = open_page(query="?__theme=dark")
    assert page.evaluate("document.body.classList.contains('dark')")
    brightness = page.evaluate(
        "getComputedStyle(document.querySelector('gradio-app')).backgroundColor.match(/\\d+/g)"
    )
    assert max(map(int, brightness[:3])) < 80


def test_about_tells_the_facts_of_the_network(open_page):
    page = open_page()
    page.get_by_role("tab", name="About").click()
    expect(page.get_by_text("ResNet18, 11,173,962 parameters")).to_be_visible()
    expect(page.get_by_text("10.00% of the test images")).to_be_visible()
