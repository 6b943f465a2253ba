"""Small models of other people's libraries, as their users call them: random weights, no downloads.

Each name is ``library/model``. What a library is called on the package index stands beside it in
:data:`PACKAGES`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

#: The names on the package index of the libraries.
PACKAGES = {
    "transformers": "transformers",
    "diffusers": "diffusers",
    "vit_pytorch": "vit-pytorch",
    "x_transformers": "x-transformers",
    "segmentation_models_pytorch": "segmentation-models-pytorch",
    "monai": "monai",
    "torch_geometric": "torch_geometric",
    "torchvision": "torchvision",
    "timm": "timm",
    "open_clip": "open_clip_torch",
    "kornia": "kornia",
    "rtdl_revisiting_models": "rtdl_revisiting_models",
    "tab_transformer_pytorch": "tab-transformer-pytorch",
    "efficientnet_pytorch": "efficientnet_pytorch",
    "pytorch_tcn": "pytorch-tcn",
    "conformer": "conformer",
}

Built = tuple[nn.Module, dict[str, Any] | tuple[Any, ...]]
_WORDS = 60
_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}


def _tokens() -> Tensor:
    return torch.randint(3, _WORDS, (2, 9))


def _image(size: int = 32, channels: int = 3) -> Tensor:
    return torch.rand(2, channels, size, size)


def _hugging_face(kind: str, config: str, inputs: str = "input_ids", **sizes: Any) -> Built:
    library = importlib.import_module("transformers")
    words = {"vocab_size": _WORDS} if inputs == "input_ids" else {}
    made = getattr(library, kind)(getattr(library, config)(**{**words, **sizes}))
    given = {"input_ids": _tokens(), "pixel_values": _image(), "input_values": torch.rand(2, 1600)}
    return made, {inputs: given[inputs]}


def _t5() -> Built:
    sizes: dict[str, Any] = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    made, inputs = _hugging_face(
        "T5ForConditionalGeneration", "T5Config", decoder_start_token_id=0, **sizes
    )
    assert isinstance(inputs, dict)
    return made, {**inputs, "decoder_input_ids": _tokens()}


def _from(module: str, name: str, *inputs: Any, **options: Any) -> Built:
    return getattr(importlib.import_module(module), name)(**options), inputs


def _unet_2d() -> Built:
    blocks = {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        "block_out_channels": (32, 32),
        "norm_num_groups": 8,
        "layers_per_block": 1,
        "attention_head_dim": 8,
    }
    return _from("diffusers", "UNet2DModel", _image(), torch.tensor([1, 5]), **blocks)


def _unet_condition() -> Built:
    blocks = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "block_out_channels": (32, 64),
        "norm_num_groups": 8,
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "attention_head_dim": 8,
    }
    inputs = (_image(channels=4), torch.tensor([1, 5]), torch.rand(2, 6, 32))
    return _from("diffusers", "UNet2DConditionModel", *inputs, **blocks)


def _x_transformer(kind: str) -> Built:
    library = importlib.import_module("x_transformers")
    layers = getattr(library, kind)(dim=32, depth=2, heads=4, attn_dim_head=8)
    return library.TransformerWrapper(num_tokens=_WORDS, max_seq_len=64, attn_layers=layers), (
        _tokens(),
    )


def _graph_net(name: str) -> Built:
    models = importlib.import_module("torch_geometric.nn.models")
    made = getattr(models, name)(in_channels=16, hidden_channels=32, num_layers=3, out_channels=4)
    edges = torch.tensor([[0, 1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 0]])
    return made, (torch.rand(6, 16), edges)


def _ft_transformer() -> Built:
    kind = importlib.import_module("rtdl_revisiting_models").FTTransformer
    options = kind.get_default_kwargs(n_blocks=2) | {
        "d_block": 32,
        "attention_n_heads": 4,
        "n_cont_features": 5,
        "cat_cardinalities": [4, 3],
        "d_out": 2,
    }
    options.pop("_is_default", None)
    return kind(**options), (torch.rand(8, 5), torch.randint(0, 3, (8, 2)))


def _open_clip() -> Built:
    library = importlib.import_module("open_clip")
    made = library.CLIP(
        embed_dim=32,
        vision_cfg={"image_size": 32, "layers": 2, "width": 64, "patch_size": 8, "head_width": 16},
        text_cfg={
            "context_length": 9,
            "vocab_size": _WORDS,
            "width": 32,
            "heads": 4,
            "layers": 2,
        },
    )
    return made, (_image(), _tokens())


def _efficientnet() -> Built:
    library = importlib.import_module("efficientnet_pytorch")
    return library.EfficientNet.from_name("efficientnet-b0", num_classes=5), (_image(64),)


_VIT: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "num_classes": 5,
    "dim": 32,
    "depth": 2,
    "mlp_dim": 64,
}
_CATEGORIES = torch.randint(0, 3, (8, 2))
_TABLE: dict[str, Any] = {
    "categories": (4, 3),
    "num_continuous": 5,
    "dim": 32,
    "depth": 2,
    "heads": 4,
}
_SEGMENTATION: dict[str, Any] = {"encoder_name": "resnet18", "encoder_weights": None, "classes": 2}

#: How each model is made, with the inputs that it is called with.
MODELS: dict[str, Callable[[], Built]] = {
    "transformers/bert": lambda: _hugging_face("BertModel", "BertConfig", **_SIZES),
    "transformers/roberta": lambda: _hugging_face(
        "RobertaForSequenceClassification", "RobertaConfig", **_SIZES
    ),
    "transformers/electra": lambda: _hugging_face(
        "ElectraModel", "ElectraConfig", embedding_size=32, **_SIZES
    ),
    "transformers/deberta_v2": lambda: _hugging_face("DebertaV2Model", "DebertaV2Config", **_SIZES),
    "transformers/distilbert": lambda: _hugging_face(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        dim=32,
        n_layers=2,
        n_heads=4,
        hidden_dim=64,
    ),
    "transformers/albert": lambda: _hugging_face(
        "AlbertModel", "AlbertConfig", embedding_size=32, **_SIZES
    ),
    "transformers/gpt2": lambda: _hugging_face(
        "GPT2LMHeadModel", "GPT2Config", n_embd=32, n_layer=2, n_head=4
    ),
    "transformers/gpt_neox": lambda: _hugging_face("GPTNeoXForCausalLM", "GPTNeoXConfig", **_SIZES),
    "transformers/opt": lambda: _hugging_face(
        "OPTForCausalLM",
        "OPTConfig",
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        ffn_dim=64,
        word_embed_proj_dim=32,
    ),
    "transformers/llama": lambda: _hugging_face("LlamaForCausalLM", "LlamaConfig", **_SIZES),
    "transformers/mistral": lambda: _hugging_face(
        "MistralForCausalLM", "MistralConfig", num_key_value_heads=2, **_SIZES
    ),
    "transformers/qwen2": lambda: _hugging_face(
        "Qwen2ForCausalLM", "Qwen2Config", num_key_value_heads=2, **_SIZES
    ),
    "transformers/mixtral": lambda: _hugging_face(
        "MixtralForCausalLM",
        "MixtralConfig",
        num_key_value_heads=2,
        num_local_experts=2,
        **_SIZES,
    ),
    "transformers/t5": _t5,
    "transformers/bart": lambda: _hugging_face(
        "BartForConditionalGeneration",
        "BartConfig",
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
    ),
    "transformers/swin": lambda: _hugging_face(
        "SwinModel",
        "SwinConfig",
        "pixel_values",
        image_size=32,
        patch_size=2,
        window_size=4,
        embed_dim=16,
        depths=[1, 1],
        num_heads=[2, 2],
    ),
    "transformers/vit": lambda: _hugging_face(
        "ViTForImageClassification",
        "ViTConfig",
        "pixel_values",
        image_size=32,
        patch_size=8,
        **_SIZES,
    ),
    "transformers/clip_vision": lambda: _hugging_face(
        "CLIPVisionModel", "CLIPVisionConfig", "pixel_values", image_size=32, patch_size=8, **_SIZES
    ),
    "transformers/convnext": lambda: _hugging_face(
        "ConvNextForImageClassification",
        "ConvNextConfig",
        "pixel_values",
        hidden_sizes=[16, 32],
        depths=[1, 1],
        num_stages=2,
    ),
    "transformers/resnet": lambda: _hugging_face(
        "ResNetForImageClassification",
        "ResNetConfig",
        "pixel_values",
        embedding_size=16,
        hidden_sizes=[32, 64],
        depths=[1, 1],
    ),
    "transformers/wav2vec2": lambda: _hugging_face(
        "Wav2Vec2Model",
        "Wav2Vec2Config",
        "input_values",
        conv_dim=(32, 32),
        conv_kernel=(10, 3),
        conv_stride=(5, 2),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        **_SIZES,
    ),
    "diffusers/unet_2d": _unet_2d,
    "diffusers/unet_2d_condition": _unet_condition,
    "diffusers/autoencoder_kl": lambda: _from(
        "diffusers", "AutoencoderKL", _image(), block_out_channels=(32,), norm_num_groups=8
    ),
    "diffusers/vq": lambda: _from(
        "diffusers", "VQModel", _image(), block_out_channels=(32,), norm_num_groups=8
    ),
    "vit_pytorch/vit": lambda: _from("vit_pytorch", "ViT", _image(), heads=4, **_VIT),
    "vit_pytorch/simple_vit": lambda: _from("vit_pytorch", "SimpleViT", _image(), heads=4, **_VIT),
    "vit_pytorch/deepvit": lambda: _from(
        "vit_pytorch.deepvit", "DeepViT", _image(), heads=4, **_VIT
    ),
    "vit_pytorch/cait": lambda: _from(
        "vit_pytorch.cait", "CaiT", _image(), heads=4, cls_depth=1, **_VIT
    ),
    "vit_pytorch/cct": lambda: _from(
        "vit_pytorch.cct",
        "CCT",
        _image(),
        img_size=32,
        embedding_dim=32,
        num_layers=2,
        num_heads=4,
        mlp_ratio=2,
        num_classes=5,
    ),
    "x_transformers/decoder": lambda: _x_transformer("Decoder"),
    "x_transformers/encoder": lambda: _x_transformer("Encoder"),
    "segmentation_models_pytorch/unet": lambda: _from(
        "segmentation_models_pytorch", "Unet", _image(64), **_SEGMENTATION
    ),
    "segmentation_models_pytorch/fpn": lambda: _from(
        "segmentation_models_pytorch", "FPN", _image(64), **_SEGMENTATION
    ),
    "segmentation_models_pytorch/linknet": lambda: _from(
        "segmentation_models_pytorch", "Linknet", _image(64), **_SEGMENTATION
    ),
    "segmentation_models_pytorch/deeplab": lambda: _from(
        "segmentation_models_pytorch", "DeepLabV3Plus", _image(64), **_SEGMENTATION
    ),
    "monai/unet": lambda: _from(
        "monai.networks.nets",
        "UNet",
        _image(channels=1),
        spatial_dims=2,
        in_channels=1,
        out_channels=2,
        channels=(16, 32, 64),
        strides=(2, 2),
    ),
    "monai/segresnet": lambda: _from(
        "monai.networks.nets",
        "SegResNet",
        _image(channels=1),
        spatial_dims=2,
        init_filters=16,
        out_channels=2,
    ),
    "monai/densenet": lambda: _from(
        "monai.networks.nets",
        "DenseNet",
        _image(channels=1),
        spatial_dims=2,
        in_channels=1,
        out_channels=2,
        init_features=16,
        growth_rate=8,
        block_config=(2, 2),
    ),
    "monai/unetr": lambda: _from(
        "monai.networks.nets",
        "UNETR",
        _image(channels=1),
        in_channels=1,
        out_channels=2,
        img_size=32,
        feature_size=16,
        hidden_size=32,
        mlp_dim=64,
        num_heads=4,
        spatial_dims=2,
    ),
    "monai/vit": lambda: _from(
        "monai.networks.nets",
        "ViT",
        _image(channels=1),
        in_channels=1,
        img_size=(32, 32),
        patch_size=(8, 8),
        hidden_size=32,
        mlp_dim=64,
        num_layers=2,
        num_heads=4,
        spatial_dims=2,
    ),
    "torch_geometric/gcn": lambda: _graph_net("GCN"),
    "torch_geometric/graph_sage": lambda: _graph_net("GraphSAGE"),
    "torch_geometric/gin": lambda: _graph_net("GIN"),
    "torch_geometric/gat": lambda: _graph_net("GAT"),
    "torchvision/r3d_18": lambda: _from(
        "torchvision.models.video", "r3d_18", torch.rand(2, 3, 4, 32, 32)
    ),
    "torchvision/raft_small": lambda: _from(
        "torchvision.models.optical_flow", "raft_small", _image(128), _image(128)
    ),
    "torchvision/lraspp": lambda: _from(
        "torchvision.models.segmentation",
        "lraspp_mobilenet_v3_large",
        _image(64),
        weights_backbone=None,
    ),
    "timm/resnet10t": lambda: _from("timm", "create_model", _image(64), model_name="resnet10t"),
    "timm/mobilenetv4": lambda: _from(
        "timm", "create_model", _image(64), model_name="mobilenetv4_conv_small_035"
    ),
    "timm/tiny_vit": lambda: _from(
        "timm", "create_model", _image(224), model_name="tiny_vit_5m_224"
    ),
    "open_clip/clip": _open_clip,
    "kornia/hardnet": lambda: _from("kornia.feature", "HardNet", _image(32, 1), pretrained=False),
    "kornia/vit": lambda: _from(
        "kornia.models.vit",
        "VisionTransformer",
        _image(),
        image_size=32,
        patch_size=8,
        embed_dim=32,
        depth=2,
        num_heads=4,
    ),
    "rtdl_revisiting_models/mlp": lambda: _from(
        "rtdl_revisiting_models",
        "MLP",
        torch.rand(8, 5),
        d_in=5,
        d_out=2,
        n_blocks=3,
        d_block=32,
        dropout=0.1,
    ),
    "rtdl_revisiting_models/resnet": lambda: _from(
        "rtdl_revisiting_models",
        "ResNet",
        torch.rand(8, 5),
        d_in=5,
        d_out=2,
        n_blocks=2,
        d_block=32,
        d_hidden=None,
        d_hidden_multiplier=2.0,
        dropout1=0.1,
        dropout2=0.0,
    ),
    "rtdl_revisiting_models/ft_transformer": _ft_transformer,
    "tab_transformer_pytorch/tab_transformer": lambda: _from(
        "tab_transformer_pytorch", "TabTransformer", _CATEGORIES, torch.rand(8, 5), **_TABLE
    ),
    "tab_transformer_pytorch/ft_transformer": lambda: _from(
        "tab_transformer_pytorch", "FTTransformer", _CATEGORIES, torch.rand(8, 5), **_TABLE
    ),
    "efficientnet_pytorch/b0": _efficientnet,
    "pytorch_tcn/tcn": lambda: _from(
        "pytorch_tcn",
        "TCN",
        torch.rand(2, 4, 30),
        num_inputs=4,
        num_channels=[32, 32],
        kernel_size=3,
    ),
    "conformer/block": lambda: _from(
        "conformer", "ConformerBlock", torch.rand(2, 12, 32), dim=32, dim_head=8, heads=4
    ),
}
