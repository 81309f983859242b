"""A web page that classifies pictures and shows, at a click into them, what the windows of the model attend to.

:class:`Explorer` computes what the page shows, :func:`serve` starts the page on this machine. Gradio (the extra
``demo``) is imported where it is used.

Shape legend:
    h and w height and width in pixels of what the model sees, H and W of a map in tokens.
"""

import html
import os
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple, TypeVar

import matplotlib
import pyarrow.parquet
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor
from transformers import BaseImageProcessor

from swin_hf.explain import BlockAttention, as_seen, attention_maps, enlarge, grad_cam, heat_over
from swin_hf.memory import memory_sentence
from swin_hf.model.attention import backend_report
from swin_hf.model.windows import Pair, WindowGeometry, cyclic_shift, region_map, window_reverse
from swin_hf.predict import (
    DOWNLOAD_BYTES,
    PictureError,
    check_drawable,
    class_names,
    class_number,
    classify,
    has_names,
    load_classifier,
    prepare,
    read_picture,
)
from swin_hf.processing import Preprocessing, decode_picture
from swin_hf.segment import class_at, class_shares, colour, draw_overlay, is_segmenter, segment
from swin_hf.text import one_line

Result = TypeVar("Result")

LOOPBACK = "127.0.0.1"
TOP = 5  # classes shown
VIEW, THUMBNAIL = 448, 224  # pixels of the longer side of a large and a small picture, or less: factors are whole
MASK_SIDE = 1024  # pixels; a larger picture is shrunk before its mask is drawn
MOST_PIXELS = 2**21  # of a picture after resizing its short side for the model: a long and narrow one becomes huge
CYAN, WHITE, RED = (0, 229, 255), (255, 255, 255), (255, 64, 64)
DIGITS = Path(__file__).parent / "training" / "configs" / "digits" / "test.parquet"
CSS = """
img {image-rendering: pixelated}
.picture img {width: 100%; height: 100%; object-fit: contain}
.fixed-height {min-height: 0 !important}
footer .divider {display: none}
"""
VIEWS = {
    "attention": "**Attention from the pixel; click to choose it.** Brighter is more (mean of the heads). Lines are "
    "the windows of the block; the token attends to nothing outside of the cyan line. The red arrow is the shift.",
    "regions": "**The map as the block cuts it**: padded, and rolled up and left by the shift. The mask lets a token "
    "attend to the tokens of its own window *and* region; regions have numbers and colours.",
    "grad-cam": "**Grad-CAM**: what raises the score of the class, at the last stage.",
}


class Answer(NamedTuple):
    """The classes of a picture."""

    scores: dict[str, float] | str  # of the most probable classes; a text for a regression
    words: str  # speed and attention backend
    mask: Image.Image | None  # of a segmenter: its classes in colours over the picture, with a legend


class Look(NamedTuple):
    """Drawings of what one block does at one pixel."""

    attention: Image.Image
    regions: Image.Image
    cam: Image.Image
    blocks: list[tuple[Image.Image, str]]  # attention in every block, small, and its caption
    words: str
    zoom: int  # pixels of the large pictures for one that the model sees


class Explorer:
    """Answers the questions of the page with a classifier or a segmenter; it stores nothing of a question."""

    def __init__(self, model: Any, processor: BaseImageProcessor) -> None:
        check_drawable(model)
        self.model, self.processor = model, processor
        self.resizes = Preprocessing.from_values(processor.to_dict())
        depths = enumerate(model.config.depths, start=1)
        self.blocks = [f"stage {stage}, block {block + 1}" for stage, depth in depths for block in range(depth)]
        names = [one_line(name, 60) for name in class_names(model)]
        count = Counter(names)
        self.names = [f"{name} ({index})" if count[name] > 1 else name for index, name in enumerate(names)]

    def answer(self, path: str) -> Answer:
        """Classify a picture; PictureError if it cannot be read or is too large."""
        begin = perf_counter()
        picture, _ = self._read(path)
        middle, mask = perf_counter(), None
        if is_segmenter(self.model):
            picture.thumbnail((MASK_SIDE, MASK_SIDE))
            classes = segment(self.model, self.processor, picture)
            guesses = class_shares(classes, self.names, TOP)
        else:
            (guesses,) = classify(self.model, self.processor, [picture], top_k=TOP)
        end = perf_counter()
        if is_segmenter(self.model):
            zoom = _zoom(picture.size, VIEW)
            large = picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)
            mask = draw_overlay(large, _repeat(classes, zoom), self.names)
        scores: dict[str, float] | str = {self.names[guess.index]: guess.score for guess in guesses}
        if self.model.config.problem_type == "regression":
            scores = ", ".join(f"{self.names[guess.index]}: {guess.score:.4g}" for guess in guesses)
        speed = f"read in {1000 * (middle - begin):.0f} ms, answered in {1000 * (end - middle):.0f} ms"
        unnamed = "" if has_names(self.model) else "\n\nThe classes of this model have numbers, and no names."
        return Answer(scores, f"{speed} on {self.model.device}; {backend_report(self.model)}{unnamed}", mask)

    def look(
        self, path: str, pixel: tuple[int | None, int | None] = (None, None), block: int = 0, target: str = ""
    ) -> Look:
        """Draw what a block does at a pixel.

        Args:
            path: The picture.
            pixel: Row and column of what the model sees; the middle where they are None.
            block: Position in :attr:`blocks`.
            target: Name of the class of Grad-CAM; the most probable one if empty.

        Raises:
            PictureError: If it cannot be read or is too large.
            ValueError: If there is no such pixel or class.
        """
        _, pixels = self._read(path)
        row, column = (side // 2 if at is None else at for at, side in zip(pixel, pixels.shape[-2:], strict=True))
        records = attention_maps(self.model, pixels[None])
        seen, zoom = as_seen(pixels, self.processor).clamp(0, 1).expand(3, -1, -1), _zoom(pixels.shape[-2:], VIEW)
        small = []
        for record in records:
            caption = f"{record.stage + 1}.{record.block + 1}{' shifted' if record.geometry.is_shifted else ''}"
            small.append((draw_attention(seen, record, (row, column), THUMBNAIL), caption))
        shown, geometry = records[block], records[block].geometry
        place = (row, column) if is_segmenter(self.model) else None
        target = target.strip()
        index = class_number(target, self.names) if target else class_at(self.model, pixels, place).index
        cam = grad_cam(self.model, pixels[None], index, pixel=place)[0]
        size = "x".join(map(str, geometry.window))
        shift = f"shifted by {geometry.shift[0]} {geometry.shift[1]} tokens" if geometry.is_shifted else "not shifted"
        return Look(
            draw_attention(seen, shown, (row, column), VIEW),
            draw_regions(seen, shown, (row, column), VIEW),
            _picture(_repeat(heat_over(seen, cam.cpu(), 1.0), zoom)),
            small,
            f"**{self.blocks[block]}**: windows of {size} tokens, {shift}. **Pixel** {row} {column} of "
            f"{shown.image[0]}x{shown.image[1]} is in token {row // shown.cell[0]} {column // shown.cell[1]} of "
            f"{geometry.grid[0]}x{geometry.grid[1]}. **Grad-CAM** for {html.escape(self.names[index])}.",
            zoom,
        )

    def _read(self, path: str) -> tuple[Image.Image, Tensor]:
        """A picture, and the input of the model made of it, ``(channels, h, w)``."""
        try:
            picture = read_picture(path, self.model.config.num_channels, self.processor)
        except PictureError as error:
            raise PictureError(
                str(error).replace(path, Path(path).name)
            ) from None  # visitors do not see this machine's folders
        narrow, long = sorted(picture.size)
        short = narrow if self.resizes is None else self.resizes.short_side or 0  # 0: squashed to the model's size
        if short * short * long > MOST_PIXELS * narrow:
            raise PictureError(
                f"the picture has {picture.width}x{picture.height} pixels; resized to a short side of {short}, as the "
                f"model needs it, it would have more than {MOST_PIXELS}; crop it"
            )
        (pixels,) = prepare(self.model, self.processor, [picture])
        return picture, pixels


def draw_attention(seen: Tensor, record: BlockAttention, pixel: Pair, side: int) -> Image.Image:
    """Draw the attention of a pixel's token over the picture, with the windows, the token's area, and the shift.

    ``seen`` is what the model sees, ``(3, h, w)`` in [0, 1]; ``pixel`` is a row and a column of it. Every pixel becomes
    a square of the largest size with which the longer side is at most ``side``.
    """
    geometry, zoom = record.geometry, _zoom(record.image, side)
    heat = record.to_image(record.from_pixel(*pixel).mean(dim=1))[0].cpu()
    areas = cyclic_shift(areas_of(geometry), (-geometry.shift[0], -geometry.shift[1]))
    areas = areas[0, : geometry.grid[0], : geometry.grid[1], 0]
    picture = _draw(heat_over(seen, heat), enlarge(areas, record.cell, record.image, smooth=False), pixel, zoom)
    if geometry.is_shifted:
        y, x = (tokens * cell * zoom for tokens, cell in zip(geometry.shift, record.cell, strict=True))
        draw = ImageDraw.Draw(picture)
        draw.line(((0, 0), (x, y)), RED, 3)
        draw.circle((x, y), 5, RED)
    return picture


def draw_regions(seen: Tensor, record: BlockAttention, pixel: Pair, side: int) -> Image.Image:
    """Draw the padded, shifted picture with its windows and regions; arguments are those of :func:`draw_attention`."""
    geometry, cell, zoom = record.geometry, record.cell, _zoom(record.image, side)
    padded = (geometry.padded[0] * cell[0], geometry.padded[1] * cell[1])
    moves = (geometry.shift[0] * cell[0], geometry.shift[1] * cell[1])
    canvas = F.pad(seen, (0, padded[1] - seen.shape[2], 0, padded[0] - seen.shape[1]), value=0.5)
    canvas = canvas.roll((-moves[0], -moves[1]), (1, 2))
    regions = region_map(geometry.padded, geometry.window, geometry.shift)
    tints = torch.tensor([colour(number) for number in range(9)])[regions].permute(2, 0, 1) / 255
    tints = enlarge(tints, cell, padded, smooth=False)
    canvas = torch.where(enlarge(regions.float(), cell, padded, smooth=False) > 0, (canvas + tints) / 2, canvas)
    areas = enlarge(areas_of(geometry)[0, ..., 0], cell, padded, smooth=False)
    picture = _draw(canvas, areas, ((pixel[0] - moves[0]) % padded[0], (pixel[1] - moves[1]) % padded[1]), zoom)
    for number in regions.unique().tolist() if geometry.is_shifted else []:
        row, column = (regions == number).nonzero()[0].tolist()  # in a corner of the region, where the pixel seldom is
        place = (column * cell[1] * zoom + 8, row * cell[0] * zoom + 8)
        style: dict[str, Any] = {"anchor": "lt", "font_size": 24, "stroke_width": 3, "stroke_fill": "black"}
        ImageDraw.Draw(picture).text(place, str(number), WHITE, **style)
    return picture


def areas_of(geometry: WindowGeometry) -> Tensor:
    """A number for each window and region of a shifted map, ``(1, H, W, 1)`` float: a token attends to its area."""
    count = geometry.num_windows[0] * geometry.num_windows[1]
    windows = torch.arange(count).view(-1, 1, 1).expand(-1, geometry.area, 1)
    regions = region_map(geometry.padded, geometry.window, geometry.shift)[None, :, :, None]
    return (window_reverse(windows, geometry.window, geometry.padded) * 9 + regions).float()


def _draw(canvas: Tensor, areas: Tensor, pixel: Pair, zoom: int) -> Image.Image:
    """A canvas ``(3, h, w)`` in large, with lines between areas ``(h, w)``, the area of the pixel, and the pixel."""
    canvas, areas = _repeat(canvas, zoom), _repeat(areas, zoom)
    row, column = (at * zoom + zoom // 2 for at in pixel)
    lines = F.pad(areas[1:] != areas[:-1], (0, 0, 1, 0)) | F.pad(areas[:, 1:] != areas[:, :-1], (1, 0))
    own = areas == areas[row, column]
    outline = own & (F.avg_pool2d(own[None].float(), 7, 1, 3)[0] < 1)  # three pixels wide, also at the edge of the map
    for where, line in ((lines, WHITE), (outline, CYAN)):
        canvas = torch.where(where, torch.tensor(line).view(3, 1, 1) / 255, canvas)
    picture = _picture(canvas)
    draw = ImageDraw.Draw(picture)
    draw.line((column - 8, row, column + 8, row), CYAN, 3)
    draw.line((column, row - 8, column, row + 8), CYAN, 3)
    return picture


def _picture(canvas: Tensor) -> Image.Image:
    return Image.fromarray((canvas * 255).round().byte().permute(1, 2, 0).numpy())


def _repeat(maps: Tensor, zoom: int) -> Tensor:
    return maps.repeat_interleave(zoom, -1).repeat_interleave(zoom, -2)


def _zoom(size: Sequence[int], side: int) -> int:
    return max(1, side // max(size))


def own_samples(model: Any) -> list[Any]:
    """Pictures to begin with: a photograph from matplotlib and handwritten digits of this package."""
    photograph = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    photographs = [str(photograph)] if photograph.is_file() else []
    digits = [decode_picture(cell) for cell in pyarrow.parquet.read_table(DIGITS)["image"][:5].to_pylist()]
    return [*digits, *photographs] if max(model.config.image_hw) < 64 else [*photographs, *digits]


def page(explorer: Explorer, title: str, samples: Sequence[Any]) -> Any:
    """The page of a model, a ``gradio.Blocks`` that is not served yet; it begins with the first of the samples."""
    import gradio as gr

    answer, look = _questions(explorer)

    def clicked_pixel(zoom: int, event: gr.SelectData) -> list[int]:
        return [at // zoom for at in reversed(event.index)]

    def clicked_class(event: gr.SelectData) -> str:
        return str(event.value)

    def clicked_block(event: gr.SelectData) -> str:
        return str(explorer.blocks[event.index])

    with gr.Blocks(title=f"{title} - swin_hf", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gr.Markdown(f"# {html.escape(title)}")
        picture, answers = _place_answers(samples, is_segmenter(explorer.model))
        choices, views = _place_views(explorer.blocks)
        (block, *place), target = choices[:3], choices[3]
        zoom = gr.State(1)

        queue: dict[str, Any] = {"concurrency_id": "model"}  # one question at a time: visitors wait for each other
        private: dict[str, Any] = {"api_visibility": "private"}
        asked = {"inputs": [picture, *choices], "outputs": [*views, zoom]}
        again = {"fn": look, **asked, **queue, **private}
        stale = [*place, target, *answers, *views]  # cleared first, in case the next picture cannot be read
        gr.on([picture.change, blocks.load], lambda: [None] * len(stale), None, stale, **private).then(
            answer, picture, answers, api_name="answer", **queue
        ).then(look, **asked, api_name="look", **queue)
        gr.on([block.input, *(choice.submit for choice in (*place, target))], **again)
        views[0].select(clicked_pixel, zoom, place, **private).then(**again)
        answers[0].select(clicked_class, None, target, **private).then(**again)
        views[3].select(clicked_block, None, block, **private).then(**again)
    return blocks


def _questions(explorer: Explorer) -> tuple[Callable[..., Answer], Callable[..., Look]]:
    """The two functions of the page and of its API; what fails is shown as a sentence."""
    import gradio as gr

    def told(question: Callable[[str], Result], picture: str | None) -> Result:
        try:
            if picture is None:
                raise PictureError("there is no picture; upload one, or choose a sample")
            return question(picture)
        except (OSError, ValueError, RuntimeError, MemoryError) as error:
            sentence = html.escape(memory_sentence(error) or str(error), quote=False)
            raise gr.Error(sentence, print_exception=False) from error

    def answer(picture: str | None) -> Answer:
        """What the model says of a picture: its classes, the time and the attention backend, a segmenter's mask."""
        return told(explorer.answer, picture)

    def look(
        picture: str | None, block: int, row: int | None = None, column: int | None = None, target: str | None = None
    ) -> Look:
        """What a block attends to from a pixel: row and column of the picture that the model sees, or its middle."""
        return told(lambda path: explorer.look(path, (row, column), block, target or ""), picture)

    return answer, look


def _place_answers(samples: Sequence[Any], has_mask: bool) -> tuple[Any, list[Any]]:
    """Put the picture and the fields of :class:`Answer` on the page that is being made; they are returned."""
    import gradio as gr

    def path_of(data: Any) -> str | None:
        return None if data is None else str(data.path)

    with gr.Row():
        with gr.Column():
            picture = gr.Image(
                samples[0], type="filepath", image_mode=None, sources=["upload", "clipboard"], label="picture",
                height=320, elem_classes="picture",
            )  # fmt: skip
            picture.preprocess = path_of  # type: ignore[method-assign, assignment]  # read_picture() opens it
            gr.Examples([[sample] for sample in samples], picture, label="samples")
        with gr.Column():
            scores = gr.Label(num_top_classes=TOP, label="classes; click one for its Grad-CAM")
            speed = gr.Markdown(label="speed")
    return picture, [scores, speed, gr.Image(label="classes of the pixels", visible=has_mask, format="png", buttons=[])]


def _place_views(blocks: Sequence[str]) -> tuple[list[Any], list[Any]]:
    """Put the choices (block, row, column, class) and the fields of :class:`Look` on the page; they are returned."""
    import gradio as gr

    views: list[Any] = []
    shown: dict[str, Any] = {"format": "png", "buttons": []}
    with gr.Row():
        block = gr.Dropdown(blocks, value=blocks[min(1, len(blocks) - 1)], type="index", label="block", min_width=240)
        place = [
            gr.Number(label=f"{name} of the pixel", precision=0, placeholder="the middle") for name in ("row", "column")
        ]
        target = gr.Textbox(label="class of Grad-CAM", placeholder="the most probable one")
    words = gr.Markdown(label="words")
    with gr.Row():
        for name, caption in VIEWS.items():
            with gr.Column(min_width=240):
                views.append(gr.Image(label=name, show_label=False, interactive=False, elem_classes="view", **shown))
                gr.Markdown(caption)
    gr.Markdown("Attention from the pixel in every block, stage.block; click one.")
    every = gr.Gallery(label="blocks", show_label=False, columns=6, object_fit="contain", allow_preview=False, **shown)
    return [block, *place, target], [*views, every, words]


def serve(
    source: str,
    *,
    host: str | None = LOOPBACK,
    port: int | None = None,
    share: bool = False,
    samples: Sequence[Any] = (),
    device: str = "auto",
    dtype: str = "auto",
) -> Any:
    """Load a model and serve its page in threads of this process.

    Args:
        source: Any model, see :mod:`swin_hf.loading`.
        host: Address to listen on; None takes GRADIO_SERVER_NAME, as in a Space, else the loopback.
        port: The first free one from 7860 on if not given.
        share: Whether Gradio makes a public address, through its servers.
        samples: Paths of pictures to choose from; by default a photograph and digits.
        device: See :func:`swin_hf.predict.load_classifier`.
        dtype: See there.

    Returns:
        The ``gradio.Blocks``, with ``local_url`` and ``share_url``; ``block_thread()`` waits until it is interrupted.

    Raises:
        ImportError: If gradio is not installed.
        OSError: If the port is in use, or a file of the model is missing.
        ValueError: If the model cannot be loaded or takes pictures of other than 1 or 3 channels.
    """
    if find_spec("gradio") is None:
        raise ImportError("gradio is not installed; run: pip install 'swin-hf[demo]'")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    model, processor = load_classifier(source, device=device, dtype=dtype)
    blocks = page(Explorer(model, processor), one_line(source.partition("@")[0]), samples or own_samples(model))
    # Pillow's warning of too many pixels becomes an error, which is raised before the picture is decoded.
    warnings.simplefilter("error", Image.DecompressionBombWarning)
    from gradio.themes import Default

    try:
        blocks.launch(
            server_name=host,
            server_port=port,
            share=share,
            show_error=True,
            quiet=True,
            prevent_thread_lock=True,
            ssr_mode=False,
            max_file_size=DOWNLOAD_BYTES,
            footer_links=["api"],
            css=CSS,
            theme=Default(font=["sans-serif"], font_mono=["monospace"]),  # Gradio's own fonts come from Google
        )
    except OSError as error:
        raise OSError(f"port {port or 'from 7860 to 7959'} is in use; choose another with --port N") from error
    return blocks
