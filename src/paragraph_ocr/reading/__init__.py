"""Reading with a trained model: images in, text out, without any framework of training."""

from paragraph_ocr.reading.read import Recognizer, Refusal, Transcript

__all__ = ["Recognizer", "Refusal", "Transcript"]
