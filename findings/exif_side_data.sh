#!/usr/bin/env bash
# PyAV 18.1.0 cannot give any side data of a frame once one kind of it is unknown to PyAV, and EXIF data is.
#
# The wheels bring FFmpeg 8.1, whose decoder of JPEG images attaches the EXIF data to the frame (kind 31), and the
# orientation in it as a display matrix beside it. `frame.side_data` of such an image, which any phone makes, raises
# ValueError: 31 is not a valid Type, so that the matrix cannot be had either; `frame.rotation` has the turn in it and
# not the mirror: orientations 5 and 6 look alike, and so do 1 and 4. A filter that deletes side data of kind 31 helps.
# PyAV 19.0 knows the kind.
#
# Expected: the kinds that PyAV knows, the display matrix among them.
#
# What it taught: the filter, in vatt_engine/data/pictures.py; tests/data/test_pictures.py has all eight orientations.
# Exits 0 while it is so, 1 when it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet av==18.1.0 numpy pillow==12.3.0
"$folder/venv/bin/python" - <<'PYTHON'
import io
import sys

import av
from PIL import Image

print("PyAV", av.__version__, "libavcodec", av.library_versions["libavcodec"])
rotations, refusals = {}, {}
for orientation in range(1, 9):
    image, memory = Image.new("RGB", (32, 16), "red"), io.BytesIO()
    exif = image.getexif()
    exif[0x112] = orientation
    image.save(memory, "JPEG", exif=exif)
    memory.seek(0)
    with av.open(memory) as container:
        frame = next(container.decode(video=0))
    rotations[orientation] = frame.rotation
    try:
        refusals[orientation] = f"none, {len(frame.side_data)} kinds"
    except ValueError as error:
        refusals[orientation] = str(error)
print("rotation by EXIF orientation:", rotations)
print("refusal of side_data:", set(refusals.values()))
alike = rotations[5] == rotations[6] and rotations[1] == rotations[4]
sys.exit(0 if alike and all("not a valid Type" in text for text in refusals.values()) else 1)
PYTHON
