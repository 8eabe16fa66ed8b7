import io

import pytest
from PIL import ExifTags, Image, PngImagePlugin

from visplice.vision.image_facts import examine

XMP = '<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


def exif():
    result = Image.Exif()
    result[ExifTags.Base.Orientation] = 6
    return result


def png(*texts, zip=False, **options):
    info = PngImagePlugin.PngInfo()
    for key, text in texts:
        (info.add_itxt if key.startswith("XML") else info.add_text)(key, text, zip=zip)
    file = io.BytesIO()
    Image.new("RGB", (20, 10), "red").save(file, "PNG", pnginfo=info, **options)
    return file.getvalue()


def raw_profile():
    data = exif().tobytes()
    return "Raw profile type exif", f"\nexif\n  {len(data)}\n{data.hex()}"


@pytest.mark.parametrize(
    "data",
    [
        png(exif=exif()),
        png(("XML:com.adobe.xmp", XMP)),
        png(("XML:com.adobe.xmp", XMP), zip=True),
        png(raw_profile()),
        png(raw_profile(), zip=True),
    ],
    ids=["eXIf", "xmp", "packed xmp", "raw profile", "packed raw profile"],
)
def test_a_turned_png_is_noticed_wherever_it_says_so(data):
    facts, image = examine(data, "png")
    assert facts.oddities == ("exif-rotation",)
    assert (facts.width, facts.height) == (20, 10) and image.size == (10, 20)


def test_a_png_is_decoded_once(monkeypatch):
    prepare, calls = PngImagePlugin.PngImageFile.load_prepare, []
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load_prepare", lambda self: [calls.append(1), prepare(self)])
    assert examine(png(("Title", "a red picture")), "png")[0].oddities == ()
    assert len(calls) == 1
