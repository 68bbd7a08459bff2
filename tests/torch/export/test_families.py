"""Transformers of other people, with small random configurations, compute in onnxruntime what is simulated.

``tools/zoo`` does the same for many more.
"""

import warnings

import numpy as np
import pytest
import torch

from klquant.backends.torch import export_onnx, quantize, saturate_like_engines
from klquant.backends.torch.model.dataflow import tensors_in
from klquant.backends.torch.model.forward import call_model
from klquant.errors import CalibrationWarning
from support.networks import outputs
from support.onnx_models import run

transformers = pytest.importorskip("transformers")

ONE_LAYER = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
PICTURE = {"image_size": 16, "patch_size": 8, **ONE_LAYER}
SPEECH = {"vocab_size": 50, "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64,
          "num_mel_bins": 8, "max_source_positions": 10, "pad_token_id": 0}  # fmt: skip
IDS = [torch.randint(3, 50, (2, 8), generator=torch.Generator().manual_seed(k)) for k in range(2)]
PIXELS = [torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(k)) for k in range(2)]
WORDS = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in IDS]
SMALL = {
    "distilbert": ("DistilBert", {"vocab_size": 50, "dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 64}, WORDS),
    "gpt2": ("GPT2", {"vocab_size": 50, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16, "bos_token_id": 1,
                      "eos_token_id": 2, "use_cache": False}, [{"input_ids": ids} for ids in IDS]),
    "whisper encoder": ("WhisperEncoder", SPEECH, [{"input_features": torch.randn(
        2, 8, 20, generator=torch.Generator().manual_seed(k))} for k in range(2)]),
    "vit": ("ViT", PICTURE, [{"pixel_values": x} for x in PIXELS]),
}  # fmt: skip


def build(kind, options):
    """Return a model with random weights."""
    torch.manual_seed(0)
    if kind == "WhisperEncoder":
        from transformers.models.whisper.modeling_whisper import WhisperEncoder

        return WhisperEncoder(transformers.WhisperConfig(**options)).eval()
    config = getattr(transformers, f"{kind.removesuffix('Encoder')}Config")(**options)
    return getattr(transformers, f"{kind}Model")(config).eval()


@pytest.mark.parametrize("name", SMALL)
def test_onnxruntime_computes_the_same_codes(name):
    kind, options, data = SMALL[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CalibrationWarning)  # names embeddings, and fixed sizes
        model = saturate_like_engines(quantize(build(kind, options), data, num_bins=255, criterion="mse").model)
        exported = export_onnx(model, data[0], dynamic_batch=False).model
    expected = [y.double() for y in tensors_in(outputs(lambda: call_model(model, data[1]))) if y.is_floating_point()]
    wanted = {value.name for value in exported.graph.input}
    got = run(exported, **{key: x.numpy() for key, x in data[1].items() if key in wanted}).values()
    got = [torch.from_numpy(y).double() for y in got if y.dtype == np.float32]
    for ours, theirs in zip(expected, got, strict=True):
        error = (ours - theirs).norm() / ours.norm()
        assert error < 1e-5  # one code that differs would cost more
    assert sum(node.op_type == "QuantizeLinear" for node in exported.graph.node) > 5
