"""Architectures that nobody here wrote, from installed packages, as small as they still are
themselves: random weights, made by their own constructors, unchanged and unwrapped.

`transformers` is a dependency of the tests; `monai` and `kornia` are not: install them beside it
(`pip install --no-deps --target DIR monai kornia kornia-rs`, and DIR on PYTHONPATH).
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

CLASSES = 10


@dataclass(frozen=True)
class Stranger:
    """How a network is made: the class, its package, and what a user would ask it for."""

    package: str
    build: Callable[[], nn.Module]
    size: int  # px of the square images of three channels that it takes

    @property
    def absent(self) -> bool:
        return importlib.util.find_spec(self.package) is None


def hugging(name: str, size: int, **settings: Any) -> Stranger:
    """A model of `transformers`: `name` is its class; its configuration is named alike."""

    def build() -> nn.Module:
        package = importlib.import_module("transformers")
        stem = name.rpartition("For")[0]
        config = getattr(package, f"{stem}Config")(num_labels=CLASSES, **settings)
        found = getattr(package, name)(config)
        assert isinstance(found, nn.Module)
        return found

    return Stranger("transformers", build, size)


def of(package: str, module: str, name: str, size: int, **settings: Any) -> Stranger:
    """A class of another package, with its own arguments."""

    def build() -> nn.Module:
        found = getattr(importlib.import_module(module), name)(**settings)
        assert isinstance(found, nn.Module)
        return found

    return Stranger(package, build, size)


PLANAR = {"spatial_dims": 2, "in_channels": 3}
FOUR = {"hidden_sizes": [16, 24, 32, 48], "depths": [1, 1, 2, 1]}
TOKENS = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
}

STRANGERS: dict[str, Stranger] = {
    "vit": hugging("ViTForImageClassification", 32, **TOKENS),
    "resnet": hugging(
        "ResNetForImageClassification", 32, embedding_size=16, layer_type="basic", **FOUR
    ),
    "convnext": hugging("ConvNextForImageClassification", 32, **FOUR),
    "mobilenet v1": hugging("MobileNetV1ForImageClassification", 32, depth_multiplier=0.25),
    "poolformer": hugging(
        "PoolFormerForImageClassification", 64, **{**FOUR, "depths": [1, 1, 1, 1]}
    ),
    "segformer": hugging(
        "SegformerForSemanticSegmentation",
        64,
        hidden_sizes=[16, 24, 32, 48],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 2, 3],
        decoder_hidden_size=32,
    ),
    "basic unet": of(
        "monai",
        "monai.networks.nets",
        "BasicUNet",
        32,
        out_channels=5,
        features=(16, 16, 24, 32, 48, 16),
        **PLANAR,
    ),
    "regnet": hugging(
        "RegNetForImageClassification", 32, embedding_size=16, groups_width=8, **FOUR
    ),
    "bit": hugging(
        "BitForImageClassification",
        32,
        embedding_size=16,
        num_groups=4,
        hidden_sizes=[32, 48, 64, 96],
        depths=[1, 1, 1, 1],
    ),
    "levit": hugging(
        "LevitForImageClassification",
        64,
        image_size=64,
        hidden_sizes=[32, 48, 64],
        num_attention_heads=[2, 3, 4],
        depths=[1, 1, 1],
        key_dim=[8, 8, 8],
        down_ops=[["Subsample", 8, 4, 2, 2, 2], ["Subsample", 8, 6, 2, 2, 2]],
    ),
    "yolos": hugging(
        "YolosForObjectDetection",
        32,
        **{**TOKENS, "image_size": [32, 32]},
        num_detection_tokens=6,
        use_mid_position_embeddings=False,
    ),
    "pvt": hugging(
        "PvtForImageClassification",
        32,
        image_size=32,
        hidden_sizes=[16, 24, 32, 48],
        depths=[1, 1, 1, 1],
        num_attention_heads=[1, 2, 2, 3],
        mlp_ratios=[2, 2, 2, 2],
    ),
    "dinov2": hugging(
        "Dinov2ForImageClassification",
        32,
        **{k: v for k, v in TOKENS.items() if k != "intermediate_size"},
        mlp_ratio=2,
    ),
    "swin": hugging(
        "SwinForImageClassification",
        32,
        image_size=32,
        patch_size=2,
        embed_dim=16,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=4,
    ),
    "densenet": of(
        "monai",
        "monai.networks.nets",
        "DenseNet",
        32,
        out_channels=CLASSES,
        init_features=16,
        growth_rate=8,
        block_config=(2, 2, 2),
        **PLANAR,
    ),
    "segresnet": of(
        "monai",
        "monai.networks.nets",
        "SegResNet",
        32,
        out_channels=5,
        init_filters=8,
        blocks_down=(1, 1, 1),
        blocks_up=(1, 1),
        **PLANAR,
    ),
    "attention unet": of(
        "monai",
        "monai.networks.nets",
        "AttentionUnet",
        32,
        out_channels=5,
        channels=(8, 16, 32),
        strides=(2, 2),
        **PLANAR,
    ),
    "convnext v2": hugging("ConvNextV2ForImageClassification", 32, **FOUR),
    "mobilenet v2": hugging("MobileNetV2ForImageClassification", 32, depth_multiplier=0.25),
    "efficientnet": hugging(
        "EfficientNetForImageClassification",
        64,
        width_coefficient=0.25,
        depth_coefficient=0.25,
        hidden_dim=320,
        image_size=64,
    ),
    "mobilevit": hugging(
        "MobileViTForImageClassification",
        64,
        image_size=64,
        hidden_sizes=[24, 32, 40],
        neck_hidden_sizes=[8, 16, 16, 24, 32, 40, 64],
        num_attention_heads=2,
    ),
}
