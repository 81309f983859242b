"""Code that travels: what was pushed runs where swin_hf is not installed, and nothing of it dangles afterwards."""

import ast
import json
import os
import subprocess
import sys
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import PATIENCE, TINY
from hub_server import WRITER
from safetensors.torch import load_file, save_file
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

import swin_hf
from swin_hf import (
    SwinHFBackbone,
    SwinHFConfig,
    SwinHFForImageClassification,
    SwinHFForMaskedImageModeling,
    SwinV2HFConfig,
    SwinV2HFForImageClassification,
    push,
)
from swin_hf.families import FAMILIES, architectures

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>':DeprecationWarning")  # the client's own
FAMILY = FAMILIES["swin_hf"]
CORE = [path.name for path in FAMILY.travelling_files("image-classification")]
MODEL = Path(swin_hf.__file__).parent / "model"

# A finder that refuses the package stands in front of all others, as the editable installation brings a finder too.
BLOCK = """
import sys

class NoSwinHF:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] == "swin_hf":
            raise ModuleNotFoundError("swin_hf is not installed here", name=name)

sys.meta_path.insert(0, NoSwinHF)
try:
    import swin_hf
except ModuleNotFoundError:
    pass
else:
    sys.exit("the block does not work")
"""


def run_elsewhere(code: str, hub, tmp_path: Path, *arguments: str) -> str:
    """Run code in an isolated interpreter without swin_hf, whose Hub is the loopback one and whose cache is empty."""
    environment = {"PATH": os.environ["PATH"], "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "elsewhere")}
    environment |= {"HF_TOKEN": WRITER, "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", BLOCK + code, *arguments]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "swin_hf is not installed" not in done.stderr
    return done.stdout


def test_core_is_closed():
    """Every file of the core travels, and each needs nothing but torch, transformers and what that is built on."""
    roots = ("modeling_swin_hf.py", "image_processing_swin_hf.py")
    reached = {Path(f).name for root in roots for f in get_relative_import_files(str(MODEL / root))}
    assert reached | set(roots) == set(CORE)
    everything = {path.name for built in architectures().values() for path in built.family.travelling_files(built.task)}
    assert everything == {path.name for path in MODEL.glob("[!_]*.py")}
    of_v2 = {path.name for path in FAMILIES["swinv2_hf"].travelling_files("image-classification")}
    assert of_v2 - set(CORE) == {"configuration_swinv2_hf.py", "modeling_swinv2_hf.py"}  # on top of V1's parts
    for name in everything:
        allowed = {"torch", "transformers", "safetensors", "numpy", "PIL", *sys.stdlib_module_names}
        assert set(get_imports(MODEL / name)) <= allowed
        for node in ast.walk(ast.parse((MODEL / name).read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.ImportFrom) and node.level and not node.module), f"{name}: from . import x"
            assert not (isinstance(node, ast.ImportFrom) and node.level > 1), name


def test_auto_map_names_classes_that_exist():
    for target in (*FAMILY.auto_map("image-classification").values(), *FAMILY.processors.values()):
        module, name = target.split(".")
        assert f"{module}.py" in CORE and hasattr(find_module(module), name)


def find_module(name):
    from importlib import import_module

    return import_module(f"swin_hf.model.{name}")


def test_remote_code_gives_equal_outputs_without_the_package(hub, tiny_model, tmp_path):
    """Every Auto class and the pipeline, in a process in which `import swin_hf` is an error."""
    from PIL import Image

    mim = SwinHFForMaskedImageModeling(deepcopy(tiny_model.config)).eval()
    backbone = SwinHFBackbone(SwinHFConfig(**TINY, out_features=["stage1", "stage3"])).eval()
    pixels = torch.randn(2, 3, 32, 48)
    mask = torch.rand(2, 16 * 24) < 0.5
    for repo, model in (("user/cls", tiny_model), ("user/mim", mim), ("user/backbone", backbone)):
        push(model, repo, tag="v1", endpoint=hub.url)
    # Loaded as everybody else loads: from the file, so that storage is aligned alike on both sides.
    loaded = {
        repo: type(model).from_pretrained(swin_hf.pull(repo, endpoint=hub.url).path).eval()
        for repo, model in (("user/cls", tiny_model), ("user/mim", mim), ("user/backbone", backbone))
    }
    save_file({"pixels": pixels, "mask": mask}, tmp_path / "inputs.safetensors")
    Image.effect_noise((60, 50), 90).convert("RGB").save(tmp_path / "image.png")
    output = run_elsewhere(
        """
import json
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (AutoBackbone, AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification,
                          AutoModelForMaskedImageModeling, pipeline)
torch.set_num_threads(1)
inputs = load_file("inputs.safetensors")
pixels, mask = inputs["pixels"], inputs["mask"]
trust = {"trust_remote_code": True, "revision": "v1"}
config = AutoConfig.from_pretrained("user/cls", **trust)
assert type(config).__module__.startswith("transformers_modules."), type(config).__module__
classifier = AutoModelForImageClassification.from_pretrained("user/cls", **trust).eval()
assert type(classifier).__module__.startswith("transformers_modules.")
with torch.no_grad():
    outputs = {
        "logits": classifier(pixels).logits,
        "hidden": AutoModel.from_pretrained("user/cls", **trust).eval()(pixels).last_hidden_state,
        "pixels": AutoModelForMaskedImageModeling.from_pretrained("user/mim", **trust).eval()(pixels, mask)[1],
    }
    for n, x in enumerate(AutoBackbone.from_pretrained("user/backbone", **trust).eval()(pixels).feature_maps):
        outputs[f"map{n}"] = x
save_file({k: v.contiguous() for k, v in outputs.items()}, "outputs.safetensors")
guess = pipeline("image-classification", model="user/cls", **trust)("image.png")
processor = AutoImageProcessor.from_pretrained("user/cls", **trust)
with torch.no_grad():
    scores = classifier(**processor(Image.open("image.png"), return_tensors="pt")).logits.softmax(-1)[0]
assert abs(guess[0]["score"] - scores.max().item()) < 1e-5
classifier.save_pretrained("saved-again")
AutoModelForImageClassification.from_pretrained("saved-again", trust_remote_code=True)
from pathlib import Path
Path("foreign").mkdir()
Path("foreign", "config.json").write_text('{"model_type": "swin"}')
try:
    type(classifier).from_pretrained("foreign")
except ValueError as error:
    assert "is not a model of type swin_hf" in str(error) and "pip install swin-hf" in str(error), error
else:
    raise SystemExit("a foreign model was loaded without the package")
import sys
assert not [name for name in sys.modules if name.split(".")[0] == "swin_hf"]
print("done")
""",
        hub,
        tmp_path,
    )
    assert output.strip().endswith("done")
    theirs = load_file(tmp_path / "outputs.safetensors")
    with torch.no_grad():
        ours = {
            "logits": loaded["user/cls"](pixels).logits,
            "hidden": loaded["user/cls"].swin(pixels).last_hidden_state,
            "pixels": loaded["user/mim"](pixels, mask).reconstruction,
        }
        ours |= {f"map{n}": x for n, x in enumerate(loaded["user/backbone"](pixels).feature_maps)}
    assert theirs.keys() == ours.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], msg=lambda text, name=name: f"{name}: {text}")


def test_remote_code_of_v2_gives_equal_outputs_without_the_package(hub, tmp_path):
    torch.manual_seed(0)
    model = SwinV2HFForImageClassification(SwinV2HFConfig(**TINY, pretrained_window_sizes=(3, 3, 2))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.fill_(1.0)
    push(model, "user/v2", tag="v1", endpoint=hub.url)
    pixels = torch.randn(2, 3, 32, 48)
    save_file({"pixels": pixels}, tmp_path / "inputs.safetensors")
    run_elsewhere(
        """
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification
torch.set_num_threads(1)
model = AutoModelForImageClassification.from_pretrained("user/v2", trust_remote_code=True, revision="v1").eval()
assert type(model).__module__.startswith("transformers_modules.")
assert model.config.pretrained_window_sizes == [3, 3, 2]
with torch.no_grad():
    save_file({"logits": model(load_file("inputs.safetensors")["pixels"]).logits}, "outputs.safetensors")
model.set_input_size(64, 6)
assert model.config.pretrained_window_sizes == [3, 3, 2]
""",
        hub,
        tmp_path,
    )
    with torch.no_grad():
        torch.testing.assert_close(model(pixels).logits, load_file(tmp_path / "outputs.safetensors")["logits"])


def test_installed_package_never_runs_code_of_a_repository(hub, tiny_model, tmp_path, monkeypatch):
    """Even with trust_remote_code=True: the class of this package wins over a repository's hostile files."""
    from transformers import AutoModelForImageClassification

    push(tiny_model, "user/evil", endpoint=hub.url)
    trap = b"import pathlib\npathlib.Path(%r).write_text('ran')\n" % str(tmp_path / "ran")
    hub.put("user/evil", {name: trap + hub.files("user/evil")[name] for name in CORE})
    pulled = swin_hf.pull("user/evil", endpoint=hub.url)
    for trust in (False, True):
        model = AutoModelForImageClassification.from_pretrained(pulled.path, trust_remote_code=trust)
        assert type(model) is SwinHFForImageClassification
    swin_hf.load_backbone("user/evil", endpoint=hub.url)
    push(pulled.path, "user/again", endpoint=hub.url)
    assert not (tmp_path / "ran").exists()
    assert hub.files("user/again")["modeling_swin_hf.py"] == (MODEL / "modeling_swin_hf.py").read_bytes()


def test_foreign_auto_map_is_not_passed_on(hub, tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "other/repo--modeling.Evil"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    push(tmp_path / "model", "user/clean", endpoint=hub.url)
    assert json.loads(hub.files("user/clean")["config.json"])["auto_map"] == FAMILY.auto_map("image-classification")


def test_saving_a_pulled_model_again_leaves_no_dangling_auto_map(hub, tiny_model, tmp_path):
    push(tiny_model, "user/tiny", endpoint=hub.url)
    pulled = swin_hf.pull("user/tiny", endpoint=hub.url)
    SwinHFForImageClassification.from_pretrained(pulled.path).save_pretrained(tmp_path / "again")
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())
    assert not list((tmp_path / "again").glob("*.py"))
    # The pulled folder itself is whole: every file that its auto_map needs came along.
    assert {path.name for path in pulled.path.glob("*.py")} == set(CORE)


def test_swin_hf_is_importable_here():
    """Else the tests above would prove nothing by its absence there."""
    assert find_spec("swin_hf") is not None


# The code of a pushed folder as a plain package: transformers' own loader insists on every file that one file imports.
LOAD_AS_PACKAGE = """
import builtins, sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
folder, way = Path(sys.argv[1]), sys.argv[2]
ordinary = builtins.__import__

def without_private_names(name, globals=None, locals=None, fromlist=(), level=0):
    ours = (globals or {}).get("__package__") == folder.name
    if ours and name.split(".")[0] == "torch" and any(n.startswith("_") for n in (*name.split("."), *(fromlist or ()))):
        raise ImportError(f"this torch has no {fromlist} in {name}")
    return ordinary(name, globals, locals, fromlist, level)

if way == "private names raise":
    builtins.__import__ = without_private_names
sys.path.insert(0, str(folder.parent))
modeling = __import__(f"{folder.name}.modeling_swin_hf", fromlist=["x"])
assert not [name for name in sys.modules if name.startswith(f"{folder.name}.kernels_") and way != "whole"]
attention = sys.modules[f"{folder.name}.attention"]
model = modeling.SwinHFForImageClassification.from_pretrained(folder, strict=True)
x = load_file("inputs.safetensors")["pixels"]
outputs = {}
for backend in ("eager", "sdpa", "auto"):
    model.set_attn_implementation(backend)
    model.eval()
    with torch.no_grad():
        outputs[backend] = model(x).logits
    model.zero_grad()
    model(x, labels=torch.tensor([0, 1])).loss.backward()
    outputs |= {f"{backend} {name}": parameter.grad.clone() for name, parameter in model.named_parameters()}
try:
    attention.choose_backend(model.config, x.device, x.dtype, 32, 0.0, (7, 7))
    model.set_attn_implementation("triton")
    model(x)
except NotImplementedError as error:
    print(error)
attention.clear_caches()
save_file(outputs, "outputs.safetensors")
"""


@pytest.mark.parametrize("way", ["whole", "files deleted", "private names raise"])
def test_nothing_but_time_depends_on_the_optional_files(way, hub, tiny_model, tmp_path):
    """Without the kernels, or on a torch that has lost the private names that they import, results are the same."""
    push(tiny_model, "user/tiny", endpoint=hub.url)
    folder = tmp_path / "pushed"
    swin_hf.pull("user/tiny", local_dir=folder, endpoint=hub.url)
    optional = sorted(folder.glob("kernels_*.py"))
    assert [path.name for path in optional] == ["kernels_cpu.py", "kernels_triton.py"]
    if way == "files deleted":
        for path in optional:
            path.unlink()
    pixels = torch.randn(2, 3, 32, 48)
    save_file({"pixels": pixels}, tmp_path / "inputs.safetensors")
    said = run_elsewhere(LOAD_AS_PACKAGE, hub, tmp_path, str(folder), way)
    assert "attn_implementation='triton' cannot run here" in said
    assert ("the kernels cannot be imported" in said) == (way != "whole")
    theirs = load_file(tmp_path / "outputs.safetensors")
    with torch.no_grad():
        logits = tiny_model(pixels).logits
    for backend in ("eager", "sdpa", "auto"):
        torch.testing.assert_close(theirs[backend], logits, rtol=1e-5, atol=2e-6)
    tiny_model(pixels, labels=torch.tensor([0, 1])).loss.backward()
    for name, parameter in tiny_model.named_parameters():
        for backend in ("eager", "sdpa", "auto"):
            torch.testing.assert_close(theirs[f"{backend} {name}"], parameter.grad, rtol=1e-4, atol=1e-6)


def test_only_the_optional_files_use_private_names_of_torch():
    """In any other file, no name of torch that begins with an underscore is imported or read."""
    for name in set(CORE) - {"kernels_cpu.py", "kernels_triton.py"}:
        for node in ast.walk(ast.parse((MODEL / name).read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
                assert not [alias.name for alias in node.names if alias.name.startswith("_")], name
            if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
                root = ast.unparse(node).split(".")[0]
                assert root not in ("torch", "F", "nn", "forward_ad", "init"), f"{name}: {ast.unparse(node)}"
