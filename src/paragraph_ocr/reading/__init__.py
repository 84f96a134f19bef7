"""Reading with a trained model: images in, text out, without any framework of training."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paragraph_ocr.reading.read import Recognizer
    from paragraph_ocr.reading.transcript import Refusal, Transcript

__all__ = ["Recognizer", "Refusal", "Transcript"]


def __getattr__(name: str) -> Any:
    """Import the public names when they are asked for: reading with ONNX goes without torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from paragraph_ocr.reading import read

    return getattr(read, name)
