"""What the tools around transformers do to a model: save, shard, offload, compile, export, fine-tune, serve."""

import copy

import numpy as np
import pytest
import torch
import transformers
from conftest import PATIENCE, TINY
from PIL import Image
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedImageModeling,
    ViTImageProcessor,
    pipeline,
)

from swin_hf.families import FAMILIES
from swin_hf.model.modeling_swinv2_hf import SwinV2HFBranchNorm

AUTO_CLASSES = {
    "features": AutoModel,
    "image-classification": AutoModelForImageClassification,
    "masked-image-modeling": AutoModelForMaskedImageModeling,
    "backbone": AutoBackbone,
}
IMAGE = (2, 3, 32, 48)


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(params=AUTO_CLASSES)
def task(request) -> str:
    return request.param


@pytest.fixture
def model_class(family, task):
    return family.model_class(task)


@pytest.fixture
def classifier_class(family):
    return family.model_class("image-classification")


@pytest.fixture
def tiny_config(family, tiny_config):
    """The tiny configuration of either family."""
    return family.config_class(**TINY)


@pytest.fixture
def awkward_config(family, awkward_config):
    """The awkward configuration of either family."""
    return family.config_class(**{name: getattr(awkward_config, name) for name in [*TINY, "num_labels"]})


@pytest.fixture
def tiny_model(classifier_class, tiny_config):
    return build(classifier_class, tiny_config)


def build(model_class, config):
    """A model in evaluation mode whose blocks do something: those of V2 start as the identity."""
    torch.manual_seed(0)
    model = model_class(config).eval()
    for module in model.modules():
        if isinstance(module, SwinV2HFBranchNorm):
            torch.nn.init.ones_(module.weight)
    return model


def leaves(output) -> list[torch.Tensor]:
    """Tensors of an output, in order."""
    found: list[torch.Tensor] = []
    for value in output.to_tuple():
        found += [value] if isinstance(value, torch.Tensor) else list(value)
    return found


def same(ours, theirs, **tolerance) -> None:
    tolerance = tolerance or {"atol": 1e-5, "rtol": 1e-4}
    for first, second in zip(ours, theirs, strict=True):
        torch.testing.assert_close(first, second, **tolerance)


@pytest.fixture
def saved(tmp_path, tiny_model):
    tiny_model.save_pretrained(tmp_path / "model")
    ViTImageProcessor(size={"height": 32, "width": 48}).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# --------------------------------------------------------------------------------------------------- saving, loading


def test_auto_classes_find_it_and_files_hold_everything(family, task, model_class, tmp_path, tiny_config):
    assert AutoConfig.for_model(family.model_type).__class__ is family.config_class
    auto = AUTO_CLASSES[task]
    model = auto.from_config(tiny_config).eval()
    assert type(model) is model_class
    model.save_pretrained(tmp_path)
    again = model_class.from_pretrained(tmp_path, strict=True)
    assert again.config.architectures == [model_class.__name__]
    assert not again.training
    for name, value in model.state_dict().items():
        assert value.is_contiguous() and torch.equal(again.state_dict()[name], value), name
    if auto is not AutoBackbone:  # which takes a folder for the name of a timm model
        assert type(auto.from_pretrained(tmp_path)) is model_class


def test_base_and_heads_load_each_other(classifier_class, tmp_path, tiny_model):
    tiny_model.swin.save_pretrained(tmp_path / "base")
    head, report = classifier_class.from_pretrained(tmp_path / "base", num_labels=5, output_loading_info=True)
    assert set(report["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert torch.equal(head.swin.norm.weight, tiny_model.swin.norm.weight)
    tiny_model.save_pretrained(tmp_path / "head")
    base = AutoModel.from_pretrained(tmp_path / "head")
    same(leaves(base(torch.ones(IMAGE))), leaves(tiny_model.swin(torch.ones(IMAGE))))


def test_shards_load_as_one(classifier_class, tmp_path, tiny_model):
    tiny_model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    again = classifier_class.from_pretrained(tmp_path, strict=True)
    same(leaves(again(torch.ones(IMAGE))), leaves(tiny_model(torch.ones(IMAGE))))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, "auto"])
def test_a_low_precision_load_computes_the_same(classifier_class, saved, tiny_model, dtype):
    model = classifier_class.from_pretrained(saved, dtype=dtype)
    assert model.dtype == (torch.float32 if dtype == "auto" else dtype)
    same(leaves(model.float()(torch.ones(IMAGE))), leaves(tiny_model(torch.ones(IMAGE))), atol=1e-2, rtol=1e-1)


@pytest.mark.parametrize("split", ["blocks", "stages"])
def test_half_of_it_lives_on_disk(split, classifier_class, saved, tiny_model, tmp_path):
    places: dict[str, str] = {"swin.embeddings": "cpu", "swin.norm": "disk", "classifier": "cpu"}
    for stage in range(3):
        if split == "stages":
            places[f"swin.stages.{stage}"] = "disk" if stage == 1 else "cpu"
            continue
        for block in range(TINY["depths"][stage]):
            places[f"swin.stages.{stage}.blocks.{block}"] = "disk" if block % 2 == 0 else "cpu"
        if stage < 2:
            places[f"swin.stages.{stage}.downsample"] = "disk"
    model = classifier_class.from_pretrained(saved, device_map=places, offload_folder=tmp_path / "disk")
    assert any(parameter.is_meta for parameter in model.parameters())
    same(leaves(model(torch.ones(IMAGE))), leaves(tiny_model(torch.ones(IMAGE))))


def test_no_split_keeps_residuals_together(tiny_model):
    from accelerate import infer_auto_device_map

    names = {type(module).__name__ for module in tiny_model.modules()}
    assert set(tiny_model._no_split_modules) <= names
    places = infer_auto_device_map(
        tiny_model, max_memory={"cpu": "350KB", "disk": "10GB"}, no_split_module_classes=tiny_model._no_split_modules
    )
    assert {"cpu", "disk"} <= set(places.values())
    assert not [name for name in places if any(part in name for part in ("attention", "mlp", "norm1"))]


# --------------------------------------------------------------------------------------------------------- pipelines


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_pipelines_take_every_kind_of_picture(saved, dtype):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 56, 4), dtype=np.uint8)
    pictures = [Image.fromarray(pixels).convert(mode) for mode in ("RGB", "RGBA", "L", "LA")]
    classify = pipeline("image-classification", model=str(saved), dtype=dtype)
    answers = classify(pictures, batch_size=4, top_k=5)
    assert [len(answer) for answer in answers] == [5] * 4
    assert all(sum(label["score"] for label in answer) == pytest.approx(1, abs=1e-2) for answer in answers)
    assert classify(pictures[0])[0]["label"].startswith("LABEL_")
    extract = pipeline("image-feature-extraction", model=str(saved), dtype=dtype)
    assert np.array(extract(pictures[0])).shape == (1, 24, 64)


# --------------------------------------------------------------------------------------------------- compile, export


@pytest.mark.slow
def test_compiles_without_graph_break(model_class, tiny_config):
    model = build(model_class, tiny_config)
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True)
    for kwargs in ({}, {"output_hidden_states": True, "output_attentions": True}):
        with torch.no_grad():
            same(leaves(compiled(torch.ones(IMAGE), **kwargs)), leaves(model(torch.ones(IMAGE), **kwargs)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "graphs"),
    [
        # A graph for the first batch, one for any other; a batch of one is special to torch.
        ([(2, 32, 48), (3, 32, 48), (5, 32, 48), (8, 32, 48)], 2),
        ([(1, 32, 48), (2, 32, 48), (3, 32, 48), (8, 32, 48)], 3),
        # A graph for each image size, and none for a size that was there before, whatever the batch.
        ([(2, 32, 48), (3, 32, 48), (3, 48, 48), (4, 64, 40), (2, 48, 48), (5, 64, 40), (7, 32, 48)], 4),
    ],
    ids=["batch", "batch-from-one", "image"],
)
def test_new_sizes_do_not_recompile_each_time(sizes, graphs, tiny_model):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch.compiler.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(tiny_model, backend=counter, fullgraph=True)
    with torch.no_grad():
        for batch, height, width in sizes:
            x = torch.randn(batch, 3, height, width)
            same([compiled(x).logits], [tiny_model(x).logits])
    assert counter.frame_count <= graphs


@pytest.mark.slow
def test_a_compiled_training_step_has_the_same_gradients(classifier_class, tiny_config):
    tiny_config.drop_path_rate = 0.0
    model = build(classifier_class, tiny_config).train()
    twin = copy.deepcopy(model)
    torch.compiler.reset()
    x, labels = torch.randn(IMAGE), torch.tensor([1, 4])
    model(x, labels=labels).loss.backward()
    torch.compile(twin, fullgraph=True)(x, labels=labels).loss.backward()
    same([p.grad for p in twin.parameters()], [p.grad for p in model.parameters()])


@pytest.mark.slow
def test_exports_with_a_dynamic_batch(model_class, awkward_config):
    model = build(model_class, awkward_config)
    exported = torch.export.export(
        model,
        (),
        {"pixel_values": torch.randn(2, 3, 30, 46)},
        dynamic_shapes={"pixel_values": {0: torch.export.Dim("batch", min=1, max=64)}},
    )
    for batch in (1, 2, 7):
        x = torch.randn(batch, 3, 30, 46)
        with torch.no_grad():
            same(leaves(exported.module()(pixel_values=x)), leaves(model(x)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # onnxscript and torch.onnx about each other
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_runs_in_onnx_runtime(model_class, tiny_config, tmp_path):
    import onnxruntime

    model, x = build(model_class, tiny_config), torch.randn(IMAGE)
    program = torch.onnx.export(model, kwargs={"pixel_values": x}, dynamo=True, verbose=False)
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    answers = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        same([torch.from_numpy(answer) for answer in answers], leaves(model(x)), atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------------------------------------------------- training


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # peft's call
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_lora_trains_merges_and_reloads(reentrant, tiny_model, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    x, labels = torch.randn(IMAGE), torch.tensor([1, 4])
    base = copy.deepcopy(tiny_model)
    model = get_peft_model(base, LoraConfig(target_modules="all-linear", r=4, modules_to_save=["classifier"]))
    if reentrant is not None:
        base.gradient_checkpointing_enable({"use_reentrant": reentrant})
        base.enable_input_require_grads()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(3):
        loss = model(x, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trained = [(name, p.grad) for name, p in model.named_parameters() if p.requires_grad]
    assert all(grad is not None and grad.abs().sum() > 0 for _, grad in trained), trained
    assert all(p.grad is None for name, p in model.named_parameters() if "base_layer" in name)
    model.eval().save_pretrained(tmp_path)
    expected = model(x).logits
    assert not torch.allclose(expected, tiny_model(x).logits, atol=1e-3)
    again = PeftModel.from_pretrained(copy.deepcopy(tiny_model), tmp_path).eval()
    same([again(x).logits], [expected])
    same([again.merge_and_unload()(x).logits], [expected])


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # peft's call
def test_the_folder_of_adapters_loads_on_the_model_that_it_names(classifier_class, saved, tmp_path):
    from peft import LoraConfig, get_peft_model

    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24):
        pytest.skip("transformers 5.11 counts the head of the adapters as missing; 5.24 does not")
    config = LoraConfig(target_modules=["qkv"], r=2, modules_to_save=["classifier"], init_lora_weights=False)
    adapted = get_peft_model(classifier_class.from_pretrained(saved), config).eval()
    adapted.save_pretrained(tmp_path / "adapters")
    x = torch.randn(IMAGE)
    with torch.no_grad():
        expected = adapted(x).logits
        assert not torch.allclose(expected, classifier_class.from_pretrained(saved)(x).logits, atol=1e-3)
        for auto in (AutoModelForImageClassification, classifier_class):
            same([auto.from_pretrained(tmp_path / "adapters").eval()(x).logits], [expected])


class Rows(torch.utils.data.Dataset):
    """Twelve images whose brightness is their class."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict:
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(3, 32, 48, generator=generator) + index % 3, "labels": index % 3}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")  # Trainer's call
@pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")  # there is no accelerator here
def test_trainer_trains_saves_and_resumes(classifier_class, tiny_config, tmp_path):
    from transformers import Trainer, TrainingArguments

    def trainer(steps: int) -> Trainer:
        torch.manual_seed(0)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            save_steps=4,
            gradient_checkpointing=True,
            use_cpu=True,
            report_to=[],
            seed=0,
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        tiny_config.drop_path_rate = 0.0
        return Trainer(classifier_class(tiny_config), arguments, train_dataset=Rows(), eval_dataset=Rows())

    whole = trainer(8)
    assert np.isfinite(whole.train().training_loss)
    assert whole.evaluate()["eval_loss"] < 1.6
    assert whole.predict(Rows()).predictions.shape == (12, 5)
    resumed = trainer(8)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    same(resumed.model.parameters(), whole.model.parameters(), atol=1e-5, rtol=1e-4)
    classifier_class.from_pretrained(tmp_path / "checkpoint-8", strict=True)


def _train_on_two(rank: int, file: str, model_type: str) -> None:
    from datetime import timedelta

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=2, timeout=timedelta(seconds=PATIENCE)
    )
    family = FAMILIES[model_type]
    for task in ("image-classification", "masked-image-modeling", "backbone"):
        config = family.config_class(**{**TINY, "out_features": ["stage1", "stage2"], "drop_path_rate": 0.0})
        model = torch.nn.parallel.DistributedDataParallel(build(family.model_class(task), config).train())
        extra = {}
        if task == "masked-image-modeling":
            extra["bool_masked_pos"] = torch.arange(384).expand(2, -1) % 2
        for step in range(2):  # a parameter without a gradient raises in the second
            torch.manual_seed(10 * step + rank)
            sum(value.square().mean() for value in leaves(model(torch.randn(IMAGE), **extra))).backward()
        gradient = next(model.parameters()).grad
        both = [torch.empty_like(gradient) for _ in range(2)]
        torch.distributed.all_gather(both, gradient)
        assert torch.equal(*both) and gradient.abs().sum() > 0
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_ddp_reaches_every_parameter(family, tmp_path):
    torch.multiprocessing.spawn(_train_on_two, (str(tmp_path / "store"), family.model_type), nprocs=2)
