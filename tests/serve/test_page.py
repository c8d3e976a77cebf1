"""The page in a real browser without a window: asked with the keyboard and by the names that a screen reader says."""

import shutil

import pytest

pytest.importorskip("fastapi", reason='needs pip install "flexkern[serve]"')
pytest.importorskip("httpx", reason='needs pip install "flexkern[test]"')
sync_api = pytest.importorskip("playwright.sync_api", reason='needs pip install "flexkern[test]"')

from serving import TOKEN, serving

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, as chromium or google-chrome on the path")


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.fixture
def page(browser):
    """A page that fails the test where a script does, or the policy is broken."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page, wrong = context.new_page(), []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: wrong.append(said.text) if "Content Security Policy" in said.text else None)
    page.set_default_timeout(20_000)
    yield page
    context.close()
    assert not wrong


def opened(page, server):
    page.goto(server.address)
    page.get_by_text("connected", exact=True).wait_for()
    return page


def row_of(page, identity):
    return page.locator(f'[data-id="{identity}"]')


def test_a_script_of_prompts_is_asked_for_with_the_keyboard_alone(page, server):
    opened(page, server)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the videos"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Prompt"
    page.keyboard.press("Control+A")
    page.keyboard.type("first")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # Add a prompt
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Prompt 2"
    page.keyboard.type("second")
    page.get_by_label("Prompt 2 begins at, in seconds").fill("1.5")
    page.get_by_role("spinbutton", name="Seed").fill("7")
    page.get_by_label("Length").fill("3")
    page.get_by_label("Method").select_option("infinity-rope")
    page.get_by_role("button", name="Make it").press("Enter")
    page.locator(".video", has_text="first (and 1 more)").wait_for()
    (video,) = server.client.get("/v1/videos").json()["data"]
    assert [one["prompt"] for one in video["prompts"]] == ["first", "second"] and video["prompts"][1]["at"] == 1.5
    assert (video["seed"], video["seconds"], video["preset"]) == (7, "3", "infinity-rope")


def test_what_will_not_do_is_told_at_its_field(page, server):
    opened(page, server)
    page.get_by_label("Length").fill("500")
    page.get_by_role("button", name="Make it").click()
    page.get_by_role("alert").get_by_text("at most 120 seconds").wait_for()
    field = page.get_by_label("Length")
    assert field.get_attribute("aria-invalid") == "true" and field.get_attribute("aria-describedby") == "problem"
    assert page.evaluate("document.activeElement.id") == "seconds"
    field.fill("1")
    page.get_by_role("button", name="Make it").click()
    page.locator(".video").wait_for()
    assert field.get_attribute("aria-invalid") is None


def test_an_answer_that_was_overtaken_changes_nothing(page, server):
    """The news that a video was cancelled may come before the answer to who cancelled it, which says less."""
    opened(page, server)
    identity = server.post("it waits", frames=96).json()["id"]
    page.locator("#now-count", has_text="8 of 96 pictures").wait_for()

    def late(route):
        answer = route.fetch()
        while server.client.get(f"/v1/videos/{identity}").json()["status"] != "failed":
            pass
        page.wait_for_timeout(300)
        route.fulfill(response=answer, json=answer.json() | {"status": "in_progress", "error": None})

    page.route("**/cancel", late)
    with page.expect_response("**/cancel"):
        page.locator("#now-cancel").click()
    page.wait_for_timeout(100)
    assert "cancelled: it was cancelled" in row_of(page, identity).inner_text()


def test_a_video_grows_before_ones_eyes_and_is_cancelled(page, server):
    opened(page, server)
    identity, other = server.post("it waits", frames=96).json()["id"], server.post("b").json()["id"]
    page.locator("#now-count", has_text="8 of 96 pictures").wait_for()
    page.locator("#preview:not([hidden])").wait_for()
    assert page.evaluate("document.querySelector('#preview').naturalWidth") == 32
    assert page.locator("#chart rect").count() == 3
    page.locator("#chart-said", has_text="last 0.031").wait_for()
    assert "next" in row_of(page, other).inner_text()
    page.locator("#now-cancel").click()
    row_of(page, identity).get_by_text("cancelled: it was cancelled").wait_for()
    row_of(page, other).get_by_text("Done").wait_for()


def test_why_a_video_failed_is_seen_and_it_is_used_again(page, server):
    opened(page, server)
    identity = server.post("it fails", seed=5, preset="pi", overrides={"retention.window": 12}).json()["id"]
    row_of(page, identity).get_by_text("render_failed: video.mp4: a layer is not finite").wait_for()
    page.get_by_role("status").get_by_text("Failed: it fails").wait_for(state="attached")
    row_of(page, identity).get_by_role("button", name="Use again").click()
    assert page.get_by_label("Prompt", exact=True).input_value() == "it fails"
    assert (
        page.get_by_role("spinbutton", name="Seed").input_value() == "5"
        and page.get_by_label("Method").input_value() == "pi"
    )
    assert page.locator("#overrides").input_value() == "retention.window = 12"
    row_of(page, identity).get_by_role("button", name="Delete").click()
    row_of(page, identity).wait_for(state="detached")
    assert server.client.get("/v1/videos").json()["data"] == []


def test_videos_of_one_second_stand_in_their_order(page, server):
    first = server.post("it waits").json()["id"]
    listed = [server.post(f"number {i}").json()["id"] for i in range(3)]
    opened(page, server)
    page.locator(f'[data-id="{listed[2]}"]').wait_for()
    fresh = [server.post(f"number {i}").json()["id"] for i in range(3, 6)]
    page.locator(f'[data-id="{fresh[2]}"]').wait_for()
    row_of(page, first).get_by_text("Being made").wait_for()
    shown = page.locator(".video").evaluate_all("(rows) => rows.map((row) => row.dataset.id)")
    assert shown == [first, *listed, *fresh][::-1]
    waits = page.locator(".video .meta").all_inner_texts()
    assert waits[-2].endswith("next") and waits[0].endswith("5 before it")


def test_news_that_come_before_the_list_do_not_change_its_order(page, server):
    server.post("it waits")
    listed = [server.post(f"number {i}").json()["id"] for i in range(3)]
    held = []
    page.route("**/v1/videos?limit=*", lambda route: held.append(route))
    with page.expect_response("**/v1/events"), page.expect_request("**/v1/videos?limit=*"):
        page.goto(server.address)
    server.client.post(f"/v1/videos/{listed[0]}/cancel")
    page.locator(f'[data-id="{listed[0]}"]').wait_for()
    held[0].continue_()
    page.locator(f'[data-id="{listed[2]}"]').wait_for()
    shown = page.locator(".video").evaluate_all("(rows) => rows.map((row) => row.dataset.id)")
    assert [one for one in shown if one in listed] == listed[::-1]


def test_two_videos_are_compared_in_step(page, server):
    both = [server.post("a", seed=seed, frames=32).json()["id"] for seed in (1, 2)]
    for one in both:
        server.until(one, "completed")
    opened(page, server)
    assert page.get_by_role("button", name="Compare two").is_disabled()
    for one in both:
        row_of(page, one).get_by_label("Compare").check()
    page.get_by_role("button", name="Compare two").click()
    assert page.evaluate("document.activeElement.id") == "compare-title"
    films = page.locator("#screens video")
    films.nth(1).wait_for()
    assert films.count() == 2
    ready = "() => [...document.querySelectorAll('#screens video')].every((film) => film.readyState >= 2)"
    try:
        page.wait_for_function(ready, timeout=10_000)
    except sync_api.TimeoutError:
        if page.get_by_text("This browser cannot play it").count():
            pytest.skip("this Chromium was built without H.264")
        raise
    page.get_by_role("button", name="Play", exact=True).click()
    page.wait_for_function(
        "() => [...document.querySelectorAll('#screens video')].every((film) => film.currentTime > 0.3)"
    )
    page.get_by_role("button", name="Pause").click()
    at = page.evaluate("[...document.querySelectorAll('#screens video')].map((film) => film.currentTime)")
    assert abs(at[0] - at[1]) < 0.2
    page.get_by_label("Position").fill("500")
    page.wait_for_function(
        "() => [...document.querySelectorAll('#screens video')].every((film) => film.currentTime == 1)"
    )
    page.get_by_role("button", name="Close").click()
    assert page.locator("#compare").is_hidden()


def test_a_server_with_a_token_asks_for_it(page, tmp_path):
    with serving(tmp_path, token=TOKEN) as server:
        page.goto(server.address)
        page.get_by_role("dialog").wait_for()
        page.get_by_role("dialog").get_by_label("Token").fill("a token that is another one")
        page.get_by_role("button", name="Go on").click()
        page.get_by_role("alert").get_by_text("does not take this token").wait_for()
        page.get_by_role("dialog").get_by_label("Token").fill(TOKEN)
        page.get_by_role("button", name="Go on").click()
        page.get_by_text("connected", exact=True).wait_for()
        identity = server.post("a").json()["id"]
        row_of(page, identity).get_by_text("Done").wait_for()
        row_of(page, identity).locator(".thumb img:not([hidden])").wait_for()
        assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 1, ""]


def test_every_control_has_a_name_and_nothing_is_wider_than_a_phone(page, server):
    for prompt in ("a", "it fails"):
        server.until(server.post(prompt).json()["id"], "completed", "failed")
    opened(page, server)
    page.get_by_role("button", name="Add a prompt").click()
    nameless = """() => [...document.querySelectorAll('button, input, select, textarea, progress, img, svg')]
      .filter((one) => one.checkVisibility() && !one.closest('[aria-hidden]'))
      .filter((one) => !(one.ariaLabel || one.getAttribute('aria-labelledby') || one.labels?.length || one.alt
        || one.getAttribute('alt') === '' || one.textContent.trim()))
      .map((one) => one.outerHTML)"""
    assert page.evaluate(nameless) == []
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map((one) => one.tagName)")
    assert levels[0] == "H1" and levels.count("H1") == 1
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_a_server_that_went_away_is_said_and_found_again(page, tmp_path):
    with serving(tmp_path) as server:
        opened(page, server)
        port = int(server.address.rsplit(":", 1)[1].strip("/"))
    page.get_by_text("not connected, trying again").wait_for()
    from flexkern.serve.server import Door

    with serving(tmp_path, door=Door(port=port)) as server:
        page.get_by_text("connected", exact=True).wait_for()
        server.post("a")
        page.locator(".video").wait_for()


LIGHTNESS = """([text, ground]) => {
  const shade = (colour) => {
    const parts = colour.match(/[\\d.]+/g).slice(0, 3).map((one) => one / 255)
      .map((one) => (one <= 0.03928 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4));
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  const probe = document.createElement('p');
  document.body.append(probe);
  const read = (name) => { probe.style.color = `var(${name})`; return getComputedStyle(probe).color; };
  const [a, b] = [shade(read(text)), shade(read(ground))];
  probe.remove();
  return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
}"""
PAIRS = [("--text", "--panel"), ("--quiet", "--panel"), ("--quiet", "--ground"), ("--quiet", "--sunk"),
         ("--on-accent", "--accent"), ("--bad", "--panel"), ("--bad", "--bad-ground"), ("--good", "--panel"),
         ("--busy", "--panel")]  # fmt: skip


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_their_ground(page, shared, scheme):
    """4.5 to 1, as WCAG 2.2 asks for at level AA."""
    page.emulate_media(color_scheme=scheme)
    page.goto(shared.address)
    faint = {pair: found for pair in PAIRS if (found := page.evaluate(LIGHTNESS, list(pair))) < 4.5}
    assert not faint
