"""The benchmark compares before it times, takes turns, ends in time, and writes tables that say what was measured."""

import dataclasses
import importlib.util
import json
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from swin_hf import SwinHFConfig, SwinHFForImageClassification
from swin_hf.model import attention
from swin_hf.model.attention import eager_attention

RECIPE = Path(__file__).parent.parent / "recipes" / "benchmark.py"
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


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tiny(benchmark, monkeypatch):
    """The real peers at a size that takes milliseconds."""

    def build(preset: str) -> SwinHFForImageClassification:
        config = SwinHFConfig(
            image_size=32, patch_size=2, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=4, num_labels=5,
            encoder_stride=4, drop_path_rate=0.0,
        )  # fmt: skip
        config._attn_implementation = "auto"
        return benchmark.sharpen(SwinHFForImageClassification(config))

    monkeypatch.setattr(benchmark, "build_ours", build)
    monkeypatch.setattr(benchmark, "ceilings", lambda *_: {"matmul_tflops": 0.2, "copy_gbs": 30.0})


def result(*rows, setting=SETTING, **more):
    names = [{"name": name, "ours_is_faster_by": ratio, "images_per_s": 12.5} for name, ratio in rows]
    for row in names:
        row["share_of_matmul_limit"] = 0.75
    return {"setting": setting, "environment": ENVIRONMENT, "rows": names, "left_out": {}, **more}


@pytest.mark.parametrize("mode", ["inference", "training"])
def test_peers_are_compared_and_timed(benchmark, tiny, mode):
    options = benchmark.parse(["--peers", "swin_hf", "transformers", "torchvision", "--seconds", "0"])
    measured = benchmark.measure_models({**SETTING, "mode": mode, "batch_size": 2}, options)
    rows = {row["name"]: row for row in measured["rows"]}
    assert set(rows) == {"swin_hf", "transformers", "torchvision"} and not measured["left_out"]
    assert rows["swin_hf"]["ours_is_faster_by"] == 1
    for row in rows.values():
        assert row["difference"] < 1e-4 and row["rounds"] >= 5 and row["peak_memory_mib"] > 0
        assert 0 < row["min_ms"] <= row["median_ms"]
        assert row["images_per_s"] == pytest.approx(2e3 / row["min_ms"], rel=0.05)


def test_a_peer_that_computes_something_else_is_not_timed(benchmark, tiny, monkeypatch):
    build_peer = benchmark.build_peer

    def spoil(*args):
        model = build_peer(*args)
        model.swin.encoder.layers[0].blocks[1].attention.o_proj.weight.data *= -1
        return model

    monkeypatch.setattr(benchmark, "build_peer", spoil)
    options = benchmark.parse(["--peers", "swin_hf", "transformers", "--seconds", "0"])
    measured = benchmark.measure_models({**SETTING, "batch_size": 2}, options)
    assert [row["name"] for row in measured["rows"]] == ["swin_hf"]
    assert "differ from ours" in measured["left_out"]["transformers"]


@pytest.mark.parametrize("mode", ["inference", "training"])
@pytest.mark.parametrize("lost", ["bias", "mask", "scale"])
def test_our_own_attention_is_held_against_the_definition(benchmark, tiny, monkeypatch, mode, lost):
    def careless(module, query, key, value, mask, scaling, dropout=0.0, **_):
        bias = module.relative_position_bias(module.window)
        mask = {"bias": mask - bias.detach(), "mask": bias, "scale": mask}[lost]
        return eager_attention(module, query, key, value, mask, 1.0 if lost == "scale" else scaling, dropout)

    ours = benchmark.build_ours("")
    ours.config._attn_implementation = "careless"
    monkeypatch.setattr(benchmark, "build_ours", lambda _: ours)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "careless", careless)
    options = benchmark.parse(["--peers", "swin_hf", "--seconds", "0"])
    with pytest.raises(RuntimeError, match="swin_hf: it"):
        benchmark.measure_models({**SETTING, "mode": mode, "dtype": "amp", "batch_size": 2}, options)


def test_wrong_gradients_are_not_timed(benchmark, tiny, monkeypatch):
    build_peer = benchmark.build_peer

    def spoil(*args):
        model = build_peer(*args)
        for name, parameter in model.named_parameters():
            if "position_bias_table" in name:
                parameter.register_hook(lambda grad: grad.flip(0))
        return model

    monkeypatch.setattr(benchmark, "build_peer", spoil)
    options = benchmark.parse(["--peers", "swin_hf", "transformers", "--seconds", "0"])
    measured = benchmark.measure_models({**SETTING, "mode": "training", "batch_size": 2}, options)
    assert [row["name"] for row in measured["rows"]] == ["swin_hf"]
    assert "differs from our fp32 definition" in measured["left_out"]["transformers"]


def test_a_peer_that_fails_is_left_out_and_a_setting_that_fails_is_named(
    benchmark, tiny, monkeypatch, tmp_path, capsys
):
    model_call = benchmark.model_call

    def fail(model, *args):
        if not isinstance(model, SwinHFForImageClassification):
            raise torch.OutOfMemoryError("no memory left\nwith a long story")
        return model_call(model, *args)

    monkeypatch.setattr(benchmark, "model_call", fail)
    options = benchmark.parse(["--peers", "swin_hf", "transformers", "--seconds", "0"])
    measured = benchmark.measure_models({**SETTING, "batch_size": 2}, options)
    assert measured["left_out"] == {"transformers": "OutOfMemoryError: no memory left"}

    monkeypatch.setattr(benchmark, "model_call", lambda *_: 1 / 0)
    args = ["--sections", "models", "--modes", "inference", "--executions", "eager", "--batch-sizes", "1", "8"]
    args += ["--peers", "swin_hf", "--json", str(tmp_path / "o.json"), "--markdown", str(tmp_path / "o.md")]
    assert benchmark.main(args) == 0
    assert (
        capsys.readouterr().out.count("not measured, RuntimeError: swin_hf: ZeroDivisionError: division by zero") == 2
    )
    assert (tmp_path / "o.md").is_file()


def test_attention_alone_is_compared_before_it_is_timed(benchmark, tiny, monkeypatch):
    config = SwinHFConfig(image_size=32, patch_size=2, embed_dim=8, depths=(2, 2), num_heads=(1, 2), window_size=4)
    monkeypatch.setattr(benchmark.SwinHFConfig, "from_preset", lambda *_, **__: config)
    setting = {"device": "cpu", "dtype": "fp32", "preset": "", "batch_size": 2}
    options = benchmark.parse(["--seconds", "0"])
    names = [
        f"{name}, stage {stage}, {way}"
        for stage in (1, 2)
        for way in ("forward", "backward")
        for name in ("eager", "sdpa")
    ]
    assert [row["name"] for row in benchmark.measure_attention(setting, options)["rows"]] == names
    with monkeypatch.context() as patch:
        patch.setattr(attention, "attends_itself", lambda *_: False)
        patch.setitem(
            ALL_ATTENTION_FUNCTIONS._global_mapping,
            "sdpa",
            lambda *args, **kw: [2 * eager_attention(*args, **kw)[0], None],
        )
        measured = benchmark.measure_attention(setting, options)
    assert "it differs from eager" in measured["left_out"]["sdpa"]


def test_the_limit_gets_through_a_compiler(benchmark):
    def compiler(graph, inputs):
        raise benchmark.OutOfTime

    with pytest.raises(benchmark.OutOfTime):
        torch.compile(lambda x: x + 1, backend=compiler)(torch.ones(1))


def test_what_is_promised_is_measured_first(benchmark, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setitem(
        benchmark.MEASURE, "models", lambda setting, _: seen.append(setting) or {"rows": [], "left_out": {}}
    )
    args = ["--sections", "models", "--modes", "training", "inference", "--batch-sizes", "4", "8"]
    benchmark.main([*args, "--json", str(tmp_path / "o.json"), "--markdown", str(tmp_path / "o.md")])
    promised = [benchmark.promise_of(setting) is not None for setting in seen]
    assert len(seen) == 8 and promised == [True] * 3 + [False] * 5


def test_every_promise_is_judged(benchmark):
    setting = {
        **SETTING,
        "device": "cuda",
        "mode": "training",
        "execution": "compiled",
        "dtype": "bf16",
        "batch_size": 128,
    }
    rows = result(("swin_hf", 1.0), ("timm", 1.3), setting=setting)
    for row, memory in zip(rows["rows"], (90.0, 100.0), strict=True):
        row["peak_memory_mib"] = memory
    assert list(benchmark.judge(rows)) == [
        "Promised 1.25x of timm: 1.3x, kept.",
        "Promised at most the peak memory of timm: 0.90x, kept.",
    ]
    base = {**setting, "preset": benchmark.BASE_384}
    assert "Promised 1.2x of timm: 1.1x, **missed**." in list(
        benchmark.judge(result(("swin_hf", 1.0), ("timm", 1.1), setting=base))
    )
    kernel = {"name": "triton, stage 1, backward", "share_of_copy_limit": 0.5}
    alone = {"setting": {**SETTING, "section": "attention", "mode": None}, "rows": [kernel]}
    assert list(benchmark.judge(alone)) == [
        "Promised 0.55 of the copy bandwidth, triton, stage 1, backward: 0.5, **missed**."
    ]


def test_without_timm_it_says_what_to_install_and_measures_the_rest(benchmark, tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)  # importing it now raises ImportError
    options = benchmark.parse(["--peers", "swin_hf", "timm", "torchvision", "--seconds", "0"])
    measured = benchmark.measure_models({**SETTING, "batch_size": 1}, options)
    assert [row["name"] for row in measured["rows"]] == ["swin_hf", "torchvision"]
    assert "pip install 'swin-hf[bench]'" in measured["left_out"]["timm"]


def test_calls_take_turns(benchmark):
    order = []
    benchmark.take_turns({name: lambda name=name: order.append(name) or time.sleep(0.02) for name in "abc"}, "cpu", 0)
    assert order[6:] == list("abc") * 5  # two rounds to warm up


def test_rounds_that_the_limit_interrupts_are_kept_from_the_third_on(benchmark):
    calls = iter(range(100))

    def until(last):
        if next(calls) == last:
            raise benchmark.OutOfTime
        time.sleep(0.02)

    assert len(benchmark.take_turns({"a": lambda: until(5)}, "cpu", 0)["a"]) == 3
    with pytest.raises(benchmark.OutOfTime):
        benchmark.take_turns({"a": lambda: until(10)}, "cpu", 0)


def test_peak_memory_counts_what_is_held_at_once(benchmark):
    def call():
        for _ in range(3):
            torch.ones(2**18) + torch.ones(2**18)  # three of 1 MiB at once, nothing of the round before

    assert benchmark.peak_memory(call, "cpu") == pytest.approx(3, abs=0.1)


def test_a_new_result_replaces_that_of_its_setting_only(benchmark):
    other = {**SETTING, "batch_size": 1}
    merged = benchmark.merge([result(("timm", 1.0)), result(("timm", 2.0), setting=other)], [result(("timm", 3.0))])
    assert [(r["setting"]["batch_size"], r["rows"][0]["ours_is_faster_by"]) for r in merged] == [(1, 2.0), (8, 3.0)]


def test_the_promise_is_held_against_the_best_peer(benchmark):
    slow = result(("swin_hf", 1.0), ("timm", 1.4), ("transformers", 1.1))
    assert benchmark.verdict(slow) == ("transformers", 1.2, 1.1)
    assert benchmark.verdict(result(("swin_hf", 1.0))) is None
    assert benchmark.verdict(result(("timm", 1.4), setting={**SETTING, "batch_size": 5})) is None
    text = benchmark.render([{**slow, "ceilings": {"matmul_tflops": 0.2, "copy_gbs": 30.0}}])
    assert "Promised 1.2x of transformers: 1.1x, **missed**." in text


def test_a_disturbed_result_is_marked_judged_by_nothing_and_not_published(benchmark):
    quiet = result(("swin_hf", 1.0), ("timm", 1.4))
    disturbed = result(("swin_hf", 1.0), ("timm", 1.4), setting={**SETTING, "batch_size": 1})
    for row in quiet["rows"]:
        row.update(median_ms=120.0, min_ms=100.0)
    for row in disturbed["rows"]:
        row.update(median_ms=140.0, min_ms=100.0)
    assert benchmark.verdict(quiet) is not None and benchmark.verdict(disturbed) is None
    assert "**Disturbed**" in benchmark.render([disturbed]) and "**Disturbed**" not in benchmark.render([quiet])
    text = benchmark.summary([quiet, disturbed])
    assert "batch 8" in text and "batch 1 " not in text


def test_summary_has_a_column_for_every_peer(benchmark):
    text = benchmark.summary([result(("swin_hf", 1.0), ("timm", 1.4), ("transformers", 1.25))])
    assert "| swin_tiny, inference, eager, fp32, batch 8 | 12.5 | 75% | 1.25x | 1.40x | - |" in text


def test_the_table_goes_between_the_markers_and_nowhere_else(benchmark):
    text = f"before\n{benchmark.BEGIN}\nold\n{benchmark.END}\nafter\n"
    assert benchmark.write_between(text, "new") == text.replace("old", "new")
    for broken in ("no markers", benchmark.BEGIN, benchmark.END + benchmark.BEGIN, text + text):
        with pytest.raises(ValueError, match=r"put both into the file, once and in that order"):
            benchmark.write_between(broken, "new")


def test_render_only_writes_the_tables_from_the_results(benchmark, tmp_path):
    stored, readme = tmp_path / "speed.json", tmp_path / "README.md"
    stored.write_text(json.dumps([result(("swin_hf", 1.0), ("timm", 1.4))]))
    readme.write_text(f"{benchmark.BEGIN}\n{benchmark.END}")
    args = ["--render-only", "--json", str(stored), "--markdown", str(tmp_path / "speed.md"), "--readme", str(readme)]
    assert benchmark.main(args) == 0
    assert "1.40x" in readme.read_text() and "| swin_hf |" in (tmp_path / "speed.md").read_text()


def test_the_trainer_section_trains_both_sides_and_is_judged_on_fashion_mnist(benchmark, monkeypatch):
    monkeypatch.syspath_prepend(RECIPE.parent)
    import compare_trainer

    digits = dataclasses.replace(compare_trainer.RECIPES["digits"], limit=64)
    monkeypatch.setitem(compare_trainer.RECIPES, "digits", digits)
    (setting,) = benchmark.settings_of(benchmark.parse(["--sections", "trainer", "--trainer-epochs", "2"]))
    measured = benchmark.measure_trainer({**setting, "rounds": 1}, None)
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
    judged = {"environment": ENVIRONMENT, **measured}
    assert benchmark.verdict({"setting": setting, **judged}) is None
    fashion = {"setting": {**setting, "recipe": "fashion_mnist"}, **judged}
    assert benchmark.verdict(fashion) == ("transformers", 1.11, theirs["ours_is_faster_by"])
    assert "## An epoch beside transformers' Trainer: fashion_mnist, 2 epochs, 2 rounds" in benchmark.render([fashion])
    assert f"An epoch of fashion_mnist takes {ours['min_epoch_s']} s" in benchmark.summary([fashion])


def test_a_section_whose_library_is_missing_is_named_and_the_rest_measured(
    benchmark, tiny, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "compare_trainer", None)  # importing it now raises ImportError
    args = ["--sections", "trainer", "models", "--modes", "inference", "--executions", "eager", "--batch-sizes", "1"]
    args += ["--peers", "swin_hf", "--seconds", "0", "--json", str(tmp_path / "o.json")]
    assert benchmark.main([*args, "--markdown", str(tmp_path / "o.md")]) == 0
    assert "not measured, ModuleNotFoundError: import of compare_trainer halted" in capsys.readouterr().out
    assert [result["setting"]["section"] for result in json.loads((tmp_path / "o.json").read_text())] == ["models"]


def test_the_limit_ends_a_run_and_names_what_was_not_measured(benchmark, tiny, tmp_path, capsys):
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
    start = time.monotonic()
    assert benchmark.main(args) == 0
    assert time.monotonic() - start < 30
    assert "not measured, the limit of 1 s had passed: Training, eager" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--devices", "cuda"], "there is no CUDA device; --devices cpu"),
        (["--peers", "timm"], "--peers must contain swin_hf"),
        (["--presets", "swin_huge"], "invalid choice: 'swin_huge'"),
    ],
)
def test_impossible_options_are_refused(benchmark, args, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        benchmark.parse(args)
    assert message in capsys.readouterr().err


def test_the_readme_has_the_table_of_the_stored_results(benchmark):
    root = RECIPE.parent.parent
    stored = root / "docs" / "speed.json"
    results = json.loads(stored.read_text())
    assert (root / "docs" / "speed.md").read_text() == benchmark.render(results)
    readme = (root / "README.md").read_text()
    assert benchmark.write_between(readme, benchmark.summary(results)) == readme


@pytest.mark.slow
def test_every_section_runs(benchmark, tmp_path, capsys):
    args = ["--batch-sizes", "1", "--executions", "eager", "--seconds", "0", "--pictures", "80", "--limit", "280"]
    args += ["--trainer-epochs", "1", "--trainer-rounds", "1"]
    assert benchmark.main([*args, "--json", str(tmp_path / "o.json"), "--markdown", str(tmp_path / "o.md")]) == 0
    results = json.loads((tmp_path / "o.json").read_text())
    assert {r["setting"]["section"] for r in results} == set(benchmark.SECTIONS)
    assert all(row.get("images_per_s", 1) > 0 for r in results for row in r["rows"])
    assert "not measured" not in capsys.readouterr().out
