"""The benchmark compares before it times, takes turns, ends in time, and writes tables that say what was measured."""

import dataclasses
import json
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import benchmarks.__main__ as command
from benchmarks import clock, peers, pipeline, report, sections, together, trainer
from swin_hf import SwinHFConfig, SwinHFForImageClassification
from swin_hf.model import attention
from swin_hf.model.attention import eager_attention

ROOT = Path(__file__).parents[1]
SETTING = {
    "section": "models",
    "device": "cpu",
    "preset": "swin_tiny_patch4_window7_224",
    "dtype": "fp32",
    "mode": "inference",
    "execution": "eager",
    "batch_size": 8,
}
ENVIRONMENT = {"hardware": "a CPU", "versions": {"python": "3.11", "torch": "2.15"}, "date": "2026-11-23"}


@pytest.fixture
def tiny(monkeypatch):
    """The real peers at a size that takes milliseconds."""

    def build(preset: str) -> SwinHFForImageClassification:
        config = SwinHFConfig(
            image_size=32, patch_size=2, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=4, num_labels=5,
            encoder_stride=4, drop_path_rate=0.0,
        )  # fmt: skip
        config._attn_implementation = "auto"
        return peers.sharpen(SwinHFForImageClassification(config))

    monkeypatch.setattr(sections, "build_ours", build)
    monkeypatch.setattr(sections, "ceilings", lambda *_: {"matmul_tflops": 0.2, "copy_gbs": 30.0})


def result(*rows, setting=SETTING, **more):
    names = [{"name": name, "ours_is_faster_by": ratio, "images_per_s": 12.5} for name, ratio in rows]
    for row in names:
        row["share_of_matmul_limit"] = 0.75
    return {"setting": setting, "environment": ENVIRONMENT, "rows": names, "left_out": {}, **more}


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_peers_are_compared_and_timed(tiny, mode):
    options = command.parse(["--peers", "swin_hf", "transformers", "torchvision", "--seconds", "0"])
    measured = sections.measure_models({**SETTING, "mode": mode, "batch_size": 2}, options)
    rows = {row["name"]: row for row in measured["rows"]}
    assert set(rows) == {"swin_hf", "transformers", "torchvision"} and not measured["left_out"]
    assert rows["swin_hf"]["ours_is_faster_by"] == 1
    for row in rows.values():
        assert row["difference"] < 1e-4 and row["rounds"] >= 5 and row["peak_memory_mib"] > 0
        assert 0 < row["min_ms"] <= row["median_ms"]
        assert row["images_per_s"] == pytest.approx(2e3 / row["min_ms"], rel=0.05)


def test_a_peer_that_computes_something_else_is_not_timed(tiny, monkeypatch):
    build_peer = sections.build_peer

    def spoil(*args):
        model = build_peer(*args)
        model.swin.encoder.layers[0].blocks[1].attention.o_proj.weight.data *= -1
        return model

    monkeypatch.setattr(sections, "build_peer", spoil)
    options = command.parse(["--peers", "swin_hf", "transformers", "--seconds", "0"])
    measured = sections.measure_models({**SETTING, "batch_size": 2}, options)
    assert [row["name"] for row in measured["rows"]] == ["swin_hf"]
    assert "differ from ours" in measured["left_out"]["transformers"]


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("lost", ["bias", "mask", "scale"])
def test_our_own_attention_is_held_against_the_definition(tiny, monkeypatch, mode, lost):
    def careless(module, query, key, value, mask, scaling, dropout=0.0, **_):
        bias = module.relative_position_bias(module.window)
        mask = {"bias": mask - bias.detach(), "mask": bias, "scale": mask}[lost]
        return eager_attention(module, query, key, value, mask, 1.0 if lost == "scale" else scaling, dropout)

    ours = sections.build_ours("")
    ours.config._attn_implementation = "careless"
    monkeypatch.setattr(sections, "build_ours", lambda _: ours)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "careless", careless)
    options = command.parse(["--peers", "swin_hf", "--seconds", "0"])
    with pytest.raises(RuntimeError, match="swin_hf: it"):
        sections.measure_models({**SETTING, "mode": mode, "dtype": "amp", "batch_size": 2}, options)


def test_wrong_gradients_are_not_timed(tiny, monkeypatch):
    build_peer = sections.build_peer

    def spoil(*args):
        model = build_peer(*args)
        for name, parameter in model.named_parameters():
            if "position_bias_table" in name:
                parameter.register_hook(lambda grad: grad.flip(0))
        return model

    monkeypatch.setattr(sections, "build_peer", spoil)
    options = command.parse(["--peers", "swin_hf", "transformers", "--seconds", "0"])
    measured = sections.measure_models({**SETTING, "mode": "training", "batch_size": 2}, options)
    assert [row["name"] for row in measured["rows"]] == ["swin_hf"]
    assert "differs from our fp32 definition" in measured["left_out"]["transformers"]


def test_a_peer_that_fails_is_left_out_and_a_setting_that_fails_is_named(tiny, monkeypatch, tmp_path, capsys):
    model_call = sections.model_call

    def fail(model, *args):
        if not isinstance(model, SwinHFForImageClassification):
            raise torch.OutOfMemoryError("no memory left\nwith a long story")
        return model_call(model, *args)

    monkeypatch.setattr(sections, "model_call", fail)
    options = command.parse(["--peers", "swin_hf", "transformers", "--seconds", "0"])
    measured = sections.measure_models({**SETTING, "batch_size": 2}, options)
    assert measured["left_out"] == {"transformers": "OutOfMemoryError: no memory left"}

    monkeypatch.setattr(sections, "model_call", lambda *_: 1 / 0)
    args = ["--sections", "models", "--modes", "inference", "--executions", "eager", "--batch-sizes", "1", "8"]
    args += ["--peers", "swin_hf", "--json", str(tmp_path / "o.json"), "--markdown", str(tmp_path / "o.md")]
    assert command.main(args) == 0
    assert (
        capsys.readouterr().out.count("not measured, RuntimeError: swin_hf: ZeroDivisionError: division by zero") == 2
    )
    assert (tmp_path / "o.md").is_file()


def test_attention_alone_is_compared_before_it_is_timed(tiny, monkeypatch):
    config = SwinHFConfig(image_size=32, patch_size=2, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=4)
    monkeypatch.setattr(sections.SwinHFConfig, "from_preset", lambda *_, **__: config)
    setting = {"device": "cpu", "dtype": "fp32", "preset": "", "batch_size": 2}
    options = command.parse(["--seconds", "0"])
    names = [
        f"{name}, stage {stage}, {way}"
        for stage in (1, 2)
        for way in ("forward", "backward")
        for name in ("eager", "sdpa")
    ]
    assert [row["name"] for row in sections.measure_attention(setting, options)["rows"]] == names
    with monkeypatch.context() as patch:
        patch.setattr(attention, "may_attend_here", lambda *_: False)
        patch.setitem(
            ALL_ATTENTION_FUNCTIONS._global_mapping,
            "sdpa",
            lambda *args, **kw: [2 * eager_attention(*args, **kw)[0], None],
        )
        measured = sections.measure_attention(setting, options)
    assert "it differs from eager" in measured["left_out"]["sdpa"]


def test_the_limit_gets_through_a_compiler():
    def compiler(graph, inputs):
        raise clock.OutOfTime

    with pytest.raises(clock.OutOfTime):
        torch.compile(lambda x: x + 1, backend=compiler)(torch.ones(1))


def test_without_timm_it_says_what_to_install_and_measures_the_rest(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)  # importing it now raises ImportError
    options = command.parse(["--peers", "swin_hf", "timm", "torchvision", "--seconds", "0"])
    measured = sections.measure_models({**SETTING, "batch_size": 1}, options)
    assert [row["name"] for row in measured["rows"]] == ["swin_hf", "torchvision"]
    assert "pip install 'swin-hf[bench]'" in measured["left_out"]["timm"]


def test_calls_take_turns():
    order = []
    clock.take_turns({name: lambda name=name: order.append(name) or time.sleep(0.02) for name in "abc"}, "cpu", 0)
    assert order[6:] == list("abc") * 5  # two rounds to warm up


def test_rounds_that_the_limit_interrupts_are_kept_from_the_third_on():
    calls = iter(range(100))

    def until(last):
        if next(calls) == last:
            raise clock.OutOfTime
        time.sleep(0.02)

    assert len(clock.take_turns({"a": lambda: until(5)}, "cpu", 0)["a"]) == 3
    with pytest.raises(clock.OutOfTime):
        clock.take_turns({"a": lambda: until(10)}, "cpu", 0)


def test_peak_memory_counts_what_is_held_at_once():
    def call():
        for _ in range(3):
            torch.ones(2**18) + torch.ones(2**18)  # three of 1 MiB at once, nothing of the round before

    assert clock.peak_memory(call, "cpu") == pytest.approx(3, abs=0.1)


def test_a_new_result_replaces_that_of_its_setting_only():
    other = {**SETTING, "batch_size": 1}
    merged = report.merge([result(("timm", 1.0)), result(("timm", 2.0), setting=other)], [result(("timm", 3.0))])
    assert [(r["setting"]["batch_size"], r["rows"][0]["ours_is_faster_by"]) for r in merged] == [(1, 2.0), (8, 3.0)]


def test_a_disturbed_result_is_marked_and_not_published():
    quiet = result(("swin_hf", 1.0), ("timm", 1.4))
    disturbed = result(("swin_hf", 1.0), ("timm", 1.4), setting={**SETTING, "batch_size": 1})
    for row in quiet["rows"]:
        row.update(median_ms=120.0, min_ms=100.0)
    for row in disturbed["rows"]:
        row.update(median_ms=140.0, min_ms=100.0)
    assert "**Disturbed**" in report.render([disturbed]) and "**Disturbed**" not in report.render([quiet])
    text = report.summary([quiet, disturbed])
    assert "batch 8" in text and "batch 1 " not in text


def test_summary_has_a_column_for_every_peer():
    text = report.summary([result(("swin_hf", 1.0), ("timm", 1.4), ("transformers", 1.25))])
    assert "| swin_tiny, inference, eager, fp32, batch 8 | 12.5 | 75% | 1.25x | 1.40x | - |" in text


def test_a_shortcut_has_a_row_for_each_make_and_says_where_it_was_not_measured():
    environment = {**ENVIRONMENT, "hardware": "AMD EPYC, 2 threads"}
    rows = [{"name": "all", "the shortcut gains": 1.0}, {"name": "without: a cache", "the shortcut gains": 1.2}]
    setting = {**SETTING, "section": "shortcuts"}
    text = report.render([{"setting": setting, "environment": environment, "rows": rows, "left_out": {}}])
    assert "| a cache | AMD | inference fp32 batch 8: 1.2 |\n" in text
    assert "| a cache | Intel | not measured |\n" in text
    assert "by make" not in report.render([])


def test_the_table_goes_between_the_markers_and_nowhere_else():
    text = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    assert report.write_between(text, "new") == text.replace("old", "new")
    for broken in ("no markers", report.BEGIN, report.END + report.BEGIN, text + text):
        with pytest.raises(ValueError, match=r"put both into the file, once and in that order"):
            report.write_between(broken, "new")


def test_render_only_writes_the_tables_from_the_results(tmp_path):
    stored, readme = tmp_path / "speed.json", tmp_path / "README.md"
    stored.write_text(json.dumps([result(("swin_hf", 1.0), ("timm", 1.4))]))
    readme.write_text(f"{report.BEGIN}\n{report.END}")
    args = ["--render-only", "--json", str(stored), "--markdown", str(tmp_path / "speed.md"), "--readme", str(readme)]
    assert command.main(args) == 0
    assert "1.40x" in readme.read_text() and "| swin_hf |" in (tmp_path / "speed.md").read_text()


def test_the_trainer_section_trains_both_sides(monkeypatch):
    digits = dataclasses.replace(trainer.RECIPES["digits"], limit=64)
    monkeypatch.setitem(trainer.RECIPES, "digits", digits)
    (setting,) = sections.settings_of(command.parse(["--sections", "trainer", "--trainer-epochs", "2"]))
    measured = sections.measure_trainer({**setting, "rounds": 1}, None)
    ours, theirs = measured["rows"]
    assert [ours["name"], theirs["name"]] == ["swin_hf", "transformers"] and ours["ours_is_faster_by"] == 1
    assert theirs["ours_is_faster_by"] == pytest.approx(theirs["min_epoch_s"] / ours["min_epoch_s"], rel=0.05)
    assert all(
        0 < row["min_epoch_s"] <= row["median_epoch_s"] and 0 < row["test_accuracy"] < 1 for row in (ours, theirs)
    )
    measured["rows"] = [
        {**ours, "median_epoch_s": ours["min_epoch_s"]},
        {**theirs, "median_epoch_s": theirs["min_epoch_s"]},
    ]
    fashion = {"setting": {**setting, "recipe": "fashion_mnist"}, "environment": ENVIRONMENT, **measured}
    assert "## An epoch against transformers' Trainer: fashion_mnist, 2 epochs, 2 rounds" in report.render([fashion])
    assert f"An epoch of fashion_mnist takes {ours['min_epoch_s']} s" in report.summary([fashion])


def test_the_epoch_section_trains_three_sides_on_the_same_pictures(monkeypatch, tmp_path):
    recipe = dataclasses.replace(trainer.RECIPES["fashion_mnist"], folder=tmp_path)  # without the real ones
    monkeypatch.setitem(trainer.RECIPES, "fashion_mnist", recipe)
    args = ["--sections", "epoch", "--epoch-data", "fashion_mnist", "--epoch-pictures", "128", "--trainer-rounds", "1"]
    options = command.parse(args)
    (setting,) = sections.settings_of(options)
    measured = sections.measure_epoch(setting, options)
    names = ["swin_hf", "transformers", "timm"]
    assert [row["name"] for row in measured["rows"]] == [f"{name} (random pictures of its shape)" for name in names]
    for row in measured["rows"]:
        assert row["images_per_s"] == pytest.approx(128 / row["min_epoch_s"], rel=0.05) and row["test_accuracy"] < 0.5
    text = report.render([{"setting": setting, "environment": ENVIRONMENT, **measured}])
    assert "## An epoch of 128 pictures, fashion_mnist, 0 workers, 1 rounds" in text


def test_the_pipeline_has_a_row_for_each_decoder_and_for_prepared_pictures(monkeypatch):
    options = command.parse(["--pictures", "80"])
    monkeypatch.setattr(pipeline, "ROUNDS", 1)
    names = ["swin_hf, Pillow", "swin_hf, Pillow, prepared", "swin_hf, torchcodec", "swin_hf, torchcodec, prepared"]
    rows = sections.measure_pipeline({}, options)["rows"]
    assert [row["name"] for row in rows] == [*names, "torchvision"]
    assert all(row["images_per_s"] > 0 for row in rows) and rows[-1]["times_torchvision"] == 1
    monkeypatch.setattr(pipeline.processing, "jpeg_decoder", lambda: None)
    measured = sections.measure_pipeline({}, options)
    assert [row["name"] for row in measured["rows"]] == [*names[:2], "torchvision"]
    assert "pip install 'swin-hf[decode]'" in measured["left_out"]["swin_hf, torchcodec"]


def test_a_section_whose_library_is_missing_is_named_and_the_rest_measured(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "benchmarks.trainer", None)  # importing it now raises ImportError
    args = ["--sections", "trainer", "models", "--modes", "inference", "--executions", "eager", "--batch-sizes", "1"]
    args += ["--peers", "swin_hf", "--seconds", "0", "--json", str(tmp_path / "o.json")]
    assert command.main([*args, "--markdown", str(tmp_path / "o.md")]) == 0
    assert "not measured, ModuleNotFoundError: import of benchmarks.trainer halted" in capsys.readouterr().out
    assert [result["setting"]["section"] for result in json.loads((tmp_path / "o.json").read_text())] == ["models"]


def test_the_limit_ends_a_run_and_names_what_was_not_measured(tiny, tmp_path, capsys):
    args = ["--sections", "models", "--executions", "eager", "--batch-sizes", "1", "2", "--peers", "swin_hf"]
    args += [
        "--seconds",
        "100",
        "--limit",
        "1",
        "--json",
        str(tmp_path / "o.json"),
        "--markdown",
        str(tmp_path / "o.md"),
    ]
    assert command.main(args) == 0
    assert "not measured, the limit of 1 s had passed: Training, eager" in capsys.readouterr().out


@pytest.mark.slow
def test_settings_build_side_by_side_and_are_timed_one_by_one():
    args = "--presets swin_digits_patch4_window4_32 --modes inference --executions eager --batch-sizes 1 2 --jobs 4"
    options = command.parse([*args.split(), "--peers", "swin_hf", "transformers", "--seconds", "0"])
    good = [setting for setting in sections.settings_of(options) if setting["section"] == "models"]
    lost = {**good[0], "preset": "swin_huge"}
    attention = {name: value for name, value in good[0].items() if name not in ("mode", "execution")}
    attention["section"] = "attention"
    outcomes = [outcome for _, outcome in together.measure([good[0], lost, good[1], attention], options)]
    assert outcomes[3]["rows"][0]["name"] == "eager, stage 1, forward"
    assert [[row["name"] for row in outcomes[index]["rows"]] for index in (0, 2)] == [["swin_hf", "transformers"]] * 2
    assert "swin_huge" in outcomes[1]
    options.build_limit = 0.0
    assert [outcome for _, outcome in together.measure(good, options)] == ["it was not built in time"] * 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--devices", "cuda"], "there is no CUDA device; --devices cpu"),
        (["--peers", "timm"], "--peers must contain swin_hf"),
        (["--presets", "swin_huge"], "invalid choice: 'swin_huge'"),
    ],
)
def test_impossible_options_are_refused(args, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        command.parse(args)
    assert message in capsys.readouterr().err


def test_the_readme_has_the_table_of_the_stored_results():
    stored = ROOT / "docs" / "speed.json"
    results = json.loads(stored.read_text())
    assert (ROOT / "docs" / "speed.md").read_text() == report.render(results)
    readme = (ROOT / "README.md").read_text()
    assert report.write_between(readme, report.summary(results)) == readme


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_section_runs(tmp_path, capsys):
    args = ["--batch-sizes", "1", "--executions", "eager", "--seconds", "0", "--pictures", "80", "--limit", "7000"]
    args += ["--trainer-epochs", "1", "--trainer-rounds", "1", "--epoch-pictures", "64"]
    assert command.main([*args, "--json", str(tmp_path / "o.json"), "--markdown", str(tmp_path / "o.md")]) == 0
    results = json.loads((tmp_path / "o.json").read_text())
    assert {r["setting"]["section"] for r in results} == set(sections.SECTIONS)
    assert all(row.get("images_per_s", 1) > 0 for r in results for row in r["rows"])
    assert "not measured," not in capsys.readouterr().out
