"""Which frame is shown when, in containers that say less than one would think: frame n at n / fps, always."""

import struct
from fractions import Fraction
from types import SimpleNamespace

import av
import pytest
import torch
from media_files import busy, numbered, numbers_of, write_media

from vatt_engine.data.decoding import _timed
from vatt_engine.data.frame_times import PresentationTimes
from vatt_engine.data.media import Media, MediaError

COUNT, FPS = 75, 25.0
STARTS = (0.0, 0.04, 0.5, 1.0, 1.31, 1.96, 2.5, 2.88)


def shown(path, start, count=12, fps=FPS):
    return numbers_of(Media(path).read(start, num_frames=count, fps=fps, num_samples=0, sample_rate=1).video)


def check_numbers(path):
    """The native rate and half of it, behind seeks of all kinds."""
    assert Media(path).duration == pytest.approx(COUNT / FPS, abs=0.1)  # flv and nut: the delay of the codec
    for fps in (FPS, FPS / 2):
        for start in STARTS:
            count = min(12, int((COUNT / FPS - start) * fps + 1e-6) or 1)
            want = [int((start + i / fps + 1e-3) * FPS) for i in range(count)]
            assert shown(path, start, count, fps) == want, f"{path.name} from {start} at {fps}"


B_FRAMES = {"bf": "2", "g": "12"}
CASES = {
    "mp4": ("a.mp4", None, B_FRAMES),
    "h264 in avi": ("a.avi", "libx264", B_FRAMES),
    "h264 in avi, a pyramid in one group": ("a.avi", "libx264", {"bf": "3", "g": "250", "b-pyramid": "normal"}),
    "h264 in avi, open groups": ("a.avi", "libx264", B_FRAMES | {"x264-params": "open-gop=1"}),
    "mpeg4 in avi": ("a.avi", "mpeg4", B_FRAMES),
    "mpeg2 in avi": ("a.avi", "mpeg2video", B_FRAMES),
    "mpeg4 in ts": ("a.ts", "mpeg4", B_FRAMES),  # a seek ends anywhere, and the decoder begins with grey pictures
    "h264 in ts": ("a.ts", "libx264", B_FRAMES),
    "h264 in flv": ("a.flv", "libx264", B_FRAMES),
    "h264 in nut": ("a.nut", "libx264", B_FRAMES),
    "wmv": ("a.wmv", "wmv2", {"g": "12"}),
    "mpeg4 in asf": ("a.wmv", "mpeg4", B_FRAMES),
    "bare h264": ("a.h264", None, B_FRAMES),
    "bare hevc": ("a.hevc", None, {"x265-params": "bframes=4:keyint=20:log-level=none"}),
}


@pytest.mark.parametrize("case", CASES)
def test_pictures_follow_each_other_in_every_container(tmp_path, case):
    name, codec, options = CASES[case]
    write_media(tmp_path / name, numbered(COUNT), fps=FPS, video_codec=codec, options=options)
    check_numbers(tmp_path / name)


def rewritten(source, target, change):
    """A file with the video packets that `change` makes of those of another."""
    with av.open(str(source)) as old, av.open(str(target), "w") as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        packets = [packet for packet in old.demux(stream) if packet.size]
        for number, content in enumerate(change([bytes(packet) for packet in packets])):
            packet = av.Packet(content)
            packet.stream, packet.time_base = copy, stream.time_base
            packet.pts = packet.dts = number
            packet.is_keyframe = packets[number].is_keyframe
            new.mux(packet)


def packed(contents):
    """As DivX and Xvid store B-frames, UCF101's among them: P and B in one chunk, and then one that says nothing.

    I0 P2 B1 P4 B3 becomes I0 (P2 B1) - (P4 B3) -. A text in the first chunk says so.
    """
    head = next(contents[0].index(code) for code in (b"\0\0\1\xb3", b"\0\0\1\xb6") if code in contents[0])
    yield contents[0][:head] + b"\0\0\1\xb2DivX503b1393p" + contents[0][head:]
    number = 1
    while number < len(contents):
        is_b = number + 1 < len(contents) and contents[number + 1][4] >> 6 == 2  # the two bits behind 00 00 01 b6
        yield contents[number] + (contents[number + 1] if is_b else b"")
        if is_b:
            yield b"\0\0\1\xb6\x50\x4f"  # a picture that is not coded
        number += 1 + is_b


def test_packed_pictures_of_avi(tmp_path):
    options = {"bf": "1", "g": "250", "sc_threshold": "1000000000"}
    write_media(tmp_path / "b.avi", numbered(COUNT), fps=FPS, video_codec="mpeg4", options=options)
    rewritten(tmp_path / "b.avi", tmp_path / "p.avi", packed)
    assert (tmp_path / "p.avi").read_bytes().count(b"\0\0\1\xb6\x50\x4f") > 20
    check_numbers(tmp_path / "p.avi")


def test_avi_with_empty_chunks_keeps_the_picture(tmp_path):
    """Programs that record write an empty chunk for a picture that came too late; a decoder takes it for the end."""
    write_media(tmp_path / "a.avi", numbered(30), fps=FPS, video_codec="mjpeg", options={"q:v": "2"})
    content = bytearray((tmp_path / "a.avi").read_bytes())
    index = content.rindex(b"idx1")
    chunks = [index + 8 + 16 * i for i in range(30)]
    for number in (4, 5, 11):
        begin = content.index(b"movi") + struct.unpack_from("<I", content, chunks[number] + 8)[0]
        size = struct.unpack_from("<I", content, begin + 4)[0]
        content[begin + 4 : begin + 8] = bytes(4)
        content[begin + 8 : begin + 16] = b"JUNK" + struct.pack("<I", size + size % 2 - 8)
        content[chunks[number] + 12 : chunks[number] + 16] = bytes(4)
    (tmp_path / "e.avi").write_bytes(content)
    want = [0, 1, 2, 3, 3, 3, 6, 7, 8, 9, 10, 10, *range(12, 30)]
    assert shown(tmp_path / "e.avi", 0.0, 30) == want
    assert shown(tmp_path / "e.avi", 0.8, 5) == want[20:25]


def test_matroska_that_was_made_from_avi(tmp_path):
    """Of the codec V_MS/VFW/FOURCC, whose times are those of decoding."""
    write_media(tmp_path / "a.avi", numbered(COUNT), fps=FPS, video_codec="mpeg4", options=B_FRAMES)
    rewritten(tmp_path / "a.avi", tmp_path / "a.mkv", iter)
    content = (tmp_path / "a.mkv").read_bytes()
    native, old = b"\x86\x8fV_MPEG4/ISO/ASP", b"\x86\x8fV_MS/VFW/FOURCC"
    assert content.count(native) == 1
    private = content.index(b"\x63\xa2", content.index(native))
    length = content[private + 2] & 0x7F
    header = struct.pack("<IiiHH4sIiiII", 40, 128, 64, 1, 24, b"XVID", 128 * 64 * 3, 0, 0, 0, 0)
    assert length >= len(header)
    header += bytes(length - len(header))
    content = content.replace(native, old)
    content = content[: private + 3] + header + content[private + 3 + length :]
    (tmp_path / "v.mkv").write_bytes(content)
    check_numbers(tmp_path / "v.mkv")


def test_frames_without_a_time_of_their_own_have_that_of_their_packet():
    """Windows Media: a packet has a time and none of its first frames does; then samples are counted."""
    times = PresentationTimes(0.1, 0.0)
    seen = []
    for stamp, count in ((387, 2), (687, 3)):
        times.feed(SimpleNamespace(pts=stamp, time_base=Fraction(1, 1000)))
        for number in range(count):
            own = 687 if (stamp, number) == (687, 0) else None
            frame = SimpleNamespace(pts=own, samples=512, sample_rate=8_000, time_base=Fraction(1, 1000))
            seen.append(times.of(frame))
    assert seen == pytest.approx([0.287, 0.351, 0.587, 0.651, 0.715])


def test_palettes_are_kept_behind_a_seek(tmp_path):
    """The first packet of an AVI alone has the palette."""
    palette = torch.randint(0, 256, (256, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8).numpy()
    with av.open(str(tmp_path / "a.avi"), "w") as container:
        stream = container.add_stream("rawvideo", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "pal8"
        for number in range(30):
            pixels = torch.full((32, 32), number, dtype=torch.uint8).numpy()
            frame = av.VideoFrame.from_ndarray((pixels, palette), format="pal8")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    read = {"num_frames": 3, "fps": 10.0, "num_samples": 0, "sample_rate": 1}
    whole = Media(tmp_path / "a.avi").read(0.0, **read | {"num_frames": 30}).video
    assert len(whole.flatten(1).unique(dim=0)) == 30
    assert torch.equal(Media(tmp_path / "a.avi").read(2.0, **read).video, whole[20:23])


def test_bare_streams_have_the_rate_of_their_header(tmp_path):
    write_media(tmp_path / "a.h264", numbered(60), fps=Fraction(30_000, 1001), options=B_FRAMES)
    info = Media(tmp_path / "a.h264").info
    assert info.duration == pytest.approx(60 * 1001 / 30_000, abs=1e-3)
    assert info.fps == pytest.approx(30_000 / 1001)
    assert shown(tmp_path / "a.h264", 40 * 1001 / 30_000, 5, 30_000 / 1001) == [40, 41, 42, 43, 44]
    (tmp_path / "cut.h264").write_bytes((tmp_path / "a.h264").read_bytes()[:500])
    with pytest.raises(MediaError):
        shown(tmp_path / "cut.h264", 5.0)


def test_intra_refresh_is_exact_behind_a_seek(tmp_path):
    """No picture stands alone: what is decoded from one place on is off by some levels for a while."""
    texture = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0))
    texture = torch.nn.functional.interpolate(texture[None], scale_factor=8, mode="bicubic")[0].clamp(0, 1)
    scene = texture.permute(1, 2, 0).mul(255).byte()
    frames = torch.stack([scene.roll((-2 * i, -3 * i), (0, 1))[:96, :144] for i in range(100)])
    options = {"x264-params": "intra-refresh=1:keyint=20:bframes=0", "crf": "35"}
    write_media(tmp_path / "a.mp4", frames, fps=FPS, options=options)
    media = Media(tmp_path / "a.mp4")
    whole = media.read(0.0, num_frames=100, fps=FPS, num_samples=0, sample_rate=1).video
    for start in (1.6, 2.4, 3.2):
        window = media.read(start, num_frames=10, fps=FPS, num_samples=0, sample_rate=1).video
        first = round(start * FPS)
        assert torch.equal(window, whole[first : first + 10])


@pytest.mark.parametrize("sound", ["mp2", "libmp3lame", "ac3"])
def test_program_streams_begin_with_a_part_of_a_packet(tmp_path, sound):
    wave = 0.5 * torch.sin(torch.linspace(0, 300, 144_000).square() / 10)
    options = B_FRAMES | {"b": "1000000"}
    write_media(tmp_path / "a.mpg", busy(COUNT), fps=FPS, waveform=wave, audio_codec=sound, options=options)
    media = Media(tmp_path / "a.mpg")
    form = {"fps": FPS, "sample_rate": 48_000}
    whole = media.read(0.0, num_frames=0, num_samples=140_000, **form).audio
    with av.open(str(tmp_path / "a.mpg")) as container:
        begins = [float(stream.start_time * stream.time_base) for stream in container.streams]
    for number in (20, 33, 50):
        start = number / FPS + begins[0] - min(begins) + 0.02
        clip = media.read(start, num_frames=8, num_samples=15_360, **form)
        assert numbers_of(clip.video[:, 64:]) == list(range(number, number + 8))
        first = round(start * 48_000)
        torch.testing.assert_close(clip.audio, whole[first : first + 15_360], atol=0.02, rtol=0)


def test_damage_behind_the_first_frame_is_still_an_error():
    """What cannot be decoded right behind a seek is the rest of a packet; later it is damage."""

    def packet(number, good):
        def decode():
            if not good:
                raise av.error.InvalidDataError(1, "damaged")
            return [SimpleNamespace(pts=number, time_base=Fraction(1, 10), samples=1, sample_rate=10)]

        return SimpleNamespace(pts=number, dts=number, size=9, time_base=Fraction(1, 10), decode=decode)

    source = SimpleNamespace(zero=0.0)
    container = SimpleNamespace(format=SimpleNamespace(name="matroska,webm"))
    stream = SimpleNamespace(type="audio")
    seen = _timed(source, container, stream, [packet(n, n != 0 and n != 3) for n in range(5)], True)
    assert [round(next(seen)[0], 1) for _ in range(2)] == [0.1, 0.2]
    with pytest.raises(av.error.InvalidDataError):
        next(seen)
    with pytest.raises(av.error.InvalidDataError):
        next(_timed(source, container, stream, [packet(0, False), packet(1, True)], False))
