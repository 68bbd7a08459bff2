"""Tables of embeddings as INT8 weights, as onnxruntime and OpenVINO models of :func:`export_onnx` have them."""

from torch import nn

from .model.edits import copy_model
from .model.products import Point
from .simulation import channel_scales, fake_quantize, quantized_layers

MIN_WIDTH, MIN_SIZE = 16, 2**14  # of the vectors, and of the table: smaller ones gain nothing


def round_embeddings(model: nn.Module) -> nn.Module:
    """Return a copy of a simulated model whose large tables of embeddings are rounded to 8 bits.

    `export_onnx` makes them INT8 for "onnxruntime", and for "openvino" where there are data. TensorRT keeps them in
    floating point, and so does :func:`quantize`.

    Parameters
    ----------
    model : torch.nn.Module
        The result of :func:`simulate`, or `model` of :func:`quantize`; it is not changed.

    Returns
    -------
    torch.nn.Module
        Each ``nn.Embedding`` with vectors of at least 16 values and a table of at least 16384 has one scale for each
        element of its vectors, ``max |w_c| / 127``. A layer that shares the table keeps its own rounding.

    Raises
    ------
    InvalidInputError
        For a model without quantized layers.
    """
    model = copy_model(model)
    quantized_layers(model)
    read = {source for point in model.modules() if isinstance(point, Point) for source in point.sources}
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module not in read and _is_large_table(module):
            table = module.weight.detach()
            rounded = fake_quantize(table, channel_scales(table, 1, 8), axis=1)
            module.weight = nn.Parameter(rounded, requires_grad=False)
    return model


def _is_large_table(module: nn.Embedding) -> bool:
    is_plain = type(module).forward is nn.Embedding.forward and module.max_norm is None
    return is_plain and module.embedding_dim >= MIN_WIDTH and module.weight.numel() >= MIN_SIZE
