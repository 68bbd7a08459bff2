"""The digits networks as float ONNX models with a free batch size, and the digits as NumPy arrays."""

import functools
import logging
import warnings

import onnx
import torch

from klquant.demo.digits import load_images
from support import digits_networks

NUM_CALIBRATION = 512


def load(name):
    """Return one of digits_networks.NETWORKS as a ModelProto: input `images` (batch, 1, 8, 8), output `logits`."""
    return onnx.load_from_string(_exported(name))


@functools.cache
def _exported(name):
    example, batch = torch.zeros(2, 1, 8, 8), torch.export.Dim("batch")
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it logs that torchvision is missing
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about deprecations inside torch's exporter
        program = torch.onnx.export(
            digits_networks.load(name),
            (example,),
            input_names=["images"],
            output_names=["logits"],
            dynamo=True,
            dynamic_shapes=({0: batch},),
            verbose=False,
        )
    return program.model_proto.SerializeToString()


@functools.cache
def digits():
    """Return calibration batches (a list), test images and test labels, as NumPy arrays."""
    images = load_images()
    calibration = images.train_images[:NUM_CALIBRATION].numpy()
    batches = [calibration[k : k + 64] for k in range(0, len(calibration), 64)]
    return batches, images.test_images.numpy(), images.test_labels.numpy()
