"""Tiny models with random weights of the architectures of transformers and timm: make(name) -> (model, its arguments).

A model of transformers is named by its class, one of timm "timm/" and its name there.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Made = tuple[nn.Module, dict[str, Any]]
LAYERS, WIDTH, HEADS, INNER, VOCAB, TOKENS = 2, 32, 4, 48, 99, 8
IMAGE, PATCH, FRAMES, MELS, SAMPLES = 32, 8, 128, 80, 1600

# a small size -> the fields of transformers' configurations that get it
SIZES = (
    (
        WIDTH,
        "hidden_size d_model n_embd dim embed_dim embedding_size emb_dim model_dim word_embed_proj_dim q_lora_rank kv_lora_rank"
        " lru_width attention_hidden_size",
    ),
    (
        HEADS,
        "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_decoder_heads"
        " num_experts n_routed_experts num_local_experts moe_num_experts",
    ),
    (
        LAYERS,
        "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers num_decoder_layers"
        " encoder_num_hidden_layers decoder_num_hidden_layers",
    ),
    (
        INNER,
        "intermediate_size ffn_dim d_ff n_inner encoder_ffn_dim decoder_ffn_dim hidden_dim moe_intermediate_size"
        " ffn_hidden_size shared_expert_intermediate_size encoder_intermediate_size decoder_intermediate_size",
    ),
    (
        2,
        "num_key_value_heads num_kv_heads n_kv_heads num_attention_groups num_experts_per_tok n_group topk_group moe_topk"
        " decoder_num_key_value_heads encoder_num_key_value_heads",
    ),
    (WIDTH // HEADS, "head_dim d_kv v_head_dim qk_nope_head_dim qk_rope_head_dim d_head attention_head_size rotary_dim"),
    (1, "first_k_dense_replace"),
    (VOCAB, "vocab_size"),
    (IMAGE, "image_size img_size"),
    (PATCH, "patch_size"),
    (64, "max_position_embeddings n_positions max_target_positions max_source_positions max_seq_len n_ctx"),
)
SMALL = {name: size for size, names in SIZES for name in names.split()}
TOKEN_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}

_HEAD = {"head_dim": WIDTH // HEADS, "num_key_value_heads": 2}
_SWIN = {"depths": [1, 1], "num_heads": [2, 4], "window_size": 4, "patch_size": 4}
_STAGES = {"depths": [1, 1], "hidden_sizes": [16, 32], "num_stages": 2}
# class -> fields of its configuration whose small values are none of SIZES; "part.field" is the field of a part of it
FIELDS: dict[str, dict[str, Any]] = {
    "ConvNextModel": _STAGES,
    "ConvNextV2Model": _STAGES,
    "DINOv3ConvNextModel": {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32]},
    "DeepseekV2Model": {"num_experts_per_tok": 2},
    "DeepseekV3Model": {"num_key_value_heads": HEADS},
    "DonutSwinModel": _SWIN,
    "EsmModel": {"vocab_size": VOCAB},
    "GPTNeoModel": {"attention_types": [[["global", "local"], 1]]},
    "HunYuanDenseV1Model": _HEAD,
    "LayoutLMv3Model": {"coordinate_size": 4, "shape_size": 8},
    "Mamba2Model": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "MinistralModel": _HEAD,
    "NemotronModel": _HEAD,
    "SwinModel": _SWIN,
    "Swinv2Model": _SWIN,
}


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Those that take text and pictures, or several pictures.
PIXELS = _names(
    "CLIPModel SiglipModel AltCLIPModel ChineseCLIPModel MetaClip2Model ViltModel BlipModel OwlViTModel GroupViTModel"
)
VIDEOS = _names("VideoMAEModel VivitModel TimesformerModel")

# The most used (MiniLM is a BERT).
FIRST = _names(
    "BertModel RobertaModel DistilBertModel ElectraModel DebertaV2Model AlbertModel XLMRobertaModel MPNetModel ModernBertModel"
    " GPT2LMHeadModel GPTNeoXModel LlamaForCausalLM MistralModel Qwen2Model Qwen3Model Gemma2Model Gemma3TextModel PhiModel"
    " Phi3Model Olmo2Model MixtralModel DeepseekV3Model T5Model MT5Model BartModel WhisperModel CLIPModel SiglipModel ViTModel"
    " SwinModel ConvNextModel Dinov2Model Wav2Vec2Model timm/vit_tiny_patch16_224 timm/convnext_atto timm/mixer_s16_224"
    " timm/eva02_tiny_patch14_224"
)
HEADS_OF = _names(
    "BertForMaskedLM RobertaForMaskedLM XLMRobertaForMaskedLM DebertaV2ForMaskedLM ElectraForPreTraining ModernBertForMaskedLM"
    " BertForSequenceClassification RobertaForSequenceClassification DistilBertForMaskedLM Gemma2ForCausalLM"
    " T5ForConditionalGeneration BartForConditionalGeneration ViTForImageClassification"
)
REST = _names(
    "AfmoeModel Aimv2VisionModel AltCLIPModel ApertusModel ArceeModel AriaTextModel ASTModel BeitModel BertGenerationEncoder"
    " BigBirdModel BigBirdPegasusModel BioGptModel BitNetModel BlenderbotModel BlipModel BloomModel CanineModel ChineseCLIPModel"
    " CodeGenModel Cohere2Model CohereModel ConvBertModel ConvNextV2Model CpmAntModel CTRLModel Data2VecTextModel"
    " Data2VecVisionModel DebertaModel DeepseekV2Model DeiTModel DiffLlamaModel DINOv3ConvNextModel DINOv3ViTModel DogeModel"
    " DonutSwinModel DPTModel Ernie4_5Model ErnieModel EsmModel EuroBertModel Exaone4Model FalconH1Model FalconMambaModel"
    " FalconModel FlaubertModel FlavaModel FlexOlmoModel FNetModel FocalNetModel FSMTModel FunnelModel GemmaModel GitModel"
    " Glm4Model Glm4MoeModel GlmModel GLPNModel GPTBigCodeModel GPTJModel GPTNeoModel GptOssModel GraniteModel GraniteMoeModel"
    " GroupViTModel HeliumModel HubertModel HunYuanDenseV1Model IBertModel IJepaModel ImageGPTModel JambaModel JetMoeModel"
    " LayoutLMModel LayoutLMv3Model LEDModel Lfm2Model Llama4TextModel LongformerModel LongT5Model M2M100Model Mamba2Model"
    " MambaModel MarianModel MarkupLMModel MBartModel MegatronBertModel MetaClip2Model MiniMaxModel MinistralModel MllamaModel"
    " MobileBertModel MobileViTModel MoonshineModel MptModel MraModel MvpModel NanoChatModel NemotronModel NllbMoeModel"
    " NomicBertModel NystromformerModel Olmo3Model OlmoeModel OlmoModel OpenAIGPTModel OPTModel OwlViTModel PegasusModel"
    " PegasusXModel PersimmonModel PhimoeModel PixtralVisionModel PLBartModel ProphetNetModel PvtV2Model Qwen2MoeModel"
    " Qwen3MoeModel Qwen3NextModel Qwen3VLTextModel RemBertModel RobertaPreLayerNormModel RoFormerModel RwkvModel SamVisionModel"
    " SeedOssModel SegformerModel SEWDModel SEWModel SiglipVisionModel SmolLM3Model SplinterModel SqueezeBertModel StableLmModel"
    " Starcoder2Model SwiftFormerModel Swinv2Model SwitchTransformersModel T5GemmaModel TapasModel TimesformerModel UMT5Model"
    " UniSpeechModel VaultGemmaModel VideoMAEModel ViltModel VisualBertModel VitDetModel ViTMAEModel ViTMSNModel VivitModel"
    " Wav2Vec2ConformerModel WavLMModel XGLMModel XLMModel XLMRobertaXLModel XLNetModel YolosModel YosoModel"
)

_VIT = {"depth": LAYERS, "img_size": IMAGE, "patch_size": PATCH, "embed_dim": WIDTH, "num_heads": HEADS}
_DEPTHS = {"depths": (1, 1, 1, 1)}
_SMALL_DEPTHS = {"depths": (1, 1, 1, 1), "img_size": 64}
# what timm.create_model is given -> names there; the smallest of their kind, of which some cannot be made with fewer layers
_TIMM: tuple[tuple[dict[str, Any], str], ...] = (
    (
        _VIT,
        "vit_tiny_patch16_224 deit_tiny_patch16_224 deit3_small_patch16_224 beit_base_patch16_224 eva02_tiny_patch14_224"
        " vit_small_patch14_dinov2 vit_small_patch16_dinov3 vit_base_patch16_siglip_224 vit_base_patch16_clip_224"
        " vit_relpos_small_patch16_224 samvit_base_patch16 naflexvit_base_patch16_gap cait_xxs24_224 xcit_nano_12_p8_224"
        " convit_tiny visformer_tiny",
    ),
    (_DEPTHS, "convnext_atto convnextv2_atto edgenext_xx_small inception_next_atto mambaout_femto pvt_v2_b0 tiny_vit_5m_224"),
    (
        _SMALL_DEPTHS,
        "swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 swinv2_cr_tiny_224 maxvit_rmlp_pico_rw_256 coatnet_nano_rw_224"
        " twins_svt_small efficientformerv2_s0",
    ),
    (
        {"img_size": 64},
        "mixer_s16_224 gmixer_12_224 resmlp_12_224 gmlp_ti16_224 coat_lite_tiny gcvit_xxtiny levit_128s mobilevit_xxs pit_ti_224"
        " swiftformer_xs",
    ),
    ({"depth": LAYERS, "img_size": IMAGE}, "vitamin_small_224"),
)
TIMM = {name: given for given, names in _TIMM for name in names.split()}
NAMES = tuple(dict.fromkeys((*FIRST, *HEADS_OF, *(f"timm/{name}" for name in TIMM), *REST)))


def shrunk(config_class: Any, **given: Any) -> Any:
    """A configuration with small sizes, those of its parts too."""
    fields = {f.name: f.default for f in dataclasses.fields(config_class)}
    sizes = {name: SMALL[name] for name, default in fields.items() if name in SMALL and isinstance(default, int)}
    sizes |= {name: TOKEN_IDS[name] for name in fields if name in TOKEN_IDS} | (
        {"use_cache": False} if "use_cache" in fields else {}
    )
    for part, part_class in getattr(config_class, "sub_configs", {}).items():
        if dataclasses.is_dataclass(part_class):
            of_part = {name.split(".", 1)[1]: value for name, value in given.items() if name.startswith(f"{part}.")}
            sizes[part] = shrunk(part_class, **of_part).to_dict()
    return config_class(**sizes | {name: value for name, value in given.items() if "." not in name})


def ids(length: int = TOKENS) -> Tensor:
    """(2, length) token ids, none of them a special one."""
    return torch.arange(2 * length).reshape(2, length) * 7 % (VOCAB - 20) + 10


def ramp(*shape: int) -> Tensor:
    """Numbers between -1 and 1, in no simple order."""
    return torch.sin(torch.arange(torch.Size(shape).numel()) * 0.7).reshape(shape)


def make(name: str, attention: str | None = None) -> Made:
    """A model in eval mode and the keyword arguments of its forward. attention: "eager", or None for the library's choice."""
    torch.manual_seed(0)
    model, inputs = _of_timm(name[5:], attention) if name.startswith("timm/") else _of_transformers(name, attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.normal_(0, 0.2)
    return model.eval(), inputs


def _of_transformers(name: str, attention: str | None) -> Made:
    import transformers

    model_class = getattr(transformers, name)
    config = shrunk(model_class.config_class, **FIELDS.get(name, {}))
    if attention is not None:
        config._attn_implementation = attention
    model = model_class(config)
    return model, _inputs(name, model)


def _inputs(name: str, model: Any) -> dict[str, Any]:
    takes, main = inspect.signature(model.forward).parameters, model.main_input_name
    inputs: dict[str, Any] = {}
    if "input_ids" in takes:
        inputs["input_ids"] = ids()
    if "decoder_input_ids" in takes:
        inputs["decoder_input_ids"] = ids(4)
    if name in VIDEOS:
        frames = model.config.num_frames
        inputs["pixel_values"] = ramp(2, frames, 3, IMAGE, IMAGE)
    elif main == "pixel_values" or name in PIXELS:
        inputs["pixel_values"] = ramp(2, 3, IMAGE, IMAGE)
    if main == "input_values":
        bins = getattr(model.config, "num_mel_bins", None)
        inputs["input_values"] = ramp(2, model.config.max_length, bins) if bins else ramp(2, SAMPLES)
    if main == "input_features":
        inputs["input_features"] = ramp(2, MELS, FRAMES)
    return inputs


def _of_timm(name: str, attention: str | None) -> Made:
    import_timm()
    import timm

    timm.layers.set_fused_attn(attention is None)
    try:
        model = timm.create_model(name, **TIMM[name])
    finally:
        timm.layers.set_fused_attn(True)
    size = TIMM[name].get("img_size", model.default_cfg["input_size"][-1])
    return model, {next(iter(inspect.signature(model.forward).parameters)): ramp(1, 3, size, size)}


class _Name(type):
    """A class, each of whose attributes is its own name."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Missing(types.ModuleType):
    """Stands for a module that is imported from but not used: each of its attributes is a class."""

    __path__ = ()  # it has no modules but those that are put beside it

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(name, (), {})


TORCHVISION = "transforms transforms.functional ops ops.misc models models.feature_extraction datasets"


def import_timm() -> None:
    """Import timm; where torchvision is missing, without it: timm's models use none of what timm imports from it."""
    if "timm" in sys.modules:
        return
    with _torchvision():
        import timm  # noqa: F401


@contextmanager
def _torchvision() -> Iterator[None]:
    if importlib.util.find_spec("torchvision") is not None:
        yield
        return
    names = ["torchvision", *(f"torchvision.{name}" for name in TORCHVISION.split())]
    for name in names:
        sys.modules[name] = _Missing(name)
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, sys.modules[name])
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
