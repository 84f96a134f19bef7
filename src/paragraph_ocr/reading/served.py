"""What `mlflow models serve` runs: images in base64 to texts.

MLflow keeps this file itself with a model and executes it ("models from code"), so nothing is pickled; the
last line tells it which object to serve. Nothing else imports this module.
"""

import base64
import binascii
import re
from pathlib import Path
from typing import Any

import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel

from paragraph_ocr.reading import Recognizer, Refusal

_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,")


class ServedRecognizer(PythonModel):
    """Reads the column `image` of a table: a PNG, JPEG, TIFF or WEBP file each, in base64."""

    def load_context(self, context: Any) -> None:
        """Load config and weights, which lie beside each other."""
        self.recognizer = Recognizer.load(Path(context.artifacts["weights"]))

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> pd.DataFrame:
        """Return text, confidence (the characters' mean) and confidences (one a character).

        Raises:
            MlflowException: a row holds no base64, or no image that can be read; the server answers 400.
        """
        images = [_decoded(row, text) for row, text in enumerate(model_input["image"])]
        rows = []
        for row, found in enumerate(self.recognizer.read_all(images)):
            if isinstance(found, Refusal):
                raise _refused(row, found.reason)
            rows.append(
                {
                    "text": found.text,
                    "confidence": found.confidence,
                    "confidences": [character.confidence for character in found.characters],
                }
            )
        return pd.DataFrame(rows, columns=["text", "confidence", "confidences"])


def _decoded(row: int, text: Any) -> bytes:
    try:
        return base64.b64decode(_DATA_URL.sub("", text, count=1), validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise _refused(row, f"not base64 ({error}). Send an image file in base64.") from error


def _refused(row: int, reason: str) -> MlflowException:
    return MlflowException(f"image {row}: {reason}", error_code=INVALID_PARAMETER_VALUE)


set_model(ServedRecognizer())
