"""ONNX files of networks whose packages hold PyTorch weights only. They need torch (and transformers for MiniLM)."""

import sys
import warnings
from pathlib import Path

from tools.bench.real.pictures import find


def efficientnet(folder: Path, path: Path) -> None:
    import torch

    sys.path.insert(0, str(folder / "efficientnet_lite_pytorch"))
    from efficientnet_lite_pytorch import EfficientNet

    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(find(folder, "efficientnet-lite0-*.pth")))
    export(net.eval(), (torch.zeros(1, 3, 224, 224),), path, ["x"], "y", {0: "n"})


def minilm(folder: Path, path: Path) -> None:
    import torch
    from transformers import BertModel

    source = find(folder, "model.safetensors").parent
    net = BertModel.from_pretrained(source, attn_implementation="eager", add_pooling_layer=False)
    names, ids = ["input_ids", "attention_mask", "token_type_ids"], torch.ones(2, 16, dtype=torch.long)

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            return self.net(**dict(zip(names, inputs, strict=True))).last_hidden_state

    export(Encoder().eval(), (ids, ids, 0 * ids), path, names, "last_hidden_state", {0: "n", 1: "t"})


def export(net: object, inputs: tuple, path: Path, names: list[str], output: str, dims: dict[int, str]) -> None:
    import torch

    options = {"input_names": names, "output_names": [output], "opset_version": 17, "dynamo": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, inputs, path, dynamic_axes=dict.fromkeys([*names, output], dims), **options)
