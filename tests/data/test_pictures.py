"""What a picture looks like: upright, at its colours, with its pixels; the right values are computed here."""

import io
import struct
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import ColorRange, Colorspace
from media_files import numbered, numbers_of, write_media

from vatt_engine.data import encode
from vatt_engine.data.media import Media, decode_clip
from vatt_engine.data.pictures import upright
from vatt_engine.data.resample import area_scaled

QUADRANTS = torch.zeros(64, 96, 3, dtype=torch.uint8)  # R G / B W
QUADRANTS[:32, :48, 0] = QUADRANTS[:32, 48:, 1] = QUADRANTS[32:, :48, 2] = 255
QUADRANTS[32:, 48:] = 255
NAMES = {(1, 0, 0): "R", (0, 1, 0): "G", (0, 0, 1): "B", (1, 1, 1): "W"}
# What EXIF's orientation means for these quadrants, by the standard's words for where row 0 and column 0 are.
ORIENTED = {1: "RG BW", 2: "GR WB", 3: "WB GR", 4: "BW RG", 5: "RB GW", 6: "BR WG", 7: "WG BR", 8: "GW RB"}
# a, b, c, d of the display matrices that mean the same.
MATRICES = {1: "1001", 2: "m001", 3: "m00m", 4: "100m", 5: "0110", 6: "01m0", 7: "0mm0", 8: "0m10"}


def quadrants_of(picture):
    """The colours of the four quarters, as `RG BW`."""
    height, width = picture.shape[:2]
    rows = [
        [tuple((picture[y, x] > 128).int().tolist()) for x in (width // 4, 3 * width // 4)]
        for y in (height // 4, 3 * height // 4)
    ]
    return " ".join("".join(NAMES[colour] for colour in row) for row in rows)


def first_picture(path, **options):
    return decode_clip(path, 0.0, num_frames=1, num_samples=0, **options).video[0]


def matrix_of(case):
    return [{"1": 1, "0": 0, "m": -1}[letter] << 16 for letter in MATRICES[case]]


@pytest.mark.parametrize("case", MATRICES)
def test_display_matrices_turn_and_mirror(tmp_path, case):
    """In mp4, as recorders of selfies write them; the matrix is put into the header."""
    write_media(tmp_path / "a.mp4", QUADRANTS.expand(5, -1, -1, -1), fps=5)
    content = bytearray((tmp_path / "a.mp4").read_bytes())
    a, b, c, d = matrix_of(case)
    place = content.index(b"tkhd") + 4 + 40
    content[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    (tmp_path / "a.mp4").write_bytes(content)
    picture = first_picture(tmp_path / "a.mp4")
    assert quadrants_of(picture) == ORIENTED[case]
    assert picture.shape[:2] == ((96, 64) if case > 4 else (64, 96))
    assert torch.equal(upright(QUADRANTS, matrix_of(case)).float().mean((0, 1)), QUADRANTS.float().mean((0, 1)))


def exif_jpeg(orientation):
    """A JPEG image of the quadrants whose EXIF data has an orientation."""
    memory = io.BytesIO()
    with av.open(memory, "w", format="image2pipe") as container:
        stream = container.add_stream("mjpeg", rate=1)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuvj420p"
        frame = av.VideoFrame.from_ndarray(QUADRANTS.numpy()).reformat(format="yuvj420p")
        container.mux([*stream.encode(frame), *stream.encode(None)])
    tiff = b"II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x112, 3, 1, orientation, 0, 0)
    body = b"Exif\0\0" + tiff
    content = memory.getvalue()
    return content[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + content[2:]


@pytest.mark.parametrize("orientation", ORIENTED)
def test_exif_turns_and_mirrors(tmp_path, orientation):
    (tmp_path / "a.jpg").write_bytes(exif_jpeg(orientation))
    assert quadrants_of(first_picture(tmp_path / "a.jpg")) == ORIENTED[orientation]


def write_planes(path, form, planes, *, count=3, codec="ffv1", **about):
    """A file of equal pictures whose planes have these values [H, W], which no scaler has touched."""
    height, width = planes[0].shape[0], planes[0].shape[1] // (4 if form == "rgba" else 1)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = width, height, form
        for name in about.keys() & {"colorspace", "color_range"}:
            setattr(stream.codec_context, name, about[name])
        if "aspect" in about:
            stream.codec_context.sample_aspect_ratio = about["aspect"]
        for number in range(count):
            frame = av.VideoFrame(width, height, form)
            for plane, values in zip(frame.planes, planes):
                row = np.frombuffer(plane, values.dtype).reshape(plane.height, -1)
                row[:, : values.shape[1]] = values
            for name in about.keys() & {"colorspace", "color_range"}:
                setattr(frame, name, about[name])
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def constant(*values, dtype=np.uint8):
    return [np.full((32, 32), value, dtype) for value in values]


def rgb_of(y, u, v, kr, kb, *, full=False, bits=8):
    """By the definition: ITU-R BT.601, BT.709 and BT.2020 in `kr` and `kb`."""
    top = 1 << (bits - 8)
    y, u, v = (value / top for value in (y, u, v))
    luma, blue, red = (
        (y / 255, (u - 128) / 255, (v - 128) / 255) if full else ((y - 16) / 219, (u - 128) / 224, (v - 128) / 224)
    )
    r, b = luma + 2 * (1 - kr) * red, luma + 2 * (1 - kb) * blue
    g = (luma - kr * r - kb * b) / (1 - kr - kb)
    return [min(max(255 * value, 0), 255) for value in (r, g, b)]


BT601, BT709, BT2020 = (0.299, 0.114), (0.2126, 0.0722), (0.2627, 0.0593)
FULL, LIMITED = ColorRange.JPEG.value, ColorRange.MPEG.value


@pytest.mark.parametrize(
    ("about", "weights", "full"),
    [
        ({}, BT601, False),  # nothing said: BT.601, however large
        ({"colorspace": Colorspace.ITU709.value, "color_range": LIMITED}, BT709, False),
        ({"colorspace": 6, "color_range": LIMITED}, BT601, False),
        ({"colorspace": Colorspace.ITU709.value, "color_range": FULL}, BT709, True),
        ({"colorspace": 6, "color_range": FULL}, BT601, True),
    ],
)
def test_colours_are_those_of_the_tagged_matrix_and_range(tmp_path, about, weights, full):
    write_planes(tmp_path / "a.mkv", "yuv444p", constant(120, 90, 170), **about)
    want = torch.tensor(rgb_of(120, 90, 170, *weights, full=full))
    assert (first_picture(tmp_path / "a.mkv").float() - want).abs().max() <= 1.5


def test_hdr_keeps_its_curve(tmp_path):
    """10 bits of BT.2020 with the curve PQ: the matrix is undone, light is not mapped to a common screen."""
    about = {"colorspace": Colorspace.BT2020.value, "color_range": LIMITED}
    write_planes(tmp_path / "a.mkv", "yuv444p10le", constant(480, 400, 620, dtype=np.uint16), **about)
    want = torch.tensor(rgb_of(480, 400, 620, *BT2020, bits=10))
    assert (first_picture(tmp_path / "a.mkv").float() - want).abs().max() <= 1.5


def test_alpha_is_left_out(tmp_path):
    """The colour is that which is stored, also where the picture is transparent."""
    pixels = np.zeros((32, 32 * 4), np.uint8)
    pixels[:, 0::4], pixels[:, 1::4], pixels[:, 2::4], pixels[:, 3::4] = 200, 100, 50, np.arange(32) * 8
    write_planes(tmp_path / "a.mov", "rgba", [pixels], codec="png")
    assert torch.equal(first_picture(tmp_path / "a.mov"), torch.tensor([200, 100, 50]).byte().expand(32, 32, 3))


def test_interlaced_frames_are_taken_as_stored(tmp_path):
    """Both fields of a frame, line by line: nothing is blended or doubled."""
    lines = np.where(np.arange(32)[:, None] % 2, 200, 50).astype(np.uint8).repeat(32, 1)
    grey = np.full((32, 32), 128, np.uint8)
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("mpeg2video", rate=10, options={"flags": "+ildct+ilme", "qmin": "1", "q": "1"})
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        frame = av.VideoFrame(32, 32, "yuv420p")
        for plane, values in zip(frame.planes, (lines, grey[:16, :16], grey[:16, :16])):
            np.frombuffer(plane, np.uint8).reshape(plane.height, -1)[:, : values.shape[1]] = values
        container.mux([*stream.encode(frame), *stream.encode(None)])
    with av.open(str(tmp_path / "a.mkv")) as container:
        assert next(container.decode(video=0)).interlaced_frame
    picture = first_picture(tmp_path / "a.mkv").float().mean((1, 2))
    assert (picture[1::2].min() - picture[0::2].max()) > 150


@pytest.mark.parametrize("form", ["yuv420p", "yuv422p", "yuv411p", "yuv420p10le"])
def test_colours_of_odd_sides_stay_in_place(tmp_path, form):
    """161 x 121 is 164 x 124 without its last columns and rows: the colours must be those, right up to the edge."""
    dtype, top = (np.uint16, 4) if "10" in form else (np.uint8, 1)
    across, down = {"yuv420p": (2, 2), "yuv422p": (2, 1), "yuv411p": (4, 1), "yuv420p10le": (2, 2)}[form]
    generator = np.random.default_rng(0)
    luma = generator.integers(60, 180, (124, 164)).astype(dtype) * top
    chroma = [generator.integers(60, 190, (124 // down, 164 // across)).astype(dtype) * top for _ in range(2)]
    write_planes(tmp_path / "even.mkv", form, [luma, *chroma])
    odd = [plane[: -(-121 // down), : -(-161 // across)] for plane in chroma]
    write_planes(tmp_path / "odd.mkv", form, [luma[:121, :161], *odd])
    even = first_picture(tmp_path / "even.mkv")[:121, :161].int()
    assert (first_picture(tmp_path / "odd.mkv").int() - even).abs()[:-2, :-2].max() <= 1
    small = first_picture(tmp_path / "odd.mkv", short_side=60)
    mean = area_scaled(first_picture(tmp_path / "odd.mkv")[None], small.shape[1], 60)[0]
    assert (small.int() - mean.int()).abs().max() <= 2


@pytest.mark.parametrize(("codec", "suffix"), [("mjpeg", ".avi"), ("libx264", ".mp4"), ("libvpx-vp9", ".webm")])
def test_white_and_grey_survive_a_shard(tmp_path, codec, suffix):
    path = tmp_path / f"a{suffix}"
    for level in (255, 128, 0):
        pictures = [torch.full((64, 64, 3), level, dtype=torch.uint8)] * 3
        options = {"mjpeg": {"qmin": "3", "qmax": "3"}, "libx264": {"crf": "20"}, "libvpx-vp9": {"crf": "28", "b": "0"}}
        encode.write_pictures(path, pictures, fps=10, codec=codec, options=options[codec])
        picture = first_picture(path)
        assert (picture.int() - level).abs().max() <= (0 if codec == "mjpeg" else 1), (
            f"{level}: {picture[0, 0].tolist()}"
        )


def test_pixels_may_be_made_square(tmp_path):
    """340 x 256 with pixels of 64:51, as HMDB51 and others have it, is a picture of 5:3."""
    planes = [
        np.full((256, 340), 100, np.uint8),
        np.full((128, 170), 128, np.uint8),
        np.full((128, 170), 128, np.uint8),
    ]
    planes[0][:, 170:] = 200
    write_planes(tmp_path / "a.mp4", "yuv420p", planes, codec="libx264", aspect=Fraction(64, 51))
    form = {"num_frames": 1, "fps": 10.0, "num_samples": 0, "sample_rate": 1}
    stored, square = Media(tmp_path / "a.mp4"), Media(tmp_path / "a.mp4", square_pixels=True)
    assert stored.info.pixel_aspect == square.info.pixel_aspect == Fraction(64, 51)
    assert tuple(stored.read(0.0, short_side=128, **form).video.shape[1:3]) == (128, 170)
    clip = square.read(0.0, short_side=128, **form)
    assert tuple(clip.video.shape[1:3]) == (128, 214)
    assert clip.video[0, :, :104].max() < 130 < 180 < clip.video[0, :, 109:].min()
    assert tuple(square.read(0.0, **form).video.shape[1:3]) == (256, 427)
    assert "got 1.255 times as wide as high, taken as stored" in stored.read(0.0, **form).set_note
    assert clip.set_note == ""


def test_numbers_are_read_at_all():
    assert numbers_of(numbered(40, start=7)) == list(range(7, 47))
