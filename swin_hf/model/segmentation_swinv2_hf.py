"""Semantic segmentation with Swin Transformer V2: V1's heads on V2's trunk."""

from .configuration_swinv2_hf import SwinV2HFConfig
from .modeling_swinv2_hf import SwinV2HFBackbone, SwinV2HFPreTrainedModel
from .segmentation_swin_hf import SwinHFForSemanticSegmentation


class SwinV2HFForSemanticSegmentation(SwinV2HFPreTrainedModel, SwinHFForSemanticSegmentation):
    """Swin Transformer V2 with UperNet and an auxiliary FCN head; the trunk is that of ``SwinV2HFBackbone``."""

    config: SwinV2HFConfig
    always_partition = SwinV2HFBackbone.always_partition


__all__ = ["SwinV2HFForSemanticSegmentation"]
