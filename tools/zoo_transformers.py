"""Small networks of Hugging Face's transformers: their own classes and configurations, with few layers and channels.

They are passed as they are: with the cache, the attention and the kind of outputs that their configuration gives.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from bench_common import import_or_skip
from torch import Tensor, nn

VOCABULARY, TOKENS, PADDING = 100, 16, 4
WIDTH = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA = WIDTH | {"num_key_value_heads": 2, "vocab_size": VOCABULARY, "pad_token_id": 0}
BERT = WIDTH | {"vocab_size": VOCABULARY, "max_position_embeddings": 64}
VISION = WIDTH | {"image_size": 64, "patch_size": 16}
CONVOLUTIONS = {
    "conv_dim": (32,) * 3,
    "conv_kernel": (10, 3, 3),
    "conv_stride": (5, 4, 4),
    "num_feat_extract_layers": 3,
}
SPEECH = WIDTH | CONVOLUTIONS | {"vocab_size": VOCABULARY, "num_conv_pos_embeddings": 16,
                                 "num_conv_pos_embedding_groups": 4}  # fmt: skip
PYRAMID = {"depths": [1, 1, 1, 1], "num_encoder_blocks": 4, "hidden_sizes": [16, 32, 48, 64]}


@dataclass(frozen=True)
class Recipe:
    """A model's class, its configuration and what makes its inputs from a batch size; `config` may hold others."""

    model: str
    inputs: Callable[[int], dict[str, Tensor]]
    config: Mapping[str, object]

    def build(self) -> nn.Module:
        transformers = import_or_skip("transformers")
        transformers.logging.set_verbosity_error()
        return getattr(transformers, self.model)(make_config(transformers, self.config))


def make_config(transformers, settings: Mapping[str, object]):
    settings = {
        key: make_config(transformers, value) if isinstance(value, dict) and "class" in value else value
        for key, value in settings.items()
    }
    return getattr(transformers, settings.pop("class"))(**settings)


def tokens(batch: int, length: int = TOKENS) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length))


def text(batch: int) -> dict[str, Tensor]:
    """Sentences of different lengths: the last ends in padding, which the mask hides."""
    mask = torch.ones(batch, TOKENS, dtype=torch.long)
    mask[-1, -PADDING:] = 0
    return {"input_ids": tokens(batch), "attention_mask": mask}


def text_to_text(batch: int) -> dict[str, Tensor]:
    return text(batch) | {"decoder_input_ids": tokens(batch, TOKENS // 2)}


def image(pixels: int = 64) -> Callable[[int], dict[str, Tensor]]:
    def make(batch: int) -> dict[str, Tensor]:
        from zoo_networks import image_like

        return {"pixel_values": image_like(batch, 3, pixels, pixels)}

    return make


def sound(batch: int) -> dict[str, Tensor]:
    return {"input_values": torch.randn(batch, 4000)}


def spectrogram(batch: int) -> dict[str, Tensor]:
    return {"input_features": torch.randn(batch, 80, 64), "decoder_input_ids": tokens(batch, TOKENS // 2)}


def text_and_image(batch: int) -> dict[str, Tensor]:
    return text(batch) | image()(batch)


def recipe(model: str, inputs: Callable, config: str, settings: Mapping[str, object] = {}, **more) -> Recipe:
    return Recipe(model, inputs, {"class": config} | dict(settings) | more)


RECIPES = {
    "bert": recipe("BertForSequenceClassification", text, "BertConfig", BERT),
    "roberta": recipe("RobertaForSequenceClassification", text, "RobertaConfig", BERT),
    "distilbert": recipe("DistilBertForSequenceClassification", text, "DistilBertConfig", vocab_size=VOCABULARY,
                         dim=64, hidden_dim=128, n_layers=2, n_heads=4),
    "albert": recipe("AlbertModel", text, "AlbertConfig", BERT, embedding_size=32),
    "electra": recipe("ElectraForTokenClassification", text, "ElectraConfig", BERT, embedding_size=32),
    "mpnet": recipe("MPNetModel", text, "MPNetConfig", BERT),
    "deberta": recipe("DebertaModel", text, "DebertaConfig", BERT, relative_attention=True, pos_att_type=["c2p", "p2c"]),
    "deberta_v2": recipe("DebertaV2Model", text, "DebertaV2Config", BERT, relative_attention=True,
                         pos_att_type=["c2p", "p2c"]),
    "modernbert": recipe("ModernBertModel", text, "ModernBertConfig", BERT, pad_token_id=0),
    "gpt2": recipe("GPT2LMHeadModel", text, "GPT2Config", vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4,
                   n_positions=64),
    "gpt_neo": recipe("GPTNeoForCausalLM", text, "GPTNeoConfig", vocab_size=VOCABULARY, hidden_size=64, num_layers=2,
                      num_heads=4, max_position_embeddings=64, attention_types=[[["global", "local"], 1]]),
    "gpt_neox": recipe("GPTNeoXForCausalLM", text, "GPTNeoXConfig", BERT),
    "opt": recipe("OPTForCausalLM", text, "OPTConfig", vocab_size=VOCABULARY, hidden_size=64, ffn_dim=128,
                  num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64, word_embed_proj_dim=64),
    "bloom": recipe("BloomForCausalLM", text, "BloomConfig", vocab_size=VOCABULARY, hidden_size=64, n_layer=2, n_head=4),
    "falcon": recipe("FalconForCausalLM", text, "FalconConfig", vocab_size=VOCABULARY, hidden_size=64,
                     num_hidden_layers=2, num_attention_heads=4),
    "llama": recipe("LlamaForCausalLM", text, "LlamaConfig", LLAMA),
    "mistral": recipe("MistralForCausalLM", text, "MistralConfig", LLAMA, sliding_window=8),
    "qwen2": recipe("Qwen2ForCausalLM", text, "Qwen2Config", LLAMA),
    "gemma": recipe("GemmaForCausalLM", text, "GemmaConfig", LLAMA, head_dim=16),
    "phi": recipe("PhiForCausalLM", text, "PhiConfig", WIDTH, vocab_size=VOCABULARY, pad_token_id=0),
    "phi3": recipe("Phi3ForCausalLM", text, "Phi3Config", LLAMA),
    "mixtral": recipe("MixtralForCausalLM", text, "MixtralConfig", LLAMA, num_local_experts=4),
    "mamba": recipe("MambaForCausalLM", lambda batch: {"input_ids": tokens(batch)}, "MambaConfig",
                    vocab_size=VOCABULARY, hidden_size=64, num_hidden_layers=2, state_size=8),
    "t5": recipe("T5ForConditionalGeneration", text_to_text, "T5Config", vocab_size=VOCABULARY, d_model=64, d_kv=16,
                 d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0),
    "bart": recipe("BartModel", text_to_text, "BartConfig", vocab_size=VOCABULARY, d_model=64, encoder_layers=2,
                   decoder_layers=2, encoder_ffn_dim=128, decoder_ffn_dim=128, encoder_attention_heads=4,
                   decoder_attention_heads=4, max_position_embeddings=64),
    "whisper": recipe("WhisperForConditionalGeneration", spectrogram, "WhisperConfig", vocab_size=VOCABULARY,
                      d_model=64, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=128, decoder_ffn_dim=128,
                      encoder_attention_heads=4, decoder_attention_heads=4, max_source_positions=32,
                      max_target_positions=32, pad_token_id=0, bos_token_id=1, eos_token_id=2,
                      decoder_start_token_id=1, begin_suppress_tokens=None),
    "wav2vec2": recipe("Wav2Vec2ForCTC", sound, "Wav2Vec2Config", SPEECH),
    "hubert": recipe("HubertModel", sound, "HubertConfig", SPEECH),
    "vit": recipe("ViTForImageClassification", image(), "ViTConfig", VISION),
    "deit": recipe("DeiTForImageClassificationWithTeacher", image(), "DeiTConfig", VISION),
    "beit": recipe("BeitForImageClassification", image(), "BeitConfig", VISION, use_relative_position_bias=True,
                   layer_scale_init_value=0.1),
    "dinov2": recipe("Dinov2Model", image(), "Dinov2Config", VISION, mlp_ratio=2),
    "swin": recipe("SwinForImageClassification", image(), "SwinConfig", image_size=64, patch_size=4, embed_dim=16,
                   depths=[2, 2], num_heads=[2, 4], window_size=4),
    "convnext": recipe("ConvNextForImageClassification", image(), "ConvNextConfig", PYRAMID),
    "segformer": recipe("SegformerForSemanticSegmentation", image(), "SegformerConfig", PYRAMID,
                        num_attention_heads=[1, 2, 3, 4], decoder_hidden_size=32, num_labels=5),
    "mobilevit": recipe("MobileViTForImageClassification", image(), "MobileViTConfig", image_size=64,
                        hidden_sizes=[32, 48, 64], neck_hidden_sizes=[8, 16, 24, 32, 48, 64, 96]),
    "resnet": recipe("ResNetForImageClassification", image(), "ResNetConfig", PYRAMID, embedding_size=16,
                     layer_type="basic"),
    "regnet": recipe("RegNetForImageClassification", image(), "RegNetConfig", PYRAMID, embedding_size=16, groups_width=8),
    "mobilenet_v2": recipe("MobileNetV2ForImageClassification", image(), "MobileNetV2Config", depth_multiplier=0.35,
                           image_size=64),
    "efficientnet": recipe("EfficientNetForImageClassification", image(), "EfficientNetConfig",
                           width_coefficient=0.35, depth_coefficient=0.35, image_size=64, hidden_dim=448),
    "detr": recipe("DetrForObjectDetection", image(), "DetrConfig", use_pretrained_backbone=False,
                   backbone="resnet18", backbone_kwargs={"out_indices": [1, 2, 3, 4]}, num_queries=8, d_model=64,
                   encoder_layers=2, decoder_layers=2, encoder_ffn_dim=128, decoder_ffn_dim=128,
                   encoder_attention_heads=4, decoder_attention_heads=4),
    "clip": recipe("CLIPModel", text_and_image, "CLIPConfig", projection_dim=32,
                   text_config=BERT | {"projection_dim": 32, "eos_token_id": 2},
                   vision_config=VISION | {"projection_dim": 32}),
    "upernet": recipe("UperNetForSemanticSegmentation", image(), "UperNetConfig", hidden_size=32, num_labels=5,
                      use_auxiliary_head=False,
                      backbone_config={"class": "ConvNextConfig", **PYRAMID,
                                       "out_features": ["stage1", "stage2", "stage3", "stage4"]}),
}  # fmt: skip
