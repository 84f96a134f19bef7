"""A page on this machine alone: give an image, see the text and where the model looked, correct it.

Everything that the page loads lies in `static`; nothing comes from elsewhere, and nothing is sent there.
"""

import base64
import contextlib
import hashlib
import io
import json
import socket
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from PIL import Image, UnidentifiedImageError
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from paragraph_ocr.data.scan import FORMATS
from paragraph_ocr.errors import UserError
from paragraph_ocr.model.transformer import TransformerReader
from paragraph_ocr.reading import Recognizer
from paragraph_ocr.reading.examples import draw_examples
from paragraph_ocr.reading.explain import trace
from paragraph_ocr.reading.page import prepare
from paragraph_ocr.vocabulary import listed

HOST = "127.0.0.1"
MAX_BYTES = 32_000_000
MAX_PIXELS = 50_000_000
"""Half a page at 1,200 dpi; decoded it takes half a gigabyte."""

NUM_EXAMPLES = 4

_STATIC = Path(__file__).parent / "static"
_SUFFIXES = {"PNG": ".png", "JPEG": ".jpg", "TIFF": ".tif", "WEBP": ".webp"}
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


class Refused(Exception):
    """A request that cannot be answered, with its HTTP status and a line for a person."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


@dataclass(frozen=True, slots=True)
class Mistake:
    """An image and what it truly says."""

    image: bytes
    text: str


def build_app(recognizer: Recognizer, *, title: str, corrections: Path) -> Starlette:
    """Return the page's application.

    Args:
        title: names the model on the page.
        corrections: folder for images whose reading was corrected, as datamodule=folder takes it.
    """
    examples = [example.png() for example in draw_examples(recognizer.experiment, NUM_EXAMPLES)]
    one_at_a_time = threading.Lock()  # two readings at once would take twice as long each

    async def page(request: Request) -> Response:
        return FileResponse(_STATIC / "page.html")

    async def about(request: Request) -> Response:
        return JSONResponse(
            {
                "title": title,
                "canvas": recognizer.canvas,
                "examples": len(examples),
                "corrections": str(corrections),
                "max_bytes": MAX_BYTES,
            }
        )

    async def example(request: Request) -> Response:
        number = request.path_params["number"]
        if number >= len(examples):
            raise Refused(404, f"There is no example {number}.")
        return Response(examples[number], media_type="image/png")

    async def read(request: Request) -> Response:
        image = await _body(request, "application/octet-stream", most=MAX_BYTES)

        def work() -> dict[str, Any]:
            _check_image(image)
            with one_at_a_time:
                return reading_of(recognizer, image)

        return JSONResponse(await run_in_threadpool(work))

    async def mistake(request: Request) -> Response:
        # base64 takes four bytes for three
        body = await _body(request, "application/json", most=MAX_BYTES * 4 // 3 + 100_000)
        found = _mistake(body)
        name = await run_in_threadpool(keep_correction, found, corrections)
        lacking = recognizer.vocabulary.unknown([recognizer.vocabulary.prepare(found.text)])
        return JSONResponse(
            {
                "saved": str(corrections / name),
                "lacking": listed(lacking) if lacking else "",
                "train": f"python train.py datamodule=folder datamodule.root={corrections}",
            }
        )

    return Starlette(
        routes=[
            Route("/", page),
            Route("/about", about),
            Route("/examples/{number:int}", example),
            Route("/read", read, methods=["POST"]),
            Route("/mistake", mistake, methods=["POST"]),
            Mount("/static", StaticFiles(directory=_STATIC)),
        ],
        middleware=[
            # a page of another site must not reach this one, by a name of its own or by a form
            Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"]),
            Middleware(_Guard),
        ],
        exception_handlers={Refused: _refuse, UserError: _refuse},
    )


def serve(app: Starlette, *, port: int) -> None:
    """Answer on this machine's own address until interrupted; port 0 takes a free one.

    Raises:
        UserError: the port is taken.
    """
    from paragraph_ocr import console

    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((HOST, port))
        except OSError as error:
            raise UserError(
                f"port={port} cannot be had: {error.strerror}. Pass port=0 for a free one."
            ) from error
        console.say(f"open http://{HOST}:{listening.getsockname()[1]} (Ctrl-C ends it)")
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", server_header=False))
        with contextlib.suppress(KeyboardInterrupt):
            server.run(sockets=[listening])


def reading_of(recognizer: Recognizer, image: bytes) -> dict[str, Any]:
    """Return the reading as plain values, with the page as the model saw it and where it looked.

    `attention` is uint8 "L h w" in base64, each character's grid scaled to its own greatest weight;
    null for a model without attention.
    """
    page, (height, width) = recognizer.page(image)
    transcript = recognizer.read(image)
    found: dict[str, Any] = {
        "text": transcript.text,
        "confidence": transcript.confidence,
        "characters": [[one.character, one.confidence] for one in transcript.characters],
        "page": _data_url(255 - page[0, :height, :width].numpy()),
        "size": [height, width],
        "attention": None,
    }
    if isinstance(recognizer.model, TransformerReader) and transcript.characters:
        written = recognizer.vocabulary.encode(transcript.text)[:-2]  # the last writes nothing more
        traced = trace(recognizer.model, page, written, size=(height, width))
        looks = traced.looks()
        scaled = looks / looks.amax(dim=(1, 2), keepdim=True).clamp(min=1e-9)
        found["attention"] = base64.b64encode((scaled * 255).byte().numpy().tobytes()).decode()
        found["grid"] = list(looks.shape[1:])
        found["cell"] = list(traced.cell_px)
    return found


def keep_correction(mistake: Mistake, folder: Path) -> str:
    """Write image and text side by side; return the image's name.

    The name is made of the image's content, so that a later correction takes the earlier one's place.
    """
    suffix = _SUFFIXES[_check_image(mistake.image)]
    prepare(mistake.image, (32, 32))  # a file that is broken further on would stop a training
    stem = hashlib.sha256(mistake.image).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    # the text first: training refuses a folder with an image that has none
    for name, content in (
        (f"{stem}.txt", mistake.text.encode()),
        (f"{stem}{suffix}", mistake.image),
    ):
        aside = folder / f".{name}.part"
        aside.write_bytes(content)
        aside.replace(folder / name)
    return f"{stem}{suffix}"


def _check_image(image: bytes) -> str:
    """Return the image's format, from its first bytes; nothing is decoded.

    Raises:
        Refused: it is no image, or claims more pixels than are wanted in memory.
    """
    kinds = ", ".join(FORMATS)
    try:
        with (
            warnings.catch_warnings(action="ignore", category=Image.DecompressionBombWarning),
            Image.open(io.BytesIO(image), formats=FORMATS) as opened,
        ):
            width, height = opened.size
            kind = opened.format
    except Image.DecompressionBombError:
        raise _too_large("hundreds of millions of") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError):
        raise Refused(415, f"This is no {kinds} image. Convert it to one.") from None
    if width * height > MAX_PIXELS:
        raise _too_large(f"{width} x {height}")
    assert kind is not None
    return kind


def _too_large(pixels: str) -> Refused:
    return Refused(
        413, f"The image claims {pixels} px, and {MAX_PIXELS:,} px are the most. Scale it down."
    )


def _mistake(body: bytes) -> Mistake:
    try:
        sent = json.loads(body)
        image, text = base64.b64decode(sent["image"], validate=True), sent["text"]
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(400, "This is no JSON object of image (base64) and text.") from error
    if not isinstance(text, str) or not text.strip():
        raise Refused(422, "The text is empty. Type what the image says.")
    return Mistake(image, text.strip("\n"))


async def _body(request: Request, kind: str, *, most: int) -> bytes:
    """Return what was sent, never taking in more than the most.

    Raises:
        Refused: it is too long, or of another kind: a form of another site can send but three kinds.
    """
    if request.headers.get("content-type", "").partition(";")[0] != kind:
        raise Refused(415, f"Send it as {kind}.")
    received = bytearray()
    async for part in request.stream():
        received += part
        if len(received) > most:
            raise Refused(
                413, f"More than {MAX_BYTES // 10**6} MB were sent. Scale the image down."
            )
    if not received:
        raise Refused(400, "Nothing was sent.")
    return bytes(received)


async def _refuse(request: Request, error: Exception) -> Response:
    status = error.status if isinstance(error, Refused) else 422
    return JSONResponse({"error": str(error)}, status_code=status)


class _Guard:
    """Refuses what another site's page sends, and gives every answer the same headers."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        origin = headers.get(b"origin")
        if origin is not None and origin != b"http://" + headers.get(b"host", b""):
            answer = JSONResponse({"error": "Another site asked."}, status_code=403)
            await answer(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        await self.app(scope, receive, with_headers)


def _data_url(grey: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(grey).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
