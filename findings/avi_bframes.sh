#!/usr/bin/env bash
# Frames of H.264 in AVI come out of the decoder in the right order, and with times of presentation that are not.
#
# AVI stores when a frame is decoded. PyAV 18.1.0 (its wheels bring FFmpeg 8.1, libavformat 62.12) fills in a time of
# presentation for each packet all the same, its decoding time plus one, and the frame keeps it. Of one encoding with
# two B-frames, frames 0 1 2 3 4 5 6 have pts 0 1 2 3 4 5 6 from mp4, and 1 3 4 2 6 7 5 from AVI: who sorts frames by
# pts, or makes them rise with max(), shows some twice and others never. UCF101 is distributed as such a set (MPEG-4).
#
# Expected: no pts (the container has none), or times that rise with the frames.
#
# What it taught: frames of AVI are counted, one out of the decoder for one in (vatt_engine/data/frame_times.py), and
# tests/data/test_frame_times.py reads H.264, MPEG-4 and MPEG-2 with B-frames from it, packed ones too.
# Exits 0 while it is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet av==18.1.0 numpy
"$folder/venv/bin/python" - <<'PYTHON'
import io
import sys

import av


def written(container_format):
    """40 grey pictures, picture n of level 20 + 5 n."""
    memory = io.BytesIO()
    with av.open(memory, "w", format=container_format) as container:
        stream = container.add_stream("libx264", rate=25, options={"bf": "2", "b-adapt": "0", "g": "100"})
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for number in range(40):
            frame = av.VideoFrame(64, 64, "yuv420p")
            for plane, level in zip(frame.planes, (20 + 5 * number, 128, 128)):
                plane.update(bytes([level]) * plane.buffer_size)
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return io.BytesIO(memory.getvalue())


def decoded(container_format):
    """(number by content, pts in frames) in the order of the decoder."""
    with av.open(written(container_format)) as container:
        frames = list(container.decode(video=0))
    numbers = [round((int(frame.to_ndarray()[0, 0]) - 20) / 5) for frame in frames]
    return numbers, [None if frame.pts is None else round(frame.pts * frame.time_base * 25) for frame in frames]


print("PyAV", av.__version__, "libavformat", av.library_versions["libavformat"])
for container_format in ("mp4", "avi"):
    numbers, stamps = decoded(container_format)
    print(container_format, "frames", numbers[:10], "pts", stamps[:10])
    assert numbers == list(range(40))
    if container_format == "mp4":
        assert stamps == numbers
known = [stamp for stamp in stamps if stamp is not None]
sys.exit(0 if known != sorted(known) else 1)
PYTHON
