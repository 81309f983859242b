"""Every shipped YAML parses and has its header; every recipe takes a step; the scripts stay pages."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml
from conftest import TRAINING_WARNINGS

import swin_hf_cli
from swin_hf import SwinV2HFConfig
from swin_hf.training import (
    SwinClassifier,
    SwinMaskedImageModeler,
    SwinMultiLabelClassifier,
    SwinRegressor,
    SwinSegmenter,
    run_recipe,
)
from swin_hf.training.command import RecipeCLI

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "swin_hf" / "training" / "configs"
YAMLS = sorted(CONFIGS.rglob("*.yaml"))
OVERLAYS = {"ddp", "early_stopping", "ema", "streaming", "wandb", "trackio", "smoke_cpu"}
LOGGERS = {"wandb", "trackio"}  # their libraries are not dependencies
REQUIRED = OVERLAYS | {
    "digits",
    "fashion_mnist",
    "openclipart",
    "imagenet1k_swin_tiny",
    "imagenet1k_swin_small",
    "imagenet1k_swin_base",
    "imagenet22k_swin_base",
    "imagenet1k_swinv2_tiny",
    "imagenet1k_swinv2_small",
    "imagenet1k_swinv2_base",
    "imagenet22k_swinv2_base",
    "finetune_384",
    "finetune_384_swinv2",
    "finetune_imagefolder",
    "linear_probe",
    "lora",
    "distill",
    "simmim_pretrain",
    "simmim_finetune",
    "simmim_pretrain_swinv2",
    "simmim_finetune_swinv2",
}

pytestmark = [
    *TRAINING_WARNINGS,
    # peft 0.21 asks transformers 5.23 by an old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # The frozen parts of a model.
    pytest.mark.filterwarnings("ignore:.*in eval mode at the start of training"),
]


SCRIPTS = {"finetune": SwinClassifier, "pretrain": SwinMaskedImageModeler, "segment": SwinSegmenter}
SCRIPTS |= {"multi_label": SwinMultiLabelClassifier, "regression": SwinRegressor}


class ParserOnly(RecipeCLI):
    """The real parser of a recipe; nothing is built or run."""

    def __init__(self, module_class):
        super().__init__(module_class, CONFIGS / f"{module_class.default_config}.yaml", ["fit"])

    def instantiate_classes(self):
        pass

    def _run_subcommand(self, subcommand):
        pass


@pytest.fixture(scope="module")
def parsers(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("parsers"))  # the command makes the folder of its run here
        return {script: ParserOnly(module_class).parser for script, module_class in SCRIPTS.items()}


def script_of(path):
    if path.stem.startswith("segment_"):
        return "segment"
    if path.stem in SCRIPTS:
        return path.stem
    return "pretrain" if path.stem.startswith(("simmim_pretrain", "simmim_digits")) else "finetune"


def test_every_recipe_is_there():
    assert {path.stem for path in YAMLS} >= REQUIRED


class EditorLoader(yaml.SafeLoader):
    """Reads numbers as YAML 1.2, and so editors, do: 4e-3 is one."""


EditorLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?$"), list("-+.0123456789")
)


def complaints(schema, text):
    validator = jsonschema.Draft202012Validator(schema)
    return [error.message for error in validator.iter_errors(yaml.load(text, EditorLoader))]


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_yaml_passes_in_an_editor(path):
    name = f"{script_of(path)}.schema.json"
    assert f"# yaml-language-server: $schema={name}\n" in path.read_text()
    assert complaints(json.loads((CONFIGS / name).read_text()), path.read_text()) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: {optimization: {learning_rat: 1}}", "'learning_rat' was unexpected"),
        ("model: {optimization: {learning_rate: high}}", "'high' is not of type 'number'"),
        ("model: {optimization: {schedule: step}}", "'step' is not one of"),
        ("data: {reading: {on_error: ignore}}", "'ignore' is not one of"),
        ("trainer: {callbacks: [3]}", "not valid"),
        ("trainer: {max_epoch: 3}", "'max_epoch' was unexpected"),
        ("epochs: 3", "'epochs' was unexpected"),
    ],
)
def test_an_editor_marks_what_the_parser_refuses(text, said, parsers, tmp_path):
    found = complaints(json.loads((CONFIGS / "finetune.schema.json").read_text()), text)
    assert len(found) == 1 and said in found[0]
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(SystemExit):
        parsers["finetune"].parse_args(
            ["fit", "--config", str(CONFIGS / "digits.yaml"), "--config", str(tmp_path / "bad.yaml")]
        )


def test_an_editor_marks_what_the_data_decide():
    schema = json.loads((CONFIGS / "finetune.schema.json").read_text())
    assert complaints(schema, "model: {num_labels: 10}") == [
        "Additional properties are not allowed ('num_labels' was unexpected)"
    ]


@pytest.mark.parametrize(("script", "module_class"), SCRIPTS.items())
def test_schema_is_what_the_command_prints(script, module_class, capsys):
    """The Trainer's part may lag: it changes with Lightning."""
    with pytest.raises(SystemExit) as end:
        run_recipe(module_class, CONFIGS / "digits.yaml", ["--print_schema"])
    assert end.value.code == 0
    printed = json.loads(capsys.readouterr().out)["properties"]
    stored = json.loads((CONFIGS / f"{script}.schema.json").read_text())["properties"]
    assert printed.keys() == stored.keys(), "run `make schema`"
    for part in set(printed) - {"trainer"}:
        assert printed[part] == stored[part], "run `make schema`"
    assert {"max_epochs", "callbacks+", "precision"} <= stored["trainer"]["properties"].keys()


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_yaml_parses_on_the_real_parser(path, parsers, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = ["--config", str(path)]
    if path.stem in OVERLAYS:
        words = ["--config", str(CONFIGS / "digits.yaml"), *words]
    if path.stem == "wandb":
        pytest.importorskip("wandb", reason="an optional logger")
    parsed = parsers[script_of(path)].parse_args(["fit", *words])
    for key, value in leaves(yaml.safe_load(path.read_text())):
        assert str(parsed.fit[key]) in (str(value), str(float(value)) if _is_number(value) else ""), key


def leaves(values, prefix=""):
    """What a file says, by dotted names; lists and the arguments of classes are left out."""
    for key, value in values.items():
        if isinstance(value, dict) and "class_path" not in value and key != "overrides":
            yield from leaves(value, f"{prefix}{key}.")
        elif not key.endswith("+") and not isinstance(value, dict | list):
            yield f"{prefix}{key}", value


def _is_number(value):
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_yaml_has_a_header_that_says_how_to_run_it_and_what_to_expect(path):
    header = [line for line in path.read_text().splitlines() if line.startswith("#")]
    text = "\n".join(header)
    verb = "pretrain" if script_of(path) == "pretrain" else "train"
    assert f"swin-hf {verb}" in text or f"swin_hf.cli {verb}" in text
    assert "recipes/" not in path.read_text() or "https://github.com/swin-hf/swin-hf" in text  # a wheel has none
    if path.stem not in LOGGERS:
        assert "Expect:" in text


def test_an_unknown_key_is_refused_with_its_name(parsers, capsys):
    with pytest.raises(SystemExit):
        parsers["finetune"].parse_args(["fit", "--model.lerning_rate", "1"])
    assert "lerning_rate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "--model.lerning_rate 1",
            "there is no option --model.lerning_rate, the nearest are --model.optimization.learning_rate",
        ),
        ("--trainer.max-epoch 1", "there is no option --trainer.max-epoch, the nearest are --trainer.max_epochs"),
        ("--label_smooth 0", "there is no option --label_smooth, the nearest are --model.mixing.label_smoothing"),
        ("--zzz", "there is no option --zzz; --help lists them"),
        ("--model.optimization.learning_rate high", "--model.optimization.learning_rate is high; it must be a number"),
        ("--data.image_size big", "--data.image_size is big; it must be a whole number or tuple"),
        (
            "--model.optimization.schedule step",
            "--model.optimization.schedule is step; it must be ['cosine', 'linear', 'constant', 'multistep']",
        ),
        ("--config nowhere.yaml", "nowhere.yaml"),
    ],
)
def test_what_the_parser_refuses_is_one_line(words, said, parsers, capsys):
    with pytest.raises(SystemExit) as end:
        parsers["finetune"].parse_args(["fit", *words.split()])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line


@pytest.mark.parametrize(
    ("words", "ours"),
    [
        ("fit --model.lr 1e-3", "--model.optimization.learning_rate"),
        ("fit --lr=1e-3", "--model.optimization.learning_rate"),
        ("--epochs 3", "--trainer.max_epochs"),
        ("fit --num_train_epochs 3", "--trainer.max_epochs"),
        ("fit --batch-size 8", "--data.batch_size"),
        ("fit --per_device_train_batch_size 8", "--data.batch_size"),
        ("fit -b 8", "--data.batch_size"),
        ("fit --output_dir out", "--runs FOLDER and --name NAME"),
        ("fit --resume last.ckpt", "--ckpt_path FILE"),
        ("fit --resume-from-checkpoint last.ckpt", "--ckpt_path FILE"),
        ("fit --data.img_size 224", "--data.image_size"),
        ("fit --model.epochs 3", "--trainer.max_epochs"),
        ("fit --img-size 224", "--data.image_size"),
        ("fit --opt sgd", "--model.optimization.weight_decay (the optimiser is AdamW)"),
        ("fit --drop-path 0.1", "--model.network.drop_path_rate"),
        ("fit --mixup 0.8", "--model.mixing.mixup_alpha"),
        ("fit --model swin_tiny_patch4_window7_224", "--model.preset NAME"),
        ("fit --pretrained", "--model.weights"),
        ("fit -j 4", "--data.num_workers"),
        ("fit --amp", "--trainer.precision"),
        ("fit --data-dir photos", "--data.data_dir"),
        ("fit --num-classes 3", "the number of classes comes from the data"),
        ("fit --data photos", "--data.data_dir"),
        ("fit --do_train", "the word fit in front"),
    ],
)
def test_names_of_other_libraries_are_answered_with_ours(words, ours, capsys):
    with pytest.raises(SystemExit) as end:
        swin_hf_cli.refuse_foreign_options(words.split())
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "has another name here, use " in line and ours in line


def test_the_table_of_names_is_about_options_that_exist(parsers):
    ours = {
        option
        for parser in parsers.values()
        for action in parser._subcommands_action._name_parser_map["fit"]._actions
        for option in action.option_strings
    }
    assert not {name for name in swin_hf_cli.OURS if f"--{name}" in ours or f"-{name}" in ours}
    told = {word for line in swin_hf_cli.NAMES for word in re.findall(r"--[\w.]+\+?", line)}
    assert told and not {word for word in told if word.removesuffix("+") not in ours}
    swin_hf_cli.refuse_foreign_options(["fit", *sorted(ours - {"--model", "--data"})])
    swin_hf_cli.refuse_foreign_options(
        ["fit", "--model.optimization.learning_rate", "-1", "-c", "a.yaml", "--data", "{batch_size: 3}"]
    )


@pytest.mark.parametrize("script", ["finetune.py", "pretrain.py"])
def test_names_of_other_libraries_are_answered_before_torch_is_loaded(script):
    code = f"""
import runpy, sys
sys.argv = [{script!r}, "fit", "--lr", "1", "--epochs", "2"]
try:
    runpy.run_path("recipes/{script}", run_name="__main__")
except SystemExit as end:
    print(end.code, "torch" in sys.modules, "swin_hf" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["2", "False", "False"]
    assert "--lr has another name here, use --model.optimization.learning_rate; --epochs has" in done.stderr


@pytest.mark.parametrize("script", ["finetune.py", "pretrain.py"])
def test_scripts_stay_pages(script):
    assert len((ROOT / "recipes" / script).read_text().splitlines()) <= 20


# Of the paper's recipes: pixels, window, stochastic depth, learning rate for 512 images, warm-up, decay, epochs.
FIGURES_OF_V2 = {
    "imagenet1k_swinv2_tiny": (256, 8, 0.2, 5e-4, 20, 0.05, 300),
    "imagenet1k_swinv2_small": (256, 8, 0.3, 5e-4, 20, 0.05, 300),
    "imagenet1k_swinv2_base": (256, 8, 0.5, 5e-4, 20, 0.05, 300),
    "imagenet22k_swinv2_base": (192, 12, 0.2, 1.25e-4, 5, 0.1, 90),
    "finetune_384_swinv2": (384, 24, 0.2, 2e-5, 5, 1e-8, 30),
    "simmim_pretrain_swinv2": (192, 12, 0.1, 1e-4, 10, 0.05, 800),
    "simmim_finetune_swinv2": (224, 14, 0.1, 1.25e-3, 20, 0.05, 100),
}


@pytest.mark.parametrize("name", FIGURES_OF_V2)
def test_recipes_of_v2_have_the_figures_of_the_paper(name, parsers, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = CONFIGS / f"{name}.yaml"
    fit = parsers[script_of(path)].parse_args(["fit", "--config", str(path)]).fit
    preset = {} if fit.model.weights else SwinV2HFConfig.from_preset(fit.model.preset).to_dict()
    window = fit.model.network.window_size or preset["window_size"]
    drop_path = fit.model.network.drop_path_rate or preset["drop_path_rate"]
    training = fit.model.optimization
    figures = training.learning_rate, training.warmup_epochs, training.weight_decay, fit.trainer.max_epochs
    assert (fit.data.image_size, window, drop_path, *figures) == FIGURES_OF_V2[name]
    assert preset.get("image_size", fit.data.image_size) == fit.data.image_size
    assert "pretrain" not in name or fit.model.masking.norm_targets == 47
    assert name != "simmim_finetune_swinv2" or training.layer_decay == 0.75


def local(tmp_path):
    """The digits on every recipe, and a model that the recipes can start from."""
    digits = CONFIGS / "digits"
    words = ["--data.dataset", "parquet", "--data.data_dir", "null", "--data.num_channels", "3"]
    files = {split: str(digits / f"{split}.parquet") for split in ("train", "test")}
    words += [f"--data.data_files={files}", "--data.splits.test_fraction", "0", "--data.splits.limit_train", "32"]
    return [*words, "--runs", str(tmp_path), "--trainer.fast_dev_run", "true"]


# What each of these recipes starts from is a download; the union of their options runs on a random model.
@pytest.mark.parametrize(
    "names",
    [
        ["imagenet1k_swin_tiny", "ema", "early_stopping", "smoke_cpu"],
        ["linear_probe", "smoke_cpu"],
        ["lora", "smoke_cpu"],
        ["simmim_finetune", "smoke_cpu"],
        pytest.param(["imagenet1k_swinv2_tiny", "smoke_cpu"], marks=pytest.mark.slow),
        pytest.param(["imagenet22k_swinv2_base", "smoke_cpu"], marks=pytest.mark.slow),
        pytest.param(["finetune_384_swinv2", "smoke_cpu"], marks=pytest.mark.slow),
        pytest.param(["simmim_finetune_swinv2", "smoke_cpu"], marks=pytest.mark.slow),
        pytest.param(["imagenet1k_swin_base", "smoke_cpu"], marks=pytest.mark.slow),
        pytest.param(["imagenet1k_swin_small", "smoke_cpu"], marks=pytest.mark.slow),
        pytest.param(["imagenet22k_swin_base", "smoke_cpu"], marks=pytest.mark.slow),
        pytest.param(["finetune_384", "smoke_cpu"], marks=pytest.mark.slow),
        pytest.param(["finetune_imagefolder", "smoke_cpu"], marks=pytest.mark.slow),
        pytest.param(["openclipart", "smoke_cpu"], marks=pytest.mark.slow),
        pytest.param(["fashion_mnist", "smoke_cpu"], marks=pytest.mark.slow),
        pytest.param(["distill", "smoke_cpu"], marks=pytest.mark.slow),
    ],
    ids="+".join,
)
def test_recipe_takes_a_step(names, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    if "lora" in names:
        pytest.importorskip("peft")
    words = [word for name in names for word in ("--config", str(CONFIGS / f"{name}.yaml"))]
    words += ["--model.weights", "null", "--model.distillation.teacher", "null", "--model.network.window_size", "4"]
    words += ["--model.network.overrides", "{embed_dim: 16, depths: [1, 1], num_heads: [1, 2]}"]
    if any("swinv2" in name for name in names):
        words += ["--model.preset", "swinv2_digits_patch4_window4_32"]
    assert run_recipe(SwinClassifier, CONFIGS / "digits.yaml", ["fit", *words, *local(tmp_path)]) == 0
    assert not list(tmp_path.iterdir())  # fast_dev_run leaves nothing


@pytest.mark.parametrize("demo", ["digits", pytest.param("fashion_mnist", marks=pytest.mark.slow)])
def test_demos_take_a_step_with_a_small_v2(demo, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    preset = {"digits": "swinv2_digits_patch4_window4_32", "fashion_mnist": "swinv2_fashion_patch2_window7_28"}[demo]
    words = ["--config", str(CONFIGS / f"{demo}.yaml"), "--model.preset", preset, "--trainer.precision", "32-true"]
    assert run_recipe(SwinClassifier, CONFIGS / "digits.yaml", ["fit", *words, *local(tmp_path)]) == 0


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("simmim_pretrain", "swin_digits_patch4_window4_32"),
        ("simmim_pretrain_swinv2", "swinv2_digits_patch4_window4_32"),
    ],
)
def test_pretraining_recipe_takes_a_step(name, preset, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = ["--config", str(CONFIGS / f"{name}.yaml"), "--config", str(CONFIGS / "smoke_cpu.yaml")]
    words += [
        "--model.preset",
        preset,
        "--model.masking.cell",
        "8",
        "--model.network.overrides",
        "{embed_dim: 16, depths: [1, 1], num_heads: [1, 2]}",
    ]
    assert run_recipe(SwinMaskedImageModeler, CONFIGS / "digits.yaml", ["fit", *words, *local(tmp_path)]) == 0
