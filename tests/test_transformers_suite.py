"""transformers' own tests of a model, on both families. They are in its source archive only, so they run on request:

    pip download transformers==VERSION --no-deps --no-binary :all: && tar xf transformers-VERSION.tar.gz
    pip install parameterized && touch transformers-VERSION/tests/__init__.py
    TRANSFORMERS_TESTS=transformers-VERSION/tests python -m pytest -c /dev/null tests/test_transformers_suite.py

The suite has markers and warnings of its own, which ``-c /dev/null`` lets pass. The archive lacks what ``STAND_INS``
replaces; exports are in ``test_conformance.py``.
"""

import os
import sys
import types
import unittest
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers.models.auto import modeling_auto

from swin_hf.families import FAMILIES
from swin_hf.model.modeling_swin_hf import SwinHFPreTrainedModel

if "TRANSFORMERS_TESTS" not in os.environ:
    pytest.skip("TRANSFORMERS_TESTS does not name the tests of transformers", allow_module_level=True)

FOLDER = Path(os.environ["TRANSFORMERS_TESTS"]).resolve()
sys.path.insert(0, str(FOLDER.parent))
STAND_INS = {
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils.test_configuration_utils": {
        "config_common_kwargs": {
            "return_dict": False,
            "output_hidden_states": True,
            "output_attentions": True,
            "dtype": "float16",
            "chunk_size_feed_forward": 5,
            "architectures": ["AModel"],
            "id2label": {0: "label"},
            "label2id": {"label": 0},
            "problem_type": "regression",
        }
    },
}
for module, content in STAND_INS.items():
    if not (FOLDER / f"{module.replace('.', '/')}.py").is_file():
        sys.modules[f"tests.{module}"] = stand_in = types.ModuleType(f"tests.{module}")
        vars(stand_in).update(content)

from tests.test_backbone_common import BackboneTesterMixin  # noqa: E402 - after the folder is known
from tests.test_configuration_common import ConfigTester  # noqa: E402
from tests.test_modeling_common import ModelTesterMixin, floats_tensor  # noqa: E402

from tests import test_modeling_common  # noqa: E402

NAMES = {
    "features": modeling_auto.MODEL_MAPPING_NAMES,
    "image-classification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "masked-image-modeling": modeling_auto.MODEL_FOR_MASKED_IMAGE_MODELING_MAPPING_NAMES,
    "backbone": modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES,
}
SIZES = {
    "image_size": 32,
    "patch_size": 2,
    "num_channels": 3,
    "embed_dim": 16,
    "depths": [1, 2, 1],
    "num_heads": [2, 2, 4],
    "window_size": 2,
    "mlp_ratio": 2.0,
    "encoder_stride": 8,
    "out_features": ["stage1", "stage2"],
}


@pytest.fixture(autouse=True)
def _as_the_suite_expects(monkeypatch):
    """It finds out by its name what a class does, and loads weights that leave layers random without asking for it."""
    load = SwinHFPreTrainedModel.from_pretrained.__func__
    lenient = classmethod(lambda cls, *args, strict=False, **kwargs: load(cls, *args, strict=strict, **kwargs))
    monkeypatch.setattr(SwinHFPreTrainedModel, "from_pretrained", lenient)

    def save(tensors, *args, **kwargs):  # its file without any of the weights holds an integer, which is refused
        save_file({name: tensor.float() for name, tensor in tensors.items()}, *args, **kwargs)

    monkeypatch.setattr(test_modeling_common, "safe_save_file", save)
    for family in FAMILIES.values():
        for task, names in NAMES.items():
            monkeypatch.setitem(names, family.model_type, family.models[task].split(".")[1])


class Tester:
    """What the suite asks of a model's tester: sizes, a configuration, inputs."""

    batch_size, is_training = 13, True
    seq_length, num_masks = 256, 150  # patches of an image, and those of them that are masked

    def __init__(self, family) -> None:
        self.family = family
        vars(self).update(SIZES)

    def get_config(self):
        return self.family.config_class(**SIZES)

    def prepare_config_and_inputs_for_common(self):
        shape = [self.batch_size, self.num_channels, self.image_size, self.image_size]
        return self.get_config(), {"pixel_values": floats_tensor(shape)}


class Common(ModelTesterMixin):
    """The tests of every model; what they assume of the shape of hidden states and attentions is Swin's here."""

    model_type: str
    test_resize_embeddings = False

    def setUp(self) -> None:
        family = FAMILIES[self.model_type]
        self.all_model_classes = tuple(family.model_class(task) for task in NAMES)
        self.model_tester = Tester(family)
        properties = ["image_size", "patch_size", "num_channels"]
        self.config_tester = ConfigTester(
            self, config_class=family.config_class, has_text_modality=False, common_properties=properties, embed_dim=36
        )

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    @torch.no_grad()
    def test_attention_outputs(self) -> None:
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class._from_config(config, attn_implementation="eager").eval()
            without, attentions = model(**inputs), model(**inputs, output_attentions=True)
            assert [tuple(entry.shape[1:]) for entry in attentions.attentions] == [(2, 4, 4), (2, 4, 4), (4, 4, 4)]
            both = model(**inputs, output_attentions=True, output_hidden_states=True)
            assert len(attentions) == len(without) + 1
            assert len(both) == len(attentions) + (1 if "Backbone" in model_class.__name__ else 2)

    @torch.no_grad()
    def test_hidden_states_output(self) -> None:
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        for patch, side in ((2, 16), (3, 11)):
            config.patch_size = patch
            for model_class in self.all_model_classes:
                output = model_class(config).eval()(**inputs, output_hidden_states=True)
                assert len(output.hidden_states) == 4
                if "Backbone" not in model_class.__name__:
                    assert output.hidden_states[0].shape == (13, side**2, 16)
                    assert output.reshaped_hidden_states[0].shape == (13, 16, side, side)

    def test_model_get_set_embeddings(self) -> None:
        config, _ = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            assert isinstance(model_class(config).get_input_embeddings(), torch.nn.Module)
            assert model_class(config).get_output_embeddings() is None

    @unittest.skip("a picture has no inputs_embeds")
    def test_inputs_embeds(self) -> None: ...

    @unittest.skip("there is no chunking of feed-forward layers")
    def test_feed_forward_chunking(self) -> None: ...


class TestSwin(Common, unittest.TestCase):
    model_type = "swin_hf"


class TestSwinV2(Common, unittest.TestCase):
    model_type = "swinv2_hf"


class CommonBackbone(BackboneTesterMixin):
    """The tests of every backbone."""

    model_type: str

    def setUp(self) -> None:
        family = FAMILIES[self.model_type]
        self.all_model_classes = (family.model_class("backbone"),)
        self.config_class, self.model_tester = family.config_class, Tester(family)


class TestSwinBackbone(CommonBackbone, unittest.TestCase):
    model_type = "swin_hf"


class TestSwinV2Backbone(CommonBackbone, unittest.TestCase):
    model_type = "swinv2_hf"


del Common, CommonBackbone  # bases are not collected
