"""The page of ``swin-hf demo``: what it draws, what it refuses, and the page itself, asked by a program and a browser.

What needs Gradio is asked of a real server in a process of its own, which notes every address that it speaks to.
"""

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import PATIENCE, TINY
from PIL import Image

from swin_hf import (
    SwinHFConfig,
    SwinHFForImageClassification,
    SwinHFForMaskedImageModeling,
    SwinHFForSemanticSegmentation,
    SwinV2HFConfig,
    SwinV2HFForImageClassification,
    attention_maps,
)
from swin_hf.demo import CYAN, Explorer, areas_of, draw_attention, draw_regions
from swin_hf.model.windows import cyclic_shift
from swin_hf.predict import PictureError, classify, read_picture
from swin_hf.processing import Preprocessing, decode_picture
from swin_hf.segment import segment
from swin_hf_cli import main

needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="gradio is not installed: pip install 'swin-hf[demo]'"
)
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
NAMES = dict(enumerate(("red", "green", "blue", "grey", "pink")))
SIZE = (32, 48)


def picture(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (96, 64)) -> str:
    noise = np.random.default_rng(0).normal(0, 40, (size[1], size[0], 3))
    Image.fromarray((noise + colour).clip(0, 255).astype("uint8")).save(path)
    return str(path)


def explorer(model) -> Explorer:
    return Explorer(model.eval(), Preprocessing(SIZE, None).processor())


def classifier(**changes) -> SwinHFForImageClassification:
    torch.manual_seed(0)
    return SwinHFForImageClassification(
        SwinHFConfig(**{**TINY, "id2label": NAMES, "initializer_range": 0.5, **changes})
    )


def segmenter() -> SwinHFForSemanticSegmentation:
    torch.manual_seed(0)
    return SwinHFForSemanticSegmentation(SwinHFConfig(**TINY, id2label=NAMES, initializer_range=0.5))


def second() -> SwinV2HFForImageClassification:
    torch.manual_seed(0)
    return SwinV2HFForImageClassification(SwinV2HFConfig(**TINY, id2label=NAMES))


@pytest.mark.parametrize("family", ["swin_hf", "swinv2_hf"])
@pytest.mark.parametrize("size", [(32, 48), (30, 46)], ids=["whole", "padded"])
def test_the_area_of_a_token_is_where_its_attention_is(size, family):
    """The cyan line is drawn from the geometry; the attention comes from the model."""
    model = second() if family == "swinv2_hf" else classifier(initializer_range=0.02)
    records = attention_maps(model.eval(), torch.randn(1, 3, *size))
    assert {record.geometry.is_shifted for record in records} == {True, False}
    for record in records:
        (height, width), shift = record.geometry.grid, record.geometry.shift
        areas = cyclic_shift(areas_of(record.geometry), (-shift[0], -shift[1]))[0, :height, :width, 0]
        for row, column in product(range(height), range(width)):
            attends = record.from_token(row, column)[0].amax(dim=0) > 1e-12
            assert torch.equal(attends, areas == areas[row, column])


def test_the_line_encloses_the_pixel_and_its_window():
    (record, *_) = attention_maps(classifier().eval(), torch.randn(1, 3, *SIZE))
    drawn = np.asarray(draw_attention(torch.rand(3, *SIZE), record, (9, 7), 480))
    assert drawn.shape == (320, 480, 3)  # ten times, a whole number
    rows, columns = (drawn == CYAN).all(-1).nonzero()
    # Windows of 4x3 tokens of 2 pixels: rows 8 to 15 and columns 6 to 11.
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (80, 159, 60, 119)


def test_the_regions_are_those_of_the_rolled_picture():
    records = attention_maps(classifier().eval(), torch.randn(1, 3, 30, 46))
    record = next(record for record in records if record.geometry.is_shifted)
    seen = torch.rand(3, 30, 46)
    drawn = draw_regions(seen, record, (0, 0), 1)
    (height, width), (rows, columns) = record.geometry.padded, record.cell
    assert drawn.size == (width * columns, height * rows)
    # Inside of a window of region 0, the picture is there untinted, moved up and left by the shift.
    moved = (record.geometry.shift[0] * rows, record.geometry.shift[1] * columns)
    expected = (seen[:, moved[0] + 2, moved[1] + 2] * 255).round()
    assert np.asarray(drawn)[2, 2].tolist() == expected.tolist()


def test_a_model_of_grey_pictures_has_a_page_too(tmp_path):
    asked = Explorer(classifier(num_channels=1).eval(), Preprocessing(SIZE, None, (0.5,), (0.5,)).processor())
    path = picture(tmp_path / "red.png", (200, 40, 40))
    assert sum(asked.answer(path).scores.values()) == pytest.approx(1) and asked.look(path).regions.mode == "RGB"


@pytest.mark.parametrize("build", [classifier, second], ids=["v1", "v2"])
def test_an_answer_is_that_of_predict(build, tmp_path):
    asked, path = explorer(build()), picture(tmp_path / "red.png", (200, 40, 40))
    answer = asked.answer(path)
    ((*guesses,),) = classify(asked.model, asked.processor, [read_picture(path)])
    assert answer.scores == {guess.label: guess.score for guess in guesses}
    assert re.match(r"read in \d+ ms, answered in \d+ ms on cpu; attention backend ", answer.words)
    assert answer.mask is None
    look = asked.look(path)
    assert "**Pixel** 16 24 of 32x48 is in token 8 12 of 16x24" in look.words
    assert look.attention.size == look.cam.size == (432, 288) and look.zoom == 9
    assert [caption for _, caption in look.blocks] == ["1.1", "2.1", "2.2 shifted", "3.1"]
    assert "windows of 4x3 tokens, shifted by 2 1 tokens" in asked.look(path, (3, 5), block=2, target="pink").words
    assert asked.look(path, target="pink").words.endswith("**Grad-CAM** for pink.")


def test_a_segmenter_shows_its_mask(tmp_path):
    asked, path = explorer(segmenter()), picture(tmp_path / "red.png", (200, 40, 40))
    answer = asked.answer(path)
    classes = segment(asked.model, asked.processor, read_picture(path))
    shares = {NAMES[number]: (classes == number).float().mean().item() for number in classes.unique().tolist()}
    assert answer.scores == pytest.approx(shares)
    assert answer.mask is not None and answer.mask.size[1] == 4 * 64
    assert "**Grad-CAM** for " in asked.look(path, (5, 40)).words


def test_names_that_are_missing_equal_or_foreign(tmp_path):
    path = picture(tmp_path / "red.png", (200, 40, 40))
    bare = explorer(classifier(id2label={index: f"LABEL_{index}" for index in range(5)})).answer(path)
    assert set(bare.scores) == {f"LABEL_{index}" for index in range(5)} and "numbers, and no names" in bare.words
    twice = explorer(classifier(id2label=dict(enumerate(["crane", "crane", "<b>a\nb</b>", "x", "y"]))))
    assert {"crane (0)", "crane (1)", "<b>a b</b>"} <= set(twice.answer(path).scores)
    assert "for &lt;b&gt;a b&lt;/b&gt;." in twice.look(path, target="<b>a b</b>").words
    regression = explorer(classifier(problem_type="regression")).answer(path)
    assert isinstance(regression.scores, str) and "pink: " in regression.scores


def test_what_is_no_picture_is_told_in_a_sentence(tmp_path):
    asked = explorer(classifier())
    (tmp_path / "notes.png").write_text("not a picture")
    with pytest.raises(PictureError, match=r"^notes.png: cannot be read: it is not a picture, or a damaged one"):
        asked.answer(str(tmp_path / "notes.png"))
    with pytest.raises(ValueError, match="'rde' is not a class of the model; choose a name"):
        asked.look(picture(tmp_path / "red.png", (200, 40, 40)), target="rde")
    with pytest.raises(ValueError, match=r"pixel \(32, 0\) is outside the 32x48 image"):
        asked.look(str(tmp_path / "red.png"), (32, 0))


@pytest.mark.parametrize("crop", [True, False], ids=["cropped", "whole"])
def test_a_picture_that_would_become_huge_is_refused(crop, tmp_path):
    asked = Explorer(classifier().eval(), Preprocessing((32, 32), 36, crop=crop).processor())
    Image.new("L", (9000, 4)).save(tmp_path / "line.png")
    with pytest.raises(PictureError, match="the picture has 9000x4 pixels; resized to a short side of 36"):
        asked.answer(str(tmp_path / "line.png"))
    Image.new("L", (900, 4)).save(tmp_path / "line.png")
    assert asked.answer(str(tmp_path / "line.png")).scores


def test_without_gradio_the_extra_is_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)  # what is not installed looks like this
    assert main(["demo", "no/model"]) == 2
    assert capsys.readouterr().err == "swin-hf demo: gradio is not installed; run: pip install 'swin-hf[demo]'\n"


def test_samples_that_do_not_exist_are_refused(capsys):
    assert main(["demo", "no/model", "--samples", "no/such.png"]) == 2
    assert "no/such.png: no such file or folder" in capsys.readouterr().err


SERVER = """
import sys
def note(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        host = args[1][0] if event == "socket.connect" and isinstance(args[1], tuple) else args[0]
        if isinstance(host, str) and host not in ("127.0.0.1", "localhost", "::1", "0.0.0.0"):
            print("contact", event, host, flush=True)
sys.addaudithook(note)
from swin_hf_cli import main
sys.exit(main(sys.argv[1:]))
"""


class Server:
    """``swin-hf demo`` in a process; ``lines`` is what it prints, also of addresses outside of this machine."""

    def __init__(self, *words: str, **environment: str) -> None:
        self.log = Path(words[0]).with_name("server.log")
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", SERVER, "demo", *words], stdout=log, stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            )  # fmt: skip
        self.url = self.wait_for(r"page: (http://127.0.0.1:\d+/)")

    def wait_for(self, pattern: str) -> str:
        for _ in range(10 * PATIENCE):
            if found := re.search(pattern, self.log.read_text()):
                return found.group(found.re.groups)
            if self.process.poll() is not None:
                break
            try:
                self.process.wait(0.1)
            except subprocess.TimeoutExpired:
                continue
        raise AssertionError(self.log.read_text())

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "model"
    classifier().save_pretrained(path)
    Preprocessing(SIZE, None).processor().save_pretrained(path)
    picture(path.with_name("red.png"), (200, 40, 40))
    picture(path.with_name("blue.png"), (40, 40, 200), (48, 96))
    return path


@pytest.fixture(scope="module")
def server(folder) -> Iterator[Server]:
    server = Server(
        str(folder), "--samples", str(folder.with_name("red.png")), "--open", PATH="", BROWSER="", DISPLAY=""
    )
    yield server
    server.stop()
    assert "contact" not in server.log.read_text(), "the page spoke to another machine"


@pytest.fixture
def client(server):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
        from gradio_client import Client

        yield Client(server.url, verbose=False)


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:(gradio_client|httpx|websockets|starlette).*")


@needs_gradio
def test_a_page_without_a_browser_says_so(server):
    assert server.wait_for("(there is no browser here; open the address in one)")


@needs_gradio
def test_a_program_asks_as_a_person_does(client, folder):
    from gradio_client import handle_file

    assert set(client.view_api(return_format="dict")["named_endpoints"]) == {"/answer", "/look"}
    scores, words, _ = client.predict(handle_file(folder.with_name("red.png")), api_name="/answer")
    own = Explorer(*load(folder)).answer(str(folder.with_name("red.png"))).scores
    assert {row["label"]: row["confidence"] for row in scores["confidences"]} == pytest.approx(own)
    assert "attention backend" in words
    attention, regions, cam, blocks, words = client.predict(
        handle_file(folder.with_name("red.png")), "stage 2, block 2", 3, 5, "pink", api_name="/look"
    )
    assert "shifted by 2 1 tokens. **Pixel** 3 5 of 32x48 is in token 0 1 of 8x12. **Grad-CAM** for pink." in words
    assert [decode_picture(path).size for path in (attention, regions, cam)] == [(432, 288)] * 3
    assert [row["caption"] for row in blocks] == ["1.1", "2.1", "2.2 shifted", "3.1"]


def load(folder):
    from swin_hf.predict import load_classifier

    return load_classifier(str(folder))


@needs_gradio
def test_two_visitors_at_once_get_their_own_answers(server, folder):
    from gradio_client import Client, handle_file

    asked = Explorer(*load(folder))
    paths = [folder.with_name(name) for name in ("red.png", "blue.png")]

    def visit(path: Path) -> list[dict[str, float]]:
        visitor = Client(server.url, verbose=False)
        answers = [visitor.predict(handle_file(path), api_name="/answer")[0]["confidences"] for _ in range(4)]
        return [{row["label"]: row["confidence"] for row in answer} for answer in answers]

    with ThreadPoolExecutor() as pool:
        for path, answers in zip(paths, pool.map(visit, paths), strict=True):
            own = asked.answer(str(path)).scores
            assert all(answer == pytest.approx(own) for answer in answers)
    assert asked.answer(str(paths[0])).scores != pytest.approx(asked.answer(str(paths[1])).scores)


@needs_gradio
def test_bad_pictures_are_answered_in_one_sentence(client, tmp_path):
    from gradio_client import handle_file

    (tmp_path / "notes.png").write_text("not a picture")
    with pytest.raises(Exception, match=r"^notes.png: cannot be read: it is not a picture, or a damaged one; open it"):
        client.predict(handle_file(tmp_path / "notes.png"), api_name="/answer")
    Image.new("1", (10_000, 10_000)).save(tmp_path / "large.png")
    with pytest.raises(Exception, match=r"^large.png: cannot be read: it has 100000000 pixels and Pillow reads at"):
        client.predict(handle_file(tmp_path / "large.png"), api_name="/look")
    with pytest.raises(Exception, match=r"^there is no picture; upload one, or choose a sample$"):
        client.predict(None, api_name="/answer")


@needs_gradio
def test_the_page_is_on_the_loopback_only(server):
    port = int(server.url.rstrip("/").rpartition(":")[2])
    assert urllib.request.urlopen(server.url).status == 200
    # All of 127.0.0.0/8 is this machine: a server on every address answers at 127.0.0.2 too.
    with socket.socket() as other, pytest.raises(ConnectionRefusedError):
        other.connect(("127.0.0.2", port))


@needs_gradio
@pytest.mark.slow
def test_a_port_in_use_and_a_model_without_classes_end_in_one_sentence(server, folder, tmp_path):
    def said(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", SERVER, "demo", *words], capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.returncode == 2
        return done.stderr.splitlines()[-1]

    port = server.url.rstrip("/").rpartition(":")[2]
    assert said(str(folder), "--port", port) == f"swin-hf demo: port {port} is in use; choose another with --port N"
    SwinHFForMaskedImageModeling(SwinHFConfig(**TINY)).save_pretrained(tmp_path)
    assert "has no classes; fine-tune it first: swin-hf train" in said(str(tmp_path))


@needs_gradio
@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium: apt install chromium")
def test_a_person_uploads_a_picture_and_clicks_into_it(server, folder, tmp_path):
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    foreign, patience = [], 1000 * PATIENCE
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1400})
        page.set_default_timeout(patience)
        page.on("request", lambda request: foreign.append(request.url) if not is_local(request.url) else None)
        page.goto(server.url)
        page.get_by_text("answered in").wait_for()
        page.get_by_text("Pixel 16 24 of 32x48").wait_for()  # of the first sample

        def click_pixel(row: int, column: int) -> None:
            view = page.locator(".view img").first
            box = view.bounding_box()
            view.click(position={"x": box["width"] * (column + 0.5) / 48, "y": box["height"] * (row + 0.5) / 32})
            page.get_by_text(f"Pixel {row} {column} of 32x48").wait_for()

        click_pixel(9, 30)
        page.locator("input[type=file]").first.set_input_files(folder.with_name("blue.png"))
        page.get_by_text("Pixel 16 24 of 32x48").wait_for()  # a new picture begins in the middle
        scores = Explorer(*load(folder)).answer(str(folder.with_name("blue.png"))).scores
        for label, score in scores.items():
            page.get_by_role("button", name=re.compile(f"{label}.*{score:.0%}", re.DOTALL)).wait_for()
        click_pixel(3, 5)
        assert page.get_by_label("row of the pixel").input_value() == "3"

        page.get_by_text("2.2 shifted").click()
        page.get_by_text("shifted by 2 1 tokens").wait_for()
        page.get_by_role("button", name=re.compile("pink")).click()
        page.get_by_text("for pink.").wait_for()
        page.screenshot(path=tmp_path / "page.png", full_page=True)

        (tmp_path / "notes.png").write_text("not a picture")
        page.locator("input[type=file]").first.set_input_files(tmp_path / "notes.png")
        page.get_by_text("notes.png: cannot be read: it is not a picture").first.wait_for()
        page.get_by_text("answered in").wait_for(state="hidden")
        page.get_by_text("is in token").wait_for(state="hidden")  # nothing of the last picture stays
        browser.close()
    assert not foreign, f"the page asks other machines: {foreign}"


def is_local(url: str) -> bool:
    return url.startswith(("http://127.0.0.1", "data:", "blob:"))
