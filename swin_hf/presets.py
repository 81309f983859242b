"""Sizes of the released models, with their source.

The code that is pushed with a model holds no sizes: ``import swin_hf`` adds these to the configuration class of the
family.
"""

from typing import Any

# Table 7 of the paper and Microsoft's model zoo (https://github.com/microsoft/Swin-Transformer/blob/main/MODELHUB.md);
# names are those of its files. drop_path_rate is that of the training recipe (configs/swin/*.yaml there).
_TINY = {"embed_dim": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)}
_SMALL = {"embed_dim": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)}
_BASE = {"embed_dim": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)}
_LARGE = {"embed_dim": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)}
_W7 = {"image_size": 224, "window_size": 7, "num_labels": 1000}
_W12 = {"image_size": 384, "window_size": 12, "num_labels": 1000}
_W8_256 = {"image_size": 256, "window_size": 8, "num_labels": 1000}
_22K = {"num_labels": 21841}
# Three of our own, small enough for a CPU: the offline recipes and the tests.
_DIGITS = {
    **{"embed_dim": 48, "depths": (2, 2), "num_heads": (3, 6), "num_labels": 10, "drop_path_rate": 0.1},
    **{"image_size": 32, "patch_size": 4, "window_size": 4, "encoder_stride": 8},
}
_FASHION = {
    **{"embed_dim": 64, "depths": (2, 4), "num_heads": (2, 4), "num_labels": 10, "drop_path_rate": 0.1},
    **{"image_size": 28, "patch_size": 2, "window_size": 7, "encoder_stride": 4},
}
_MINI = {
    **{"embed_dim": 64, "depths": (2, 2, 6), "num_heads": (2, 4, 8), "num_labels": 1000, "drop_path_rate": 0.1},
    **{"image_size": 64, "patch_size": 4, "window_size": 8, "encoder_stride": 16, "initializer_range": 0.05},
}

SWIN: dict[str, dict[str, Any]] = {
    "swin_tiny_patch4_window7_224": {**_TINY, **_W7, "drop_path_rate": 0.2},
    "swin_tiny_patch4_window7_224_22k": {**_TINY, **_W7, **_22K, "drop_path_rate": 0.1},
    "swin_tiny_patch4_window7_224_22kto1k": {**_TINY, **_W7, "drop_path_rate": 0.1},
    "swin_tiny_c24_patch4_window8_256": {**_TINY, **_W8_256, "num_heads": (4, 8, 16, 32), "drop_path_rate": 0.2},
    "swin_small_patch4_window7_224": {**_SMALL, **_W7, "drop_path_rate": 0.3},
    "swin_small_patch4_window7_224_22k": {**_SMALL, **_W7, **_22K, "drop_path_rate": 0.2},
    "swin_small_patch4_window7_224_22kto1k": {**_SMALL, **_W7, "drop_path_rate": 0.2},
    "swin_base_patch4_window7_224": {**_BASE, **_W7, "drop_path_rate": 0.5},
    "swin_base_patch4_window12_384": {**_BASE, **_W12, "drop_path_rate": 0.5},
    "swin_base_patch4_window7_224_22k": {**_BASE, **_W7, **_22K, "drop_path_rate": 0.2},
    "swin_base_patch4_window12_384_22k": {**_BASE, **_W12, **_22K, "drop_path_rate": 0.2},
    "swin_base_patch4_window7_224_22kto1k": {**_BASE, **_W7, "drop_path_rate": 0.2},
    "swin_base_patch4_window12_384_22kto1k": {**_BASE, **_W12, "drop_path_rate": 0.2},
    "swin_large_patch4_window7_224_22k": {**_LARGE, **_W7, **_22K, "drop_path_rate": 0.2},
    "swin_large_patch4_window12_384_22k": {**_LARGE, **_W12, **_22K, "drop_path_rate": 0.2},
    "swin_large_patch4_window7_224_22kto1k": {**_LARGE, **_W7, "drop_path_rate": 0.2},
    "swin_large_patch4_window12_384_22kto1k": {**_LARGE, **_W12, "drop_path_rate": 0.2},
    # SimMIM pre-training (https://arxiv.org/abs/2111.09886, configs/swin_base__800ep of its repository).
    "swin_base_patch4_window6_192_simmim": {**_BASE, "image_size": 192, "window_size": 6, "drop_path_rate": 0.0},
    "swin_digits_patch4_window4_32": _DIGITS,
    "swin_fashion_patch2_window7_28": _FASHION,
    "swin_mini_patch4_window8_64": _MINI,
}

# Table 1 and section 4 of the paper of V2 and Microsoft's model zoo; configs/swinv2/*.yaml there. Offsets of the models
# that were pre-trained in windows of 12, of 6 in the last stage, are divided by those.
_W16_256 = {"image_size": 256, "window_size": 16, "num_labels": 1000}
_W24_384 = {"image_size": 384, "window_size": 24, "num_labels": 1000}
_W12_192 = {"image_size": 192, "window_size": 12}
_FROM_W12 = {"pretrained_window_sizes": (12, 12, 12, 6), "drop_path_rate": 0.2}
# From "Model configurations" in the paper of V2. No weights were released, and the paper gives no heads: those are
# OpenMMLab's.
_HUGE = {"embed_dim": 352, "depths": (2, 2, 18, 2), "num_heads": (8, 16, 32, 64), "extra_norm_every_n_blocks": 6}
_GIANT = {"embed_dim": 512, "depths": (2, 2, 42, 4), "num_heads": (16, 32, 64, 128), "extra_norm_every_n_blocks": 6}

SWINV2: dict[str, dict[str, Any]] = {
    "swinv2_tiny_patch4_window8_256": {**_TINY, **_W8_256, "drop_path_rate": 0.2},
    "swinv2_tiny_patch4_window16_256": {**_TINY, **_W16_256, "drop_path_rate": 0.2},
    "swinv2_small_patch4_window8_256": {**_SMALL, **_W8_256, "drop_path_rate": 0.3},
    "swinv2_small_patch4_window16_256": {**_SMALL, **_W16_256, "drop_path_rate": 0.3},
    "swinv2_base_patch4_window8_256": {**_BASE, **_W8_256, "drop_path_rate": 0.5},
    "swinv2_base_patch4_window16_256": {**_BASE, **_W16_256, "drop_path_rate": 0.5},
    "swinv2_base_patch4_window12_192_22k": {**_BASE, **_W12_192, **_22K, "drop_path_rate": 0.2},
    "swinv2_base_patch4_window12to16_192to256_22kto1k_ft": {**_BASE, **_W16_256, **_FROM_W12},
    "swinv2_base_patch4_window12to24_192to384_22kto1k_ft": {**_BASE, **_W24_384, **_FROM_W12},
    "swinv2_large_patch4_window12_192_22k": {**_LARGE, **_W12_192, **_22K, "drop_path_rate": 0.2},
    "swinv2_large_patch4_window12to16_192to256_22kto1k_ft": {**_LARGE, **_W16_256, **_FROM_W12},
    "swinv2_large_patch4_window12to24_192to384_22kto1k_ft": {**_LARGE, **_W24_384, **_FROM_W12},
    "swinv2_huge_patch4_window12_192": {**_HUGE, **_W12_192, "num_labels": 1000, "drop_path_rate": 0.2},
    "swinv2_giant_patch4_window12_192": {**_GIANT, **_W12_192, "num_labels": 1000, "drop_path_rate": 0.2},
    "swinv2_digits_patch4_window4_32": _DIGITS,
    "swinv2_fashion_patch2_window7_28": _FASHION,
}
