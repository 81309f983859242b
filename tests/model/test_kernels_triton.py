"""The fused kernels against a definition written with loops, in Triton's interpreter; on a GPU where there is one.

Triton decides when it is imported whether kernels are interpreted, so those tests run in a process of their own:
``TRITON_INTERPRET=1 pytest tests/model/test_kernels_triton.py`` shows them one by one.
"""

import importlib
import importlib.util
import itertools
import os
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from swin_hf.model import kernels_triton
from swin_hf.model.kernels_triton import choose_launch, reasons_against_triton, triton_window_attention
from swin_hf.model.windows import WindowGeometry, window_geometry

# Of the interpreter of Triton 3.6.
pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0:DeprecationWarning")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the process of test_kernels_in_the_interpreter")
without_interpreter = pytest.mark.skipif(INTERPRETED, reason="runs where kernels are compiled")

# Largest differences from float64 seen, times about three. float16 has 11 bits, and rounds the probabilities and the
# gradients of the scores before the matrix products, as every implementation does.
TOLERANCE = {torch.float32: (2e-6, 2e-5), torch.float16: (2e-3, 6e-3)}


def definition(
    qkv: Tensor,
    table: Tensor,
    table_window: tuple[int, int],
    geometry: WindowGeometry,
    num_heads: int,
    scaling: float,
    mask_padding: bool = False,
) -> Tensor:
    """Window attention from the paper's words, one window and head at a time; no roll, no partition, no mask tensor."""
    (height, width), (rows, columns), (shift_h, shift_w) = geometry.padded, geometry.window, geometry.shift
    head_dim = qkv.shape[-1] // (3 * num_heads)
    members: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for y, x in itertools.product(range(height), range(width)):
        # Windows are displaced by the shift; what sticks out at the far end continues at the near one.
        window = ((y - shift_h) % height // rows, (x - shift_w) % width // columns)
        members.setdefault(window, []).append((y, x))

    out = torch.zeros(*qkv.shape[:3], num_heads * head_dim, dtype=qkv.dtype)
    for tokens in members.values():
        tokens.sort(key=lambda t: ((t[0] - shift_h) % height, (t[1] - shift_w) % width))
        entries, apart = [], []
        for (y, x), (key_y, key_x) in itertools.product(tokens, tokens):
            offset_y = (y - shift_h) % height - (key_y - shift_h) % height
            offset_x = (x - shift_w) % width - (key_x - shift_w) % width
            entries.append(
                (offset_y + table_window[0] - 1) * (2 * table_window[1] - 1) + offset_x + table_window[1] - 1
            )
            apart.append(((y < shift_h) != (key_y < shift_h)) or ((x < shift_w) != (key_x < shift_w)))
        n = len(tokens)
        mask = torch.tensor(apart).view(n, n).to(qkv.dtype) * -100
        if mask_padding:
            outside = torch.tensor([y >= geometry.grid[0] or x >= geometry.grid[1] for y, x in tokens])
            mask = mask.masked_fill(outside, -1e9)
        y, x = torch.tensor(tokens).unbind(1)
        for image, head in itertools.product(range(qkv.shape[0]), range(num_heads)):
            q, k, v = qkv[image, y, x].view(n, 3, num_heads, head_dim)[:, :, head].unbind(1)
            bias = table[torch.tensor(entries), head].view(n, n)
            attended = ((q @ k.T) * scaling + bias + mask).softmax(-1) @ v
            out[image, y, x, head * head_dim : (head + 1) * head_dim] = attended
    return out


def inputs(
    geometry: WindowGeometry,
    table_window: tuple[int, int],
    num_heads: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
    batch: int = 1,
    device: str = "cpu",
) -> tuple[Tensor, Tensor]:
    """qkv in the middle of a buffer of NaN, so that a read outside it shows, and a bias table that matters."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, *geometry.padded, 3 * num_heads * head_dim)
    buffer = torch.full((torch.Size(shape).numel() + 8192,), torch.nan, dtype=dtype, device=device)
    qkv = buffer[4096:-4096].view(shape)
    qkv.copy_(torch.randn(shape, generator=generator))
    rows = (2 * table_window[0] - 1) * (2 * table_window[1] - 1)
    table = torch.randn(rows, num_heads, generator=generator).to(device)
    return qkv.requires_grad_(), table.requires_grad_()


def assert_kernels_agree(
    window: tuple[int, int],
    grid: tuple[int, int],
    *,
    shifted: bool = True,
    num_heads: int = 1,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    batch: int = 1,
    mask_padding: bool = False,
    always_partition: bool = False,
) -> None:
    """Compare outputs and both gradients with the definition in float64."""
    geometry = window_geometry(grid, window, shifted, shift_per_axis=True, always_partition=always_partition)
    qkv, table = inputs(geometry, window, num_heads, head_dim, dtype, batch)
    arguments = (window, geometry, num_heads, head_dim**-0.5, mask_padding)
    out = triton_window_attention(qkv, table, *arguments)
    assert out.dtype == dtype
    assert out.is_contiguous()
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    if mask_padding:  # the model crops what padded tokens attend to
        grad[:, grid[0] :], grad[:, :, grid[1] :] = 0, 0
    grads = torch.autograd.grad(out, (qkv, table), grad)

    exact = [t.detach().double().requires_grad_() for t in (qkv, table)]
    expected = definition(*exact, *arguments)
    expected_grads = torch.autograd.grad(expected, exact, grad.double())
    if mask_padding:
        out, expected = out[:, : grid[0], : grid[1]], expected[:, : grid[0], : grid[1]]
    tolerance, grad_tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=grad_tolerance)


@pytest.fixture
def poisoned():
    """Memory from ``torch.empty`` holds NaN."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@without_interpreter
@pytest.mark.parametrize(
    "tier",
    ["not slow and not gpu", pytest.param("slow and not gpu", marks=[pytest.mark.slow, pytest.mark.timeout(7200)])],
)
def test_kernels_in_the_interpreter(tier):
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", "interpreter", "-m", tier]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", __file__, *options],
        env={k: v for k, v in os.environ.items() if not k.startswith("PYTEST")} | {"TRITON_INTERPRET": "1"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert " passed" in run.stdout


QUICK = {
    "w7-shifted-two-heads-two-images": {"window": (7, 7), "grid": (7, 14), "num_heads": 2, "batch": 2},
    "w7-padded": {"window": (7, 7), "grid": (10, 12)},
    "w7-padded-mask_padding": {"window": (7, 7), "grid": (9, 8), "mask_padding": True},
    "w8-one-axis-fp16": {"window": (8, 8), "grid": (8, 16), "dtype": torch.float16, "head_dim": 32},
    "w4x3-rectangular": {"window": (4, 3), "grid": (12, 9), "num_heads": 3},
    "w7x4-larger-than-the-map": {"window": (7, 4), "grid": (5, 9), "head_dim": 64},
    "w5-always-partition": {"window": (5, 5), "grid": (3, 7), "always_partition": True},
    "w9x8-blocks": {"window": (9, 8), "grid": (9, 13), "mask_padding": True},
}
THOROUGH = {
    f"w{window}-{shift}-d{head_dim}-{str(dtype)[6:]}": {
        "window": (window, window),
        "grid": grid,
        "shifted": shift != "unshifted",
        "num_heads": 2,
        "head_dim": head_dim,
        "dtype": dtype,
        "batch": 2 if window < 9 else 1,
    }
    for window in (7, 8, 12, 14)
    for shift, grid in {
        "unshifted": (window, 2 * window),
        "rows": (2 * window, window),
        "both": (window + 2, 2 * window - 1),
    }.items()
    for head_dim, dtype in ((16, torch.float16), (32, torch.float32), (64, torch.float16))
    if window < 12 or head_dim == 32 or shift == "both"
}


@interpreted
@pytest.mark.parametrize("case", QUICK.values(), ids=QUICK)
def test_interpreter_agrees_with_the_definition(case, poisoned):
    assert_kernels_agree(**case)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("case", THOROUGH.values(), ids=THOROUGH)
def test_interpreter_agrees_with_the_definition_at_real_sizes(case, poisoned):
    assert_kernels_agree(**case)


@interpreted
@pytest.mark.parametrize("multiprocessors", [1, 2, 7, 40])
def test_interpreter_shares_windows_among_any_number_of_programs(multiprocessors, monkeypatch, poisoned):
    # 3 images of 3 x 2 windows in four kinds: most numbers of programs divide nothing evenly.
    monkeypatch.setattr(kernels_triton, "INTERPRETED_MULTIPROCESSORS", multiprocessors)
    monkeypatch.setattr(kernels_triton, "choose_launch", lambda *_: kernels_triton.Launch(16, 16, 1, 1, occupancy=1))
    assert_kernels_agree((3, 4), (9, 8), num_heads=2, batch=3)


@interpreted
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
def test_interpreter_passes_opcheck():
    geometry = window_geometry((5, 9), (4, 3), True)
    qkv, table = inputs(geometry, (4, 3), 1, 16)
    sizes = [*geometry.grid, *geometry.window, *geometry.shift, 4, 3]
    torch.library.opcheck(torch.ops.swin_hf.window_attention.default, (qkv, table, 1, sizes, 0.25, False))


@interpreted
def test_interpreter_leaves_out_a_gradient_that_nobody_needs():
    geometry = window_geometry((4, 6), (4, 3), True)
    qkv, table = inputs(geometry, (4, 3), 1, 16)
    out = triton_window_attention(qkv, table.detach(), (4, 3), geometry, 1, 0.25)
    (frozen,) = torch.autograd.grad(out.sum(), qkv)
    out = triton_window_attention(qkv, table, (4, 3), geometry, 1, 0.25)
    learned, _ = torch.autograd.grad(out.sum(), (qkv, table))
    torch.testing.assert_close(frozen, learned)


@interpreted
def test_interpreter_takes_an_empty_batch():
    geometry = window_geometry((4, 6), (4, 3), True)
    qkv, table = inputs(geometry, (4, 3), 1, 16, batch=0)
    out = triton_window_attention(qkv, table, (4, 3), geometry, 1, 0.25)
    out.sum().backward()
    assert out.shape == (0, 4, 6, 16)
    assert table.grad.count_nonzero() == 0


@interpreted
def test_interpreter_computes_in_the_dtype_of_autocast():
    geometry = window_geometry((4, 6), (4, 3), True)
    qkv, table = inputs(geometry, (4, 3), 1, 16)
    with torch.autocast("cpu", dtype=torch.float16):
        out = triton_window_attention(qkv, table, (4, 3), geometry, 1, 0.25)
    assert out.dtype == torch.float16
    out.float().sum().backward()
    assert qkv.grad.dtype == table.grad.dtype == torch.float32


@interpreted
def test_interpreter_compiles_to_one_graph_for_every_batch():
    geometry = window_geometry((4, 6), (4, 3), True)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def attend(qkv: Tensor, table: Tensor) -> Tensor:
        assert not reasons_against_triton(qkv.device, qkv.dtype, 16, 0.0, geometry.window)
        return triton_window_attention(qkv * 1.0, table, (4, 3), geometry, 1, 0.25)

    for batch in (2, 3, 5):
        qkv, table = inputs(geometry, (4, 3), 1, 16, batch=batch)
        torch._dynamo.mark_dynamic(qkv, 0)
        out = attend(qkv, table)
        grads = torch.autograd.grad(out.square().sum(), (qkv, table))
        plain = triton_window_attention(qkv, table, (4, 3), geometry, 1, 0.25)
        plain_grads = torch.autograd.grad(plain.square().sum(), (qkv, table))
        torch.testing.assert_close((out, *grads), (plain, *plain_grads))
    assert counter.frame_count == 1


@interpreted
def test_interpreter_runs_a_whole_model_as_eager_does():
    from swin_hf import SwinHFConfig, SwinHFForImageClassification

    config = SwinHFConfig(
        image_size=(20, 26),
        patch_size=2,
        embed_dim=16,
        depths=(2, 2),
        num_heads=(1, 2),
        window_size=(4, 3),
        num_labels=3,
    )
    model = SwinHFForImageClassification(config).eval()
    pixels = torch.randn(2, 3, 20, 26)
    results = {}
    for backend in ("eager", "triton"):
        model.set_attn_implementation(backend)
        model.zero_grad()
        logits = model(pixels).logits
        logits.square().sum().backward()
        results[backend] = [logits, *(p.grad.clone() for p in model.parameters())]
    torch.testing.assert_close(results["triton"], results["eager"], rtol=1e-4, atol=1e-5)


@without_interpreter
def test_reasons_name_everything_that_is_wrong():
    reasons = reasons_against_triton(torch.device("cpu"), torch.float64, 24, 0.1, (40, 40))
    assert "; ".join(reasons) == (
        "the device is cpu; the kernels need CUDA; "
        "the dtype is torch.float64; the kernels take float16, bfloat16 and float32; "
        "a head has 24 channels; the kernels take 16, 32 and 64; "
        "attention_probs_dropout_prob is 0.1; the kernels do not drop probabilities; "
        "the window 40x40 has more than 1024 tokens"
    )


@pytest.mark.parametrize(
    ("capability", "hip", "reasons"),
    [
        ((9, 0), None, []),
        ((8, 0), None, []),
        ((7, 5), None, ["the GPU is older than Ampere (compute capability 8.0)"]),
        ((9, 4), "6.4", ["the device is an AMD GPU; the kernels are built and tested for NVIDIA"]),
    ],
    ids=["hopper", "ampere", "turing", "amd"],
)
def test_reasons_know_the_gpu(capability, hip, reasons, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert reasons_against_triton(torch.device("cuda"), torch.float16, 32, 0.0) == reasons


def test_without_a_c_compiler_auto_does_not_try(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(kernels_triton, "C_COMPILER", False)
    (reason,) = reasons_against_triton(torch.device("cuda"), torch.float16, 32, 0.0)
    assert reason == "there is no C compiler, with which Triton builds its launcher; install gcc, or set CC"


def test_a_transform_that_differentiates_is_a_reason(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    seen = []

    def look(x):
        seen.extend(reasons_against_triton(torch.device("cuda"), torch.float16, 32, 0.0))
        return x.sum()

    torch.func.grad(look)(torch.ones(2))
    assert seen == ["a transform of torch.func is active, which cannot differentiate the kernels"]


@without_interpreter
def test_a_copy_without_triton_imports_and_says_what_is_missing(monkeypatch):
    # Also what happens when a checkpoint from the Hub brings its own copy of this module.
    package = types.ModuleType("copied_core")
    package.__path__ = [str(Path(kernels_triton.__file__).parent)]
    monkeypatch.setitem(sys.modules, "copied_core", package)
    monkeypatch.setitem(sys.modules, "triton", None)
    copy = importlib.import_module("copied_core.kernels_triton")
    for name in ("copied_core.kernels_triton", "copied_core.windows"):
        monkeypatch.delitem(sys.modules, name)
    (reason,) = copy.reasons_against_triton(torch.device("cuda"), torch.float16, 32, 0.0)
    assert re.match(r"triton cannot be imported \(.*\); install the triton that your torch release names", reason)
    assert copy.NAMESPACE != kernels_triton.NAMESPACE == "swin_hf"


def test_calls_that_do_not_fit_say_what_would():
    geometry = window_geometry((5, 9), (4, 3), True)
    qkv, table = torch.zeros(1, 8, 9, 48), torch.zeros(35, 1)
    with pytest.raises(ValueError, match=r"qkv has shape \(1, 5, 9, 48\).*\(B, 8, 9, 3 \* 1 \* d\): pad the map"):
        triton_window_attention(qkv[:, :5], table, (4, 3), geometry, 1, 0.25)
    with pytest.raises(ValueError, match=r"bias table has shape \(36, 1\); a window of 4x3 with 1 heads has \(35, 1\)"):
        triton_window_attention(qkv, torch.zeros(36, 1), (4, 3), geometry, 1, 0.25)
    with pytest.raises(ValueError, match=r"the window \(4, 3\) is larger than \(3, 4\)"):
        triton_window_attention(qkv, table, (3, 4), geometry, 1, 0.25)
    with pytest.raises(NotImplementedError, match=r"cannot run here: .*a head has 8 channels"):
        triton_window_attention(qkv, torch.zeros(35, 2), (4, 3), geometry, 2, 0.25)


def compile_kernel(
    name: str, window: int, head_dim: int, element: str, arch: int, mask_padding: bool = False
) -> dict[str, int]:
    """Compile for a GPU that need not be there; say what a program takes."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(kernels_triton, name)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[element]
    launch = choose_launch(name.split("_")[1], window**2, head_dim, dtype, divmod(arch, 10))
    options = launch.options()
    constants = {
        "MH": window,
        "MW": window,
        "D": head_dim,
        "SHIFTED": True,
        "MASK_PADDING": mask_padding,
        "NEED_BIAS": True,
        "PRECISION": "ieee",
        **{key: options.pop(key) for key in ("BLOCK_Q", "BLOCK_K", "STAGES")},
    }
    signature = {}
    for argument in kernel.arg_names:
        if argument in constants:
            signature[argument] = "constexpr"
        elif argument in ("qkv", "out", "grad_out", "grad_qkv"):
            signature[argument] = f"*{element}"
        else:
            signature[argument] = {"bias": "*fp32", "partials": "*fp32", "stats": "*fp32", "scale": "fp32"}.get(
                argument, "i32"
            )
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind.startswith("*")}
    constants = {key: value for key, value in constants.items() if key in signature}
    source = ASTSource(kernel, signature, constants, aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, spilled = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    return {
        "registers": registers,
        "bytes spilled": spilled,
        "shared memory": binary.metadata.shared,
        "warps": launch.warps,
        "programs asked": launch.occupancy,
    }


TILE = ("_forward_tile_kernel", "_backward_tile_kernel")
BLOCKS = ("_forward_block_kernel", "_backward_query_kernel", "_backward_key_kernel", "_backward_bias_kernel")
BUILDS = [
    *((kernel, window, 32, element, 90) for window in (7, 8) for element in ("bf16", "fp16") for kernel in TILE),
    *((kernel, 7, head_dim, "bf16", 90) for head_dim in (16, 64) for kernel in TILE),
    *((kernel, 7, head_dim, "bf16", 80) for head_dim in (16, 32) for kernel in TILE),
    *((kernel, 7, 32, "fp32", arch) for arch in (80, 90) for kernel in TILE),
    *((kernel, window, 32, "bf16", 90) for window in (4, 5) for kernel in TILE),
    *((kernel, window, 32, "bf16", arch) for window in (12, 14) for arch in (80, 90) for kernel in BLOCKS),
    *((kernel, 12, head_dim, element, 90) for head_dim, element in ((32, "fp16"), (64, "bf16")) for kernel in BLOCKS),
    *((kernel, 7, 64, "bf16", 80) for kernel in BLOCKS[1:]),
    *((kernel, 12, head_dim, "fp32", 90) for head_dim in (32, 64) for kernel in BLOCKS),
]


def assert_builds(build: tuple[str, int, int, str, int], mask_padding: bool, record: Callable[..., None]) -> None:
    """A kernel compiles, and the GPU can start it: more shared memory or threads than it has would be an error.

    Registers and spills are recorded only: each release of a compiler allocates them anew, and they cost time alone.
    """
    takes = compile_kernel(*build, mask_padding=mask_padding)
    for name, value in takes.items():
        record(name, value)
    assert takes["shared memory"] <= {80: 163, 90: 227}[build[-1]] * 1024
    assert takes["warps"] * takes["programs asked"] <= 64  # of a multiprocessor


@without_interpreter
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset:UserWarning")  # Triton 3.9 says so of any build
@pytest.mark.parametrize("kernel", TILE)
def test_main_kernels_build_for_hopper(kernel, record_property):
    pytest.importorskip("triton")
    assert_builds((kernel, 7, 32, "bf16", 90), False, record_property)


@without_interpreter
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION is unset:UserWarning")  # as above
@pytest.mark.parametrize("mask_padding", [False, True], ids=["", "mask_padding"])
@pytest.mark.parametrize("build", BUILDS, ids=lambda build: "-".join(str(part) for part in build))
def test_every_kernel_builds_for_ampere_and_hopper(build, mask_padding, record_property):
    pytest.importorskip("triton")
    assert_builds(build, mask_padding, record_property)


GPU = [
    ((7, 7), (56, 56), 3),
    ((7, 7), (28, 28), 6),
    ((7, 7), (53, 47), 3),
    ((8, 8), (32, 48), 4),
    ((12, 12), (24, 36), 4),
    ((14, 14), (28, 30), 4),
    ((7, 5), (21, 20), 3),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("mask_padding", [False, True], ids=["", "mask_padding"])
@pytest.mark.parametrize(("window", "grid", "heads"), GPU)
def test_gpu_is_as_exact_as_eager_and_repeats_itself(window, grid, heads, mask_padding, dtype):
    from swin_hf import SwinHFConfig
    from swin_hf.model.modeling_swin_hf import SwinHFAttention

    geometry = window_geometry(grid, window, True)
    torch.manual_seed(0)
    layer = SwinHFAttention(SwinHFConfig(mask_padding=mask_padding), 32 * heads, heads, window).cuda()
    torch.nn.init.normal_(layer.relative_position_bias_table)
    x = torch.randn(3, *geometry.padded, 32 * heads, device="cuda")
    inside = torch.zeros(1, *geometry.padded, 1, device="cuda")
    inside[:, : grid[0], : grid[1]] = 1

    def results(backend: str, kind: torch.dtype) -> list[Tensor]:
        layer.config._attn_implementation = backend
        layer.to(kind).zero_grad()
        given = x.to(dtype).to(kind, copy=True).requires_grad_()
        out = layer(given, geometry)[0] * inside.to(kind)
        out.backward(torch.linspace(-1, 1, out.numel(), device="cuda", dtype=torch.float64).view_as(out).to(kind))
        table = layer.relative_position_bias_table.grad
        return [t.detach().double() for t in (out, given.grad, table)]

    layer.to(dtype)  # rounds the weights once, so that all three start from the same
    exact = results("eager", torch.float64)
    eager, ours, again = results("eager", dtype), results("triton", dtype), results("triton", dtype)
    for name, e, t, o, a in zip(("output", "map", "table"), exact, eager, ours, again, strict=True):
        assert torch.equal(o, a), f"two runs differ in {name}"
        error, allowed = (o - e).norm() / e.norm(), (t - e).norm() / e.norm()
        assert error <= 1.05 * allowed + 1e-6, f"{name}: {error:.2e}, eager {allowed:.2e}"


@pytest.mark.gpu
def test_gpu_compiles_to_one_graph():
    geometry = window_geometry((14, 21), (7, 7), True)
    qkv, table = inputs(geometry, (7, 7), 3, 32, torch.bfloat16, batch=4, device="cuda")

    def attend(qkv: Tensor, table: Tensor) -> Tensor:
        assert not reasons_against_triton(qkv.device, qkv.dtype, 32, 0.0, geometry.window)
        return triton_window_attention(qkv * 2.0, table, (7, 7), geometry, 3, 32**-0.5)

    out = torch.compile(attend, fullgraph=True)(qkv, table)
    out.sum().backward()
    torch.testing.assert_close(out, attend(qkv, table))
    assert qkv.grad.isfinite().all()
    assert table.grad.isfinite().all()


@pytest.mark.gpu
def test_gpu_offsets_reach_beyond_32_bits():
    # The last image of the batch lies past 2^31 elements.
    geometry = window_geometry((56, 56), (7, 7), True)
    qkv = torch.randn(1200, 56, 56, 3 * 192, device="cuda", dtype=torch.bfloat16)
    assert qkv.numel() > 2**31
    table = torch.randn(169, 6, device="cuda")
    out = triton_window_attention(qkv, table, (7, 7), geometry, 6, 32**-0.5)
    last = triton_window_attention(qkv[-1:], table, (7, 7), geometry, 6, 32**-0.5)
    torch.testing.assert_close(out[-1:], last)
