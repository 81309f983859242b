"""The same weights give the same numbers as in transformers, timm and torchvision: random, small, nothing downloaded.

Weights are copied by the tables of this file, not by ``swin_hf.checkpoints``, so that neither vouches for the other.
"""

import re

import pytest
import torch
from conftest import PARITY
from torch import Tensor, nn

from swin_hf import (
    SwinHFBackbone,
    SwinHFConfig,
    SwinHFForImageClassification,
    SwinHFForMaskedImageModeling,
    SwinHFModel,
)

SIZES = {"embed_dim": 16, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8]}
# Image height and width, window: the released resolutions, and one where every stage needs padding.
IMAGES = {"224-w7": ((224, 224), 7), "384-w12": ((384, 384), 12), "230x198-w7": ((230, 198), 7)}

# Pattern in the other layout -> ours. The two spellings of transformers are those of 5.18 and of earlier releases.
TRANSFORMERS = {
    r"^(embeddings|encoder|layernorm)": r"swin.\1",
    r"^model\.": "swin.",
    r"patch_embeddings\.projection": "patch_embeddings",
    r"encoder\.layers\.": "stages.",
    r"^swin\.layernorm\.": "swin.norm.",
    r"layernorm_before": "norm1",
    r"layernorm_after": "norm2",
    r"attention\.(self|relative_position_bias)\.relative_position_bias_table": "attention.relative_position_bias_table",
    r"attention\.(o_proj|output\.dense)": "attention.proj",
    r"attention\.(self\.query|q_proj)": "attention.0",
    r"attention\.(self\.key|k_proj)": "attention.1",
    r"attention\.(self\.value|v_proj)": "attention.2",
    r"intermediate\.dense": "mlp.fc1",
    r"(\d)\.output\.dense": r"\1.mlp.fc2",
}
TIMM = {
    r"^patch_embed\.proj": "swin.embeddings.patch_embeddings",
    r"^patch_embed\.norm": "swin.embeddings.norm",
    r"^layers\.(\d)\.downsample": lambda match: f"swin.stages.{int(match[1]) - 1}.downsample",
    r"^layers\.": "swin.stages.",
    r"\.attn\.": ".attention.",
    r"^norm\.": "swin.norm.",
    r"^head\.fc": "classifier",
}
TORCHVISION = {
    r"^features\.0\.0": "swin.embeddings.patch_embeddings",
    r"^features\.0\.2": "swin.embeddings.norm",
    r"^features\.([246])\.": lambda match: f"swin.stages.{int(match[1]) // 2 - 1}.downsample.",
    r"^features\.([1357])\.": lambda match: f"swin.stages.{int(match[1]) // 2}.blocks.",
    r"\.attn\.": ".attention.",
    r"mlp\.0": "mlp.fc1",
    r"mlp\.3": "mlp.fc2",
    r"^norm\.": "swin.norm.",
    r"^head\.": "classifier.",
}


def randomise(theirs: nn.Module) -> nn.Module:
    """Give every parameter a value that matters: their norms start at one, their bias tables at zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:
                parameter.copy_(noise * 0.1 + ("norm" in name and name.endswith("weight")))
            else:
                parameter.copy_(noise * (0.5 if "table" in name else parameter[0].numel() ** -0.5))
    return theirs.eval()


def copy_weights(theirs: nn.Module, ours: nn.Module, table: dict) -> nn.Module:
    """Load their weights into ours; each of ours must be filled."""
    state: dict[str, Tensor] = {}
    for key, value in theirs.state_dict().items():
        for pattern, name in table.items():
            key = re.sub(pattern, name, key)
        state[key] = value
    for key in [key for key in state if "attention.0." in key]:
        parts = [state[key.replace("attention.0.", f"attention.{part}.")] for part in range(3)]
        state[key.replace("attention.0.", "attention.qkv.")] = torch.cat(parts)
    if not any(key.startswith("swin.") for key in ours.state_dict()):
        state = {key.removeprefix("swin."): value for key, value in state.items()}
    missing = ours.load_state_dict(state, strict=False).missing_keys
    assert not missing, missing
    return ours.eval()


def configs(image: str, **kwargs) -> tuple:
    from transformers import SwinConfig

    (height, _), window = IMAGES[image]
    image_size = {"230x198-w7": 224}.get(image, height)
    sizes = {**SIZES, "image_size": image_size, "window_size": window, **kwargs}
    return SwinConfig(**sizes), SwinHFConfig(**sizes)


def pixels(image: str) -> Tensor:
    return torch.randn(2, 3, *IMAGES[image][0], generator=torch.Generator().manual_seed(1))


def assert_same(ours, theirs) -> None:
    """Compare every tensor of two outputs, by name."""
    assert set(theirs.keys()) == set(ours.keys())
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], **PARITY, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
@pytest.mark.parametrize("image", IMAGES)
def test_classifier_equals_transformers(image, backend):
    from transformers import SwinForImageClassification

    their_config, our_config = configs(image, num_labels=5)
    theirs = randomise(SwinForImageClassification(their_config))
    ours = copy_weights(theirs, SwinHFForImageClassification(our_config), TRANSFORMERS)
    ours.set_attn_implementation(backend)
    labels = torch.tensor([3, 0])
    with torch.no_grad():
        assert_same(
            ours(pixels(image), labels=labels, output_hidden_states=True),
            theirs(pixels(image), labels=labels, output_hidden_states=True),
        )


@pytest.mark.parametrize("image", IMAGES)
def test_model_equals_transformers_attentions_included(image):
    from transformers import SwinModel

    their_config, our_config = configs(image)
    theirs = randomise(SwinModel._from_config(their_config, attn_implementation="eager"))
    ours = copy_weights(theirs, SwinHFModel(our_config), TRANSFORMERS)
    with torch.no_grad():
        assert_same(
            ours(pixels(image), output_attentions=True, output_hidden_states=True),
            theirs(pixels(image), output_attentions=True, output_hidden_states=True),
        )


def test_absolute_position_embeddings_equal_transformers():
    from transformers import SwinModel

    their_config, our_config = configs("224-w7", use_absolute_embeddings=True)
    theirs = randomise(SwinModel(their_config))
    ours = copy_weights(theirs, SwinHFModel(our_config), TRANSFORMERS)
    wide = torch.randn(1, 3, 256, 224, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        assert_same(ours(pixels("224-w7")), theirs(pixels("224-w7")))
        assert_same(ours(wide), theirs(wide, interpolate_pos_encoding=True))


def test_masked_image_model_equals_transformers():
    from transformers import SwinForMaskedImageModeling

    their_config, our_config = configs("224-w7")
    theirs = randomise(SwinForMaskedImageModeling(their_config))
    ours = copy_weights(theirs, SwinHFForMaskedImageModeling(our_config), TRANSFORMERS)
    mask = torch.rand(2, 56 * 56, generator=torch.Generator().manual_seed(3)) < 0.6
    with torch.no_grad():
        assert_same(
            ours(pixels("224-w7"), bool_masked_pos=mask, output_hidden_states=True),
            theirs(pixels("224-w7"), bool_masked_pos=mask, output_hidden_states=True),
        )


@pytest.mark.parametrize("image", ["224-w7", "230x198-w7"])
def test_backbone_equals_transformers(image):
    from transformers import SwinBackbone

    their_config, our_config = configs(image, out_features=["stem", "stage2", "stage4"])
    theirs = randomise(SwinBackbone(their_config))
    ours = copy_weights(theirs, SwinHFBackbone(our_config), TRANSFORMERS)
    with torch.no_grad():
        assert_same(ours(pixels(image), output_hidden_states=True), theirs(pixels(image), output_hidden_states=True))


def test_backbone_equals_maskformer_swin():
    from transformers.models.maskformer.configuration_maskformer_swin import MaskFormerSwinConfig
    from transformers.models.maskformer.modeling_maskformer_swin import MaskFormerSwinBackbone

    out_features = ["stage1", "stage2", "stage3", "stage4"]
    sizes = {**SIZES, "image_size": 224, "window_size": 7, "out_features": out_features}
    theirs = randomise(MaskFormerSwinBackbone(MaskFormerSwinConfig(**sizes)))
    table = {
        **TRANSFORMERS,
        r"^hidden_states_norms\.(\d)": lambda match: f"hidden_states_norms.stage{int(match[1]) + 1}",
    }
    ours = copy_weights(theirs, SwinHFBackbone(SwinHFConfig(**sizes)), table)
    with torch.no_grad():
        for our_map, their_map in zip(
            ours(pixels("230x198-w7")).feature_maps, theirs(pixels("230x198-w7")).feature_maps, strict=True
        ):
            torch.testing.assert_close(our_map, their_map, **PARITY)


def test_classifier_and_stages_equal_timm():
    from timm.models.swin_transformer import SwinTransformer

    theirs = randomise(SwinTransformer(img_size=224, window_size=7, num_classes=5, **SIZES))
    config = SwinHFConfig(**SIZES, image_size=224, window_size=7, num_labels=5, shift_per_axis=True)
    ours = copy_weights(theirs, SwinHFForImageClassification(config), TIMM)
    stages: list[Tensor] = []
    for stage in ours.swin.stages:
        stage.register_forward_hook(lambda module, args, output: stages.append(output[0]))
    with torch.no_grad():
        torch.testing.assert_close(ours(pixels("224-w7")).logits, theirs(pixels("224-w7")), **PARITY)
        features = theirs.forward_intermediates(pixels("224-w7"), intermediates_only=True, output_fmt="NCHW")
    for our_map, their_map in zip(stages, features, strict=True):
        torch.testing.assert_close(our_map.permute(0, 3, 1, 2), their_map, **PARITY)


@pytest.mark.parametrize("size", [(224, 224), (228, 196)])
def test_classifier_equals_torchvision(size):
    """Torchvision pads maps before it rolls, as we do, but not images: whole patches that need padded windows agree."""
    from torchvision.models.swin_transformer import SwinTransformer

    theirs = randomise(SwinTransformer(patch_size=[4, 4], window_size=[7, 7], num_classes=5, **SIZES))
    config = SwinHFConfig(**SIZES, image_size=224, window_size=7, num_labels=5, shift_per_axis=True)
    ours = copy_weights(theirs, SwinHFForImageClassification(config), TORCHVISION)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(ours(images).logits, theirs(images), **PARITY)
