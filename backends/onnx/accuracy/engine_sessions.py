"""Sessions of models in the engine that they are measured on."""

from collections.abc import Iterator
from contextlib import contextmanager

from ...settings import Engine
from ..execution import Session, open_onnxruntime
from .comparison import RunnableModel


@contextmanager
def running(model: RunnableModel, engine: Engine) -> Iterator[Session]:
    """Open a session in the engine; TensorRT's models run in onnxruntime as they are written."""
    if engine == "tensorrt":
        with open_onnxruntime(model.model, optimized=False) as session:
            yield session
    else:
        with model.running(engine) as session:
            yield session
