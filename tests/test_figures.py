"""The lesson in docs/: its figures draw what the model computes, its code runs, its two languages say the same."""

import importlib.util
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from swin_hf import SwinHFConfig, SwinHFForImageClassification
from swin_hf.model import attention, modeling_swin_hf, windows

DOCS = Path(__file__).parents[1] / "docs"
spec = importlib.util.spec_from_file_location("docs_figures", DOCS / "figures.py")
lesson_figures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(lesson_figures)
FIGURES = DOCS / "figures"
LESSONS = [DOCS / "swin.md", DOCS / "swin.zh-CN.md"]
# Of a trained model, not of the architecture: a picture, and what `swin-hf explain` draws of it.
EXAMPLES = {"three.png", "prediction.png"}
DRAWN = {f"{name}.png" for name in [*lesson_figures.FIGURES, "attention_cost"]}


def checked_in(name):
    return json.loads((FIGURES / name).read_text())


def test_figures_show_what_the_model_computes_today():
    data, drawn = lesson_figures.figure_data(), checked_in("figures.json")
    outdated = [name for name in data if data[name] != drawn.get(name)]
    assert not outdated, "run `make figures` and look at the pictures"


def test_no_figure_is_forgotten():
    assert set(checked_in("figures.json")) == set(lesson_figures.FIGURES)
    assert {path.name for path in FIGURES.glob("*.png")} - EXAMPLES == DRAWN
    assert {path.name for path in (FIGURES / "zh-CN").iterdir()} == DRAWN
    assert max(path.stat().st_size for path in FIGURES.rglob("*.*")) < 200_000


GEOMETRY = [
    "window_geometry",
    "pad_to_windows",
    "cyclic_shift",
    "gather_neighbours",
    "window_partition",
    "window_reverse",
    "region_map",
    "shift_mask",
    "relative_coordinates",
    "relative_position_index",
]


def test_model_runs_the_functions_that_the_figures_draw(monkeypatch):
    """Replaced wherever they are imported, they are called by a forward pass, and the model uses what they return."""
    called = set()

    def spy_on(name):
        original = getattr(windows, name)

        def spy(*args, **kwargs):
            called.add(name)
            return original(*args, **kwargs)

        for module in (windows, attention, modeling_swin_hf):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, spy)

    for name in GEOMETRY:
        assert getattr(lesson_figures, name) is getattr(windows, name)
        spy_on(name)
    sizes = {"image_size": (37, 41), "patch_size": 1, "embed_dim": 8, "depths": (2, 1), "num_heads": (2, 2)}
    model = SwinHFForImageClassification(SwinHFConfig(**sizes, window_size=(5, 4))).eval()
    assert not called
    attention.clear_caches()  # index and mask are computed once for a size
    with torch.no_grad():
        model(torch.randn(1, 3, 37, 41))
    assert called == set(GEOMETRY)
    attention.clear_caches()


def test_patch_merging_of_the_lesson_is_the_references():
    """Microsoft's PatchMerging, written down: four slices, concatenated."""
    x = torch.arange(16).view(4, 4)
    slices = [x[0::2, 0::2], x[1::2, 0::2], x[0::2, 1::2], x[1::2, 1::2]]
    data = lesson_figures.patch_merging_data()
    assert data["slices"] == [part.tolist() for part in slices]
    assert data["after"] == torch.stack(slices, dim=-1).flatten(0, 1).tolist()


def test_patch_partition_of_the_lesson_is_the_convolution_of_the_model():
    """A convolution with stride is the linear embedding of the rows that the figure shows."""
    config = SwinHFConfig(image_size=8, patch_size=4, num_channels=1, embed_dim=6, depths=(1,), num_heads=(1,))
    embeddings = modeling_swin_hf.SwinHFEmbeddings(config)
    embeddings.norm = nn.Identity()
    data = lesson_figures.patch_partition_data()
    pixels, patches = torch.tensor(data["pixels"]).float(), torch.tensor(data["patches"]).float()
    convolution = embeddings.patch_embeddings
    linear = patches @ convolution.weight.flatten(1).T + convolution.bias
    torch.testing.assert_close(embeddings(pixels[None, None]).flatten(0, 2), linear)


def test_shapes_of_the_architecture_are_those_of_the_papers_table():
    """Table 7 of the paper: Swin-T on 224x224."""
    parts = lesson_figures.architecture_data()["parts"]
    stages = [part for part in parts if part["part"] == "stage"]
    assert [stage["shape"] for stage in stages] == [[56 >> n, 56 >> n, 96 << n] for n in range(4)]
    assert [(stage["blocks"], stage["heads"], stage["window"]) for stage in stages] == [
        (2, 3, 7), (2, 6, 7), (6, 12, 7), (2, 24, 7)
    ]  # fmt: skip
    entries = [part["shape"] for part in parts if part["part"] in ("embedding", "merging")]
    assert entries == [stage["shape"] for stage in stages] and parts[-1]["shape"] == [1000]


def test_norms_come_first_in_v1_and_last_in_v2():
    """Equation 3 of the paper of V1, figure 1 of that of V2."""
    first, second = lesson_figures.block_pair_data()["blocks"]
    assert first["steps"] == second["steps"] == ["norm1", "attention", "norm2", "mlp"]
    assert (first["shift"], second["shift"]) == ([0, 0], [3, 3])
    assert first["windows"] == [(56 // 7) ** 2, 7 * 7, 96] and first["scores"] == [64, 3, 49, 49]
    for block in lesson_figures.block_v2_data()["blocks"]:
        assert block["steps"] == ["attention", "norm1", "mlp", "norm2"]


def test_windows_save_what_the_formulas_say_and_no_weights():
    data = lesson_figures.model_cost_data()
    saved = data["whole GMACs"][1] - data["windows GMACs"][1]  # at 224 pixels, where nothing is padded
    stages = zip((56, 28, 14, 7), (96, 192, 384, 768), (2, 2, 6, 2), strict=True)
    formulas = sum(2 * (side**2 - 49) * side**2 * channels * blocks for side, channels, blocks in stages)
    assert saved == pytest.approx(formulas / 1e9, abs=0.011)  # both numbers are rounded to two digits
    assert data["windows weights"] == data["whole weights"]
    assert data["windows tables"][0] == 13 * 13 * (2 * 3 + 2 * 6 + 6 * 12 + 2 * 24)
    assert data["windows tables"][0] + data["windows weights"][0] == 28_288_354  # Swin-T, as timm counts it


def test_padding_of_the_lesson_is_numpys():
    data = lesson_figures.padding_data()
    tokens = np.arange(1, 36).reshape(5, 7)
    padded = np.pad(tokens, ((0, 3), (0, 1)))
    assert data["padded"] == padded.tolist() and data["even"] == np.pad(tokens, ((0, 1), (0, 1))).tolist()
    assert data["shifted"] == np.roll(padded, (-2, -2), (0, 1)).tolist()


def test_bias_of_the_lesson_is_that_of_the_worked_table():
    data = lesson_figures.bias_lookup_data()
    coordinates = [(row, column) for row in range(2) for column in range(2)]
    for query, (row, column) in enumerate(coordinates):
        for key, (to_row, to_column) in enumerate(coordinates):
            index = (row - to_row + 1) * 3 + (column - to_column + 1)
            assert data["index"][query][key] == index
            assert data["bias"][query][key] == data["table"][index]
            assert lesson_figures.relative_rows_data()["rows"][query][key] == [row - to_row, column - to_column]


def test_logarithmic_offsets_are_those_of_the_reference():
    """Microsoft's: sign(x) log2(1 + 8 |x|) / log2(8), x in units of the trained window."""
    data = lesson_figures.log_offsets_data()
    x = np.arange(-15, 16) / 7
    assert data["logarithmic"] == pytest.approx(np.sign(x) * np.log2(1 + 8 * abs(x)) / 3, abs=1e-4)
    assert data["linear"] == pytest.approx(x, abs=1e-4)


def test_regions_are_those_of_the_papers_figure():
    data = lesson_figures.cyclic_shift_data()
    assert data["regions of each window"] == [[4], [3, 5], [1, 7], [0, 2, 6, 8]]
    sides = [0, 0, 1, 1, 1, 1, 2, 2]
    assert data["before"] == [[3 * row + column for column in sides] for row in sides]
    before = torch.tensor(data["before"])
    assert data["rows moved"] == before.roll(-2, 0).tolist() == data["columns moved back"]
    assert data["after"] == before.roll((-2, -2), (0, 1)).tolist()
    assert data["back"] == data["before"]


def test_mask_leaves_nothing_across_the_seam():
    data = lesson_figures.shift_mask_data()
    allowed = [value == 0 for value in data["mask"][data["window"]][data["token"]]]
    assert allowed == [True, True, False, False] * 4
    assert all((probability > 0) == here for probability, here in zip(data["with mask"], allowed, strict=True))
    assert sum(data["with mask"]) == pytest.approx(1, abs=1e-3)  # rounded to 4 digits each


def test_three_steps_lead_to_one_index_and_the_sum_alone_does_not():
    data = lesson_figures.relative_position_data()
    offsets = [tuple(pair) for row in data["relative"] for pair in row]
    index = [value for row in data["step 3"] for value in row]
    sums = [value for row in data["row + column"] for value in row]
    assert offsets == [(a - c, b - d) for a, b in data["absolute"] for c, d in data["absolute"]]
    assert len(set(zip(offsets, index, strict=True))) == len(set(offsets)) == len(set(index)) == 9
    assert len(set(sums)) == 5
    two = zip(data["step 2, rows"], data["step 1, columns"], strict=True)
    assert [[r + c for r, c in zip(rows, columns, strict=True)] for rows, columns in two] == data["step 3"]


def test_bias_table_is_used_throughout_as_often_as_geometry_says():
    for name, pairs in lesson_figures.bias_table_data().items():
        side = int(name.removeprefix("M = "))
        reach = range(-side + 1, side)
        assert pairs == [[(side - abs(row)) * (side - abs(column)) for column in reach] for row in reach]


@pytest.mark.parametrize("window", [(7, 7), (14, 14)], ids=["windows", "global"])
def test_cost_formulas_count_what_the_layer_computes(window):
    config = SwinHFConfig(embed_dim=24, num_heads=(3,), depths=(1,))
    layer = modeling_swin_hf.SwinHFAttention(config, 24, 3, window).eval()
    nn.init.zeros_(layer.relative_position_bias_table)
    geometry = windows.window_geometry((14, 14), window, shifted=False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(torch.randn(1, 14, 14, 24), geometry, output_attentions=True)
    expected = lesson_figures.attention_cost((14, 14), 24, None if window == (14, 14) else window)
    assert counter.get_total_flops() == 2 * expected  # a multiply-addition is two operations


def test_measured_times_are_complete_and_support_the_text():
    data = lesson_figures.attention_cost_data(checked_in("attention_cost.json"))
    count = len(data["image sides"])
    assert all(len(data[f"{kind} {unit}"]) == count for kind in ("global", "window") for unit in ("seconds", "MACs"))
    assert data["hardware"] and data["software"] and re.fullmatch(r"\d{4}-\d\d-\d\d", data["date"])
    ratios = [a / b for a, b in zip(data["global seconds"], data["window seconds"], strict=True)]
    assert ratios[-1] == max(ratios) > 10  # the gap widens


def test_measuring_gives_what_drawing_needs():
    data = lesson_figures.attention_cost_data(lesson_figures.measure_attention((28, 56)))
    assert data["global MACs"][0] == data["window MACs"][0]  # a map of 7x7 is one window
    assert len(lesson_figures.draw_attention_cost(data).axes) == 2


@pytest.mark.slow
def test_all_figures_can_be_drawn(tmp_path):
    with pytest.raises(FileNotFoundError, match="measure the times with --measure"):
        lesson_figures.draw_figures(tmp_path / "new")
    (tmp_path / "attention_cost.json").write_text((FIGURES / "attention_cost.json").read_text())
    written = lesson_figures.draw_figures(tmp_path)
    assert {path.name for path in written} == DRAWN | {"figures.json", "attention.jpg"}
    languages = 2 if lesson_figures.has_chinese_font() else 1
    assert len([path for path in written if path.suffix == ".png"]) == languages * len(DRAWN)
    assert (tmp_path / "figures.json").read_text() == (FIGURES / "figures.json").read_text()


def test_every_label_has_its_translation():
    data = checked_in("figures.json")
    data["attention_cost"] = lesson_figures.attention_cost_data(checked_in("attention_cost.json"))
    drawings = {name: draw for name, (_, draw) in lesson_figures.FIGURES.items()}
    for name, draw in (drawings | {"attention_cost": lesson_figures.draw_attention_cost}).items():
        lesson_figures.translate(draw(data[name]))
    table = json.loads((FIGURES / "chinese.json").read_text(encoding="utf-8"))
    assert all(english.count("{}") == chinese.count("{}") for english, chinese in table.items())
    figure = lesson_figures.draw_reach(data["reach"])
    figure.suptitle("unknown label")
    with pytest.raises(KeyError, match=r"'unknown label' is not in chinese\.json; add its translation"):
        lesson_figures.translate(figure)


def test_chinese_lines_render_on_github():
    """A line break within a paragraph becomes a space, and a formula next to full-width punctuation stays source."""
    text = re.sub(r"^```.*?^```", "", LESSONS[1].read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    wide = "[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef“”]"
    assert not re.search(rf"{wide}\n{wide}", text)
    for line in re.sub(r"^\$\$.*?^\$\$", "", text, flags=re.DOTALL | re.MULTILINE).splitlines():
        pieces = line.split("$")
        assert len(pieces) % 2, line
        for before, after in zip(pieces[:-1:2], pieces[2::2], strict=True):
            assert re.search(r"(^|[^\u3000-\u303f\uff00-\uffef“”] )$", before), line
            assert re.match(r"($| [^\u3000-\u303f\uff00-\uffef“”])", after), line


def code_blocks(lesson):
    return re.findall(r"^```python\n(.*?)^```", lesson.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.name)
def test_code_of_the_lesson_runs(lesson):
    names: dict[str, object] = {}
    blocks = code_blocks(lesson)
    assert blocks
    for block in blocks:
        exec(compile(block, str(lesson), "exec"), names)


def test_both_languages_have_the_same_figures_code_and_chapters():
    english, chinese = (path.read_text(encoding="utf-8") for path in LESSONS)
    pictures = r"!\[[^\]]+\]\((figures/[^)]+)\)"
    translated = [f"figures/zh-CN/{path.removeprefix('figures/')}" for path in re.findall(pictures, english)]
    assert [path.replace("zh-CN/prediction", "prediction") for path in translated] == re.findall(pictures, chinese)
    assert set(re.findall(pictures, english)) == {f"figures/{name}" for name in {*DRAWN, "prediction.png"}}
    assert code_blocks(LESSONS[0]) == code_blocks(LESSONS[1])
    assert len(re.findall(r"^#+ ", english, re.MULTILINE)) == len(re.findall(r"^#+ ", chinese, re.MULTILINE))
    assert re.findall(r"^\$\$.*?\$\$$", english, re.DOTALL | re.MULTILINE) == re.findall(
        r"^\$\$.*?\$\$$", chinese, re.DOTALL | re.MULTILINE
    )


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda path: path.name)
def test_links_of_the_lesson_lead_somewhere(lesson):
    for target in re.findall(r"\]\(([^)#]+)\)", lesson.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (DOCS / target).exists(), target
