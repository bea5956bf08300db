"""PDFs made by hand."""

from collections.abc import Sequence
from io import BytesIO

from PIL import Image, ImageDraw

PAGE = "<</Type/Page/Parent 2 0 R/MediaBox[0 0 200 100]{}>>"


def written(*objects: str | bytes, trailer: str = "") -> bytes:
    """A PDF of these objects, numbered from 1; the first is the catalogue."""
    out, places = BytesIO(), []
    out.write(b"%PDF-1.7\n")
    for number, content in enumerate(objects, start=1):
        places.append(out.tell())
        body = content.encode() if isinstance(content, str) else content
        out.write(b"%d 0 obj\n%b\nendobj\n" % (number, body))
    start = out.tell()
    out.write(b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1))
    out.writelines(b"%010d 00000 n \n" % place for place in places)
    out.write(f"trailer<</Size {len(objects) + 1}/Root 1 0 R{trailer}>>\nstartxref\n{start}\n%%EOF".encode())
    return out.getvalue()


def stream(content: str, entries: str = "") -> str:
    return f"<</Length {len(content)}{entries}>>stream\n{content}\nendstream"


def one_page(page: str = "", *further: str | bytes, catalogue: str = "", trailer: str = "") -> bytes:
    """A PDF of one page with more entries, and objects from number 4 on."""
    tree = "<</Type/Pages/Count 1/Kids[3 0 R]>>"
    return written(f"<</Type/Catalog/Pages 2 0 R{catalogue}>>", tree, PAGE.format(page), *further, trailer=trailer)


def many_pages(count: int) -> bytes:
    kids = " ".join(f"{number} 0 R" for number in range(3, count + 3))
    tree = f"<</Type/Pages/Count {count}/Kids[{kids}]>>"
    return written("<</Type/Catalog/Pages 2 0 R>>", tree, *[PAGE.format("")] * count)


def numbers(texts: Sequence[str]) -> bytes:
    """A PDF whose pages show these numbers, large, on letter paper."""
    pages = []
    for text in texts:
        page = Image.new("RGB", (612, 792), "white")
        ImageDraw.Draw(page).text((100, 150), text, fill="black", font_size=200)
        pages.append(page)
    file = BytesIO()
    pages[0].save(file, "PDF", save_all=True, append_images=pages[1:])
    return file.getvalue()
