"""Real families of models with random weights, small enough for a CPU, and batches for them."""

from collections.abc import Callable

import torch

Entry = tuple[Callable, list]  # a function that makes the model, and its batches


def images(size=64, count=2, channels=3):
    """Return batches of random images."""
    return [torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(k)) for k in range(count)]


def tokens(length=16, count=2, vocabulary=99, **more):
    """Return batches of random token numbers, with other entries."""
    batches = []
    for k in range(count):
        ids = torch.randint(3, vocabulary, (2, length), generator=torch.Generator().manual_seed(k))
        batches.append({"input_ids": ids, **{name: value(ids) for name, value in more.items()}})
    return batches


def torchvision_models():
    """Return the models of torchvision by name."""
    from torchvision import models

    small = {"resnet18": 64, "mobilenet_v2": 64, "mobilenet_v3_small": 64, "efficientnet_b0": 64, "regnet_y_400mf": 64,
             "densenet121": 64, "shufflenet_v2_x0_5": 64, "squeezenet1_1": 64, "vgg11_bn": 64, "mnasnet0_5": 64,
             "convnext_tiny": 64, "inception_v3": 96, "vit_b_32": 224, "swin_t": 64, "swin_v2_t": 64}  # fmt: skip
    found: dict[str, Entry] = {}
    for name, size in small.items():
        more = {"init_weights": True} if name == "inception_v3" else {}
        found[name] = (lambda name=name, more=more: models.get_model(name, weights=None, **more)), images(size)
    video = [torch.randn(1, 3, 4, 32, 32, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    found["r3d_18"] = models.video.r3d_18, video
    found["deeplabv3_mobilenet"] = (
        (lambda: models.segmentation.deeplabv3_mobilenet_v3_large(weights=None, weights_backbone=None, aux_loss=False)),
        images(64),
    )
    found["retinanet"] = (
        (
            lambda: (
                models.detection.retinanet_resnet50_fpn(
                    weights=None, weights_backbone=None, min_size=64, max_size=64, score_thresh=0.0
                ).backbone
            )
        ),
        images(64),
    )
    return found


def timm_models():
    """Return the models of timm by name."""
    import timm

    names = {"regnety_002": {}, "repvgg_a0": {}, "mobilenetv4_conv_small": {}, "tf_mobilenetv3_small_minimal_100": {},
             "tf_efficientnet_lite0": {}, "ese_vovnet19b_dw": {}, "resnetv2_50x1_bit": {}, "nf_regnet_b0": {},
             "mobilevit_xxs": {}, "convnextv2_atto": {}, "levit_128s": {"size": 224},
             "coatnet_nano_rw_224": {"size": 224},
             "vit_tiny_patch16_224": {"img_size": 64}, "deit_tiny_patch16_224": {"img_size": 64},
             "mixer_s32_224": {"size": 224}, "swin_tiny_patch4_window7_224": {"size": 224}}  # fmt: skip
    found: dict[str, Entry] = {}
    for name, options in names.items():
        size = options.pop("size", 64)
        found[name] = (
            (lambda name=name, options=options: timm.create_model(name, num_classes=10, **options)),
            images(size),
        )
    return found


def transformers_models():
    """Return models of transformers by name, with tiny configurations."""
    import transformers as t

    tiny = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
            "intermediate_size": 64, "max_position_embeddings": 64}  # fmt: skip
    decoder = {**tiny, "num_key_value_heads": 2, "head_dim": 8, "use_cache": False}
    ones = {"attention_mask": torch.ones_like}
    two = {"decoder_input_ids": lambda ids: ids[:, :8], "use_cache": lambda ids: False}
    vision = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
              "image_size": 32, "patch_size": 8}  # fmt: skip
    pixels = [{"pixel_values": x} for x in images(32)]
    sounds = [{"input_features": torch.randn(2, 8, 40), "decoder_input_ids": torch.tensor([[3, 4, 5]] * 2),
               "use_cache": False} for _ in range(2)]  # fmt: skip
    waves = [{"input_values": torch.randn(2, 1600)} for _ in range(2)]
    both = [{"input_ids": one["input_ids"], **two} for one, two in zip(tokens(), pixels, strict=True)]
    t5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    bart = {"vocab_size": 99, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}  # fmt: skip
    whisper = {**bart, "num_mel_bins": 8, "max_source_positions": 20, "pad_token_id": 0, "bos_token_id": 1,
               "eos_token_id": 2, "decoder_start_token_id": 1}  # fmt: skip
    wav = {**{k: tiny[k] for k in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")},
           "intermediate_size": 64, "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3),
           "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2}  # fmt: skip
    vits = {"vocab_size": 38, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 64,
            "flow_size": 32, "spectrogram_bins": 33, "upsample_initial_channel": 64}  # fmt: skip
    latents = [torch.randn(2, 32, 20, generator=torch.Generator().manual_seed(k)) for k in range(2)]
    return {
        "bert": (lambda: t.BertModel(t.BertConfig(**tiny)), tokens(**ones)),
        "distilbert": (
            lambda: t.DistilBertModel(t.DistilBertConfig(vocab_size=99, dim=32, n_layers=2, n_heads=4, hidden_dim=64)),
            tokens(**ones),
        ),
        "roberta": (lambda: t.RobertaModel(t.RobertaConfig(**tiny)), tokens(**ones)),
        "electra": (lambda: t.ElectraModel(t.ElectraConfig(**tiny, embedding_size=32)), tokens(**ones)),
        "albert": (lambda: t.AlbertModel(t.AlbertConfig(**tiny, embedding_size=16)), tokens(**ones)),
        "deberta_v2": (
            lambda: t.DebertaV2Model(t.DebertaV2Config(**tiny, relative_attention=True, pos_att_type=["p2c", "c2p"])),
            tokens(**ones),
        ),
        "gpt2": (
            lambda: t.GPT2LMHeadModel(
                t.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64, use_cache=False)
            ),
            tokens(),
        ),
        "llama": (lambda: t.LlamaForCausalLM(t.LlamaConfig(**decoder)), tokens()),
        "qwen3": (lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**decoder)), tokens()),
        "t5": (lambda: t.T5ForConditionalGeneration(t.T5Config(**t5)), tokens(**two)),
        "bart": (lambda: t.BartModel(t.BartConfig(**bart, max_position_embeddings=64)), tokens(**two)),
        "whisper": (lambda: t.WhisperForConditionalGeneration(t.WhisperConfig(**whisper)), sounds),
        "vits_decoder": (lambda: t.VitsModel(t.VitsConfig(**vits)).decoder, latents),  # durations round: lengths vary
        "wav2vec2": (lambda: t.Wav2Vec2Model(t.Wav2Vec2Config(**wav)), waves),
        "vit": (lambda: t.ViTModel(t.ViTConfig(**vision)), pixels),
        "clip": (
            lambda: t.CLIPModel(
                t.CLIPConfig(
                    text_config={**tiny, "bos_token_id": 1, "eos_token_id": 2}, vision_config=vision, projection_dim=16
                )
            ),
            both,
        ),
        "segformer": (
            lambda: t.SegformerModel(
                t.SegformerConfig(hidden_sizes=[16, 16, 32, 32], depths=[1] * 4, num_attention_heads=[1, 2, 2, 4])
            ),
            [{"pixel_values": x} for x in images(64)],
        ),
    }


FAMILIES = {"torchvision": torchvision_models, "timm": timm_models, "transformers": transformers_models}
