"""The package as a whole: its names, its layers, what importing it costs, what its wheel holds."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import swin_hf

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "swin_hf"

# An import may go to a lower number, or stay in its room.
LAYERS = {
    "model": 0,
    "presets": 1,
    "families": 2,
    "classes": 1,
    "files": 1,
    "memory": 1,
    "ranges": 1,
    "text": 1,
    "processing": 2,
    "folders": 3,
    "checkpoints": 4,
    "hub": 5,
    "loading": 6,
    "explain": 7,
    "export": 7,
    "predict": 7,
    "training": 8,
    "cli": 9,
}

PUBLIC_NAMES = [
    "SwinHFBackbone",
    "SwinHFConfig",
    "SwinHFForImageClassification",
    "SwinHFForMaskedImageModeling",
    "SwinHFModel",
    "SwinV2HFBackbone",
    "SwinV2HFConfig",
    "SwinV2HFForImageClassification",
    "SwinV2HFForMaskedImageModeling",
    "SwinV2HFModel",
    "__version__",
    "attention_maps",
    "convert_checkpoint",
    "export_checkpoint",
    "export_onnx",
    "export_openvino",
    "export_torch",
    "grad_cam",
    "list_presets",
    "load_backbone",
    "load_checkpoint",
    "pull",
    "push",
]


def run_python(code: str, *arguments: str) -> str:
    """Run code in a process of its own, away from the checkout's test modules."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout


def test_public_names_are_exactly_these_and_all_resolve():
    assert swin_hf.__all__ == PUBLIC_NAMES
    for name in PUBLIC_NAMES:
        assert getattr(swin_hf, name) is not None


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'SwinHFModle'"):
        swin_hf.SwinHFModle  # noqa: B018


def test_import_loads_torch_and_transformers_and_none_of_the_heavy_packages():
    heavy = "lightning datasets matplotlib onnx openvino timm peft tensorboard"
    code = "import sys, swin_hf; print(*[name for name in sys.argv[1:] if name in sys.modules])"
    assert run_python(code, "torch", "transformers", *heavy.split()).split() == ["torch", "transformers"]


def test_auto_classes_find_the_family_after_a_bare_import():
    code = """
import swin_hf
from transformers import AutoConfig, AutoModel, AutoBackbone
from transformers import AutoModelForImageClassification, AutoModelForMaskedImageModeling
config = AutoConfig.for_model("swin_hf", image_size=32, embed_dim=16, depths=[1, 1], num_heads=[1, 2], encoder_stride=8)
for auto in AutoModel, AutoModelForImageClassification, AutoModelForMaskedImageModeling, AutoBackbone:
    print(type(auto.from_config(config)).__name__)
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
print(*sorted(IMAGE_PROCESSOR_MAPPING[type(config)]))
"""
    assert run_python(code).split() == [
        "SwinHFModel",
        "SwinHFForImageClassification",
        "SwinHFForMaskedImageModeling",
        "SwinHFBackbone",
        "pil",
        "torchvision",
    ]


def imported_rooms(path: Path) -> set[str]:
    """Rooms of swin_hf that a module imports, anywhere in it, type checking aside."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    package = ["swin_hf", *path.relative_to(PACKAGE).parts[:-1]]
    rooms = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = [*base, *(node.module or "").split(".")] if node.module else base
            names = [".".join([*module, alias.name]) for alias in node.names]
        else:
            continue
        rooms |= {name.split(".")[1] for name in names if name.startswith("swin_hf.")}
    return rooms & set(LAYERS)


def modules_of(room: str) -> list[Path]:
    return sorted((PACKAGE / room).rglob("*.py")) if (PACKAGE / room).is_dir() else [PACKAGE / f"{room}.py"]


@pytest.mark.parametrize("room", LAYERS)
def test_imports_go_down(room):
    for path in modules_of(room):
        upward = {other for other in imported_rooms(path) if other != room and LAYERS[other] >= LAYERS[room]}
        assert not upward, f"{path.relative_to(ROOT)} imports {upward}, which is no lower than {room}"


def test_every_room_has_a_layer():
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - {"__init__"} == set(LAYERS)


def test_recipes_and_tests_of_behaviour_use_public_names_only():
    for path in (ROOT / "recipes").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("swin_hf"):
                private = [alias.name for alias in node.names if alias.name.startswith("_")]
                assert not private, f"{path.name} imports {private}"


def test_wheel_holds_the_package_and_nothing_else(tmp_path):
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    sources = {path.relative_to(ROOT).as_posix() for path in PACKAGE.rglob("*.py")}
    assert sources <= set(names)
    assert "swin_hf/py.typed" in names
    assert any(name.startswith("swin_hf/hub/") and name.endswith(".md.jinja") for name in names), (
        "the card template is missing"
    )
    assert {"swin_hf/training/configs/digits.yaml", "swin_hf/training/configs/digits/train.parquet"} <= set(names)
    assert {name.split("/")[0] for name in names} == {
        "swin_hf",
        "swin_hf_cli.py",
        f"swin_hf-{swin_hf.__version__}.dist-info",
    }
