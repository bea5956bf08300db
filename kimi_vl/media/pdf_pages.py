"""PDF → pictures of its pages, in a process of its own (see confined.py): PDFium is large, and not thread-safe."""

import math
from typing import Any, BinaryIO

import pypdfium2 as pdfium
import pypdfium2.raw as pdfium_c

from kimi_vl.errors import InvalidRequest
from kimi_vl.media.confined import Channel, Message, Size

FLAGS = pdfium_c.FPDF_ANNOT | pdfium_c.FPDF_REVERSE_BYTE_ORDER  # annotations are drawn; RGB, not BGR
PROTECTIONS = {pdfium_c.FPDF_ERR_PASSWORD: "a password", pdfium_c.FPDF_ERR_SECURITY: "certificates or digital rights"}


def work(channel: Channel, request: Message) -> None:
    """Answers how many pages each file has, then how large the picked ones are, then sends them as they are wanted."""
    names = request["names"]
    channel.begin_step()
    documents = [_open(file, name) for file, name in zip(channel.files, names, strict=True)]
    channel.send({"counts": [len(document) for document in documents]})
    picked = [(place, page) for place, pages in enumerate(channel.receive()["picked"]) for page in pages]
    channel.begin_step()
    channel.send({"sizes": [_points(documents[place], page, names[place]) for place, page in picked]})
    for (place, page), size in zip(picked, channel.receive()["sizes"], strict=True):
        channel.begin_step()
        channel.send({}, _rendered(documents[place], page, size, names[place]))


def _open(file: BinaryIO, name: str) -> pdfium.PdfDocument:
    try:
        document = pdfium.PdfDocument(file)
        document.init_forms()  # so that what is filled in is drawn; this build of PDFium has no JavaScript
    except pdfium.PdfiumError as error:
        if protection := PROTECTIONS.get(error.err_code or 0):
            raise InvalidRequest(f"{name} is protected with {protection}; send it unprotected.") from None
        raise InvalidRequest(f"{name} is no PDF, or is damaged; send it again.") from None
    if len(document) < 1:
        raise InvalidRequest(f"{name} has no pages; send another.")
    return document


def _points(document: pdfium.PdfDocument, page: int, name: str) -> tuple[float, float]:
    """(width, height) of a page, counted from 1, as it is shown."""
    try:
        width, height = document.get_page_size(page - 1)
    except pdfium.PdfiumError:
        raise _damaged(page, name) from None
    if not (0 < width < math.inf and 0 < height < math.inf):
        raise _damaged(page, name)
    return width, height


def _rendered(document: pdfium.PdfDocument, number: int, size: Size, name: str) -> bytes:
    """A page's pixels [height, width, 3], on white, squeezed into exactly this size."""
    width, height = size
    try:
        page = document[number - 1]
        bitmap = pdfium.PdfBitmap.new_native(width, height, pdfium_c.FPDFBitmap_BGR)
        bitmap.fill_rect((255, 255, 255, 255), 0, 0, width, height)
        where: tuple[Any, ...] = (bitmap, page, 0, 0, width, height, 0, FLAGS)
        pdfium_c.FPDF_RenderPageBitmap(*where)
        if document.formenv:
            pdfium_c.FPDF_FFLDraw(document.formenv, *where)
        rows = memoryview(bitmap.buffer).cast("B")
        pixels = b"".join(rows[at : at + 3 * width] for at in range(0, height * bitmap.stride, bitmap.stride))
        bitmap.close()
        page.close()
    except pdfium.PdfiumError:
        raise _damaged(number, name) from None
    return pixels


def _damaged(page: int, name: str) -> InvalidRequest:
    return InvalidRequest(f"{name} is damaged at page {page}; send it again, or pick other pages.")
