"""Pages of a few words for the tests of reading."""

import cv2
import numpy as np

SENTENCE = "sir the rain came late over dry hills and we sang old songs by a lamp till dawn"


def scans(folder):
    """Return the images of a folder in order."""
    return sorted(path for path in folder.iterdir() if path.suffix != ".txt")


def note(text, *, height=120, width=300):
    """Return dark writing on a light page: uint8 grey."""
    page = np.full((height, width), 235, np.uint8)
    for index, line in enumerate(text.split("\n")):
        cv2.putText(page, line, (12, 40 + 34 * index), cv2.FONT_HERSHEY_SIMPLEX, 0.8, 30, 2)
    return page
