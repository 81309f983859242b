"""The package as a whole: its names, its layers, what importing it costs, what its wheel holds."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import swin_hf

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "swin_hf"

# An import may go to a lower number, or stay in its room.
LAYERS = {
    "model": 0,
    "text": 0,
    "presets": 1,
    "families": 2,
    "classes": 1,
    "counting": 1,
    "files": 1,
    "memory": 1,
    "ranges": 1,
    "processing": 2,
    "folders": 3,
    "checkpoints": 4,
    "hub": 5,
    "loading": 6,
    "explain": 7,
    "export": 7,
    "predict": 7,
    "segment": 8,
    "demo": 9,
    "training": 9,
    "cli": 10,
}

PUBLIC_NAMES = [
    "SwinHFBackbone",
    "SwinHFConfig",
    "SwinHFForImageClassification",
    "SwinHFForMaskedImageModeling",
    "SwinHFForSemanticSegmentation",
    "SwinHFModel",
    "SwinV2HFBackbone",
    "SwinV2HFConfig",
    "SwinV2HFForImageClassification",
    "SwinV2HFForMaskedImageModeling",
    "SwinV2HFForSemanticSegmentation",
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
    "replace_backbone",
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


def too_many_arguments(path: Path) -> list[str]:
    """Public functions, constructors and dataclasses of a module with more than 12 arguments or fields of their own."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and (not node.name.startswith("_") or node.name == "__init__"):
            arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
            count = sum(argument.arg not in ("self", "cls") for argument in arguments)
        elif isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in node.decorator_list):
            count = sum(isinstance(field, ast.AnnAssign) for field in node.body)
        else:
            continue
        found += [node.name] * (count > 12)
    return found


# Fields that are filled by keyword and read by name, not options to choose: what a run leaves, and a table of keys.
RECORDS = {"TrainingFacts", "Layout"}


def test_nothing_public_takes_more_than_12_arguments():
    found = {name for path in PACKAGE.rglob("*.py") for name in too_many_arguments(path)}
    assert found - RECORDS == set()


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


# A public name is imported from the room that defines it, whichever way it is written.
ROOMS = {name: getattr(swin_hf, name).__module__.split(".")[1] for name in PUBLIC_NAMES if name != "__version__"}


def imported_rooms(code: str, package: list[str]) -> set[str]:
    """Rooms of swin_hf that the code of a module in ``package`` imports, anywhere in it, type checking aside."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names += [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names.append(ast.unparse(node))  # swin_hf.push
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.append(node.value)  # import_module("swin_hf.hub")
    parts = [name.split(".")[1] for name in names if re.fullmatch(r"swin_hf\.[\w.]+", name)]
    return {ROOMS.get(part, part) for part in parts} & set(LAYERS)


@pytest.mark.parametrize(
    "code",
    [
        "from swin_hf.hub import push",
        "from swin_hf.hub.publish import push",
        "from swin_hf import push",
        "from swin_hf import hub",
        "import swin_hf.hub.publish",
        "from ..hub import push",
        "from .. import push",
        "from .. import hub",
        "def f():\n    from ..hub import push",
        "import swin_hf\n\ndef f():\n    swin_hf.push('model', 'user/model')",
        "from importlib import import_module\nimport_module('swin_hf.hub.publish')",
    ],
)
def test_every_form_of_import_is_seen(code):
    assert imported_rooms(code, ["swin_hf", "training"]) == {"hub"}
    assert imported_rooms(f"if TYPE_CHECKING:\n    {code}" if "\n" not in code else "", ["swin_hf", "x"]) == set()


def modules_of(room: str) -> list[Path]:
    return sorted((PACKAGE / room).rglob("*.py")) if (PACKAGE / room).is_dir() else [PACKAGE / f"{room}.py"]


@pytest.mark.parametrize("room", LAYERS)
def test_imports_go_down(room):
    for path in modules_of(room):
        rooms = imported_rooms(path.read_text(), ["swin_hf", *path.relative_to(PACKAGE).parts[:-1]])
        upward = {other for other in rooms if other != room and LAYERS[other] >= LAYERS[room]}
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


def imported_packages(path: Path) -> set[str]:
    """Packages that are neither ours nor Python's, imported anywhere in a module, in any form."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module or "")
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            names |= {arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)}
    return {name.split(".")[0] for name in names} - {"swin_hf", "swin_hf_cli", *sys.stdlib_module_names}


def test_declared_is_what_is_imported():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def declared(requirements: list[str]) -> set[str]:
        distributions = {re.split(r"[^\w-]", text)[0] for text in requirements}
        return {{"pillow": "PIL", "pyyaml": "yaml"}.get(name, name.replace("-", "_")) for name in distributions}

    paths = [*PACKAGE.rglob("*.py"), ROOT / "swin_hf_cli.py"]
    imported = set().union(*map(imported_packages, paths))
    imported.remove("triton")  # comes with the torch that has GPUs; without it, its backend says so
    imported |= {"tensorboard", "onnxscript"}  # Lightning and torch import them, for a logger and for torch.onnx
    extras = project["optional-dependencies"]
    names = ("onnx", "openvino", "decode", "lora", "trackio", "demo")
    optional = declared([text for name in names for text in extras[name]])
    core = declared(project["dependencies"])
    assert imported - {"timm"} == core | optional  # timm checks a conversion where it is installed
    assert "timm" in declared(extras["bench"])
    needed = set().union(*(top_level_imports(path) for path in paths))
    assert not needed & optional, "what is optional is imported only where it is used"


def top_level_imports(path: Path) -> set[str]:
    """Packages that importing a module loads."""
    body = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [alias.name for node in body if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in body if isinstance(node, ast.ImportFrom) and not node.level]
    return {name.split(".")[0] for name in names}


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
