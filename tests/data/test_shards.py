"""The index and the tars of shards: read in place, and refused where they are wrong."""

from __future__ import annotations

import io
import json
import tarfile
from contextlib import closing

import pytest
import torch
from media_files import write_media

from vatt_engine.data.config import DataConfig
from vatt_engine.data.loader import Loader
from vatt_engine.data.manifest import ManifestError
from vatt_engine.data.media import Media, MediaError, MediaLimits, open_media
from vatt_engine.data.shards import FORMAT, ShardWriter, json_line, read_samples, read_shards

KEYS = [f"{i:016x}" for i in (3, 2**63 - 1, 5)]
HEADER = {"format": FORMAT, "fps": 10.0, "sample_rate": 48_000}
VIDEO = {"name": f"{KEYS[0]}.mp4", "offset": 512, "size": 9}
READ = {"num_frames": 3, "fps": 10.0, "num_samples": 4800, "sample_rate": 48_000}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Bytes of one video and one sound, and the rows that describe three samples in two tars."""
    folder = tmp_path_factory.mktemp("made")
    frames = torch.arange(12, dtype=torch.uint8).mul(20)[:, None, None, None].expand(12, 48, 64, 3)
    write_media(folder / "v.mp4", frames, fps=10, options={"g": "4", "bf": "0"})
    write_media(folder / "a.flac", None, waveform=torch.linspace(-1, 1, 57_600))
    return folder


@pytest.fixture
def shards(made, tmp_path):
    """A fresh folder of two tars, whose name FFmpeg must not take for options, and the rows of its index."""
    folder = tmp_path / "odd,:name é %d ,,:x"
    folder.mkdir()
    rows = [HEADER | {"samples": 3}]
    for shard, keys in (("000000.tar", KEYS[:2]), ("000001.tar", KEYS[2:])):
        with closing(ShardWriter(folder / shard)) as tar:
            for key in keys:
                video = tar.add(f"{key}.mp4", made / "v.mp4") | {"frames": 12}
                audio = tar.add(f"{key}.flac", made / "a.flac") | {"samples": 57_600}
                tar.add(f"{key}.json", b"{}")
                row = {"kind": "sample", "key": key, "shard": shard, "duration": 1.2, "captions": [], "label": None}
                rows.append(row | {"video": video, "audio": audio})
    write(folder, rows)
    return folder, rows


def write(folder, rows):
    (folder / "index.jsonl").write_text("".join(map(json_line, rows)), encoding="utf-8")


def test_samples_are_read_where_they_lie(made, shards):
    folder, _ = shards
    raw = Media(made / "v.mp4").read(0.5, **READ), Media(made / "a.flac").read(0.5, **READ)
    before = sorted(path.name for path in folder.iterdir())
    for sample in read_shards(folder):
        clip = open_media(sample).read(0.5, **READ)
        assert torch.equal(clip.video, raw[0].video)
        assert torch.equal(clip.audio, raw[1].audio)
    assert sorted(path.name for path in folder.iterdir()) == before
    assert [f"{sample.id:016x}" for sample in read_shards(folder)] == KEYS
    assert read_shards(folder)[0].path == folder / "000000.tar" / KEYS[0]


def test_a_clip_begins_at_a_frame_with_its_sound(shards):
    sample = read_shards(shards[0])[0]
    for start, expected in ((0.0, 0.0), (0.2995, 0.3), (0.34, 0.3), (0.399, 0.4), (1.1999, 1.1)):
        clip = open_media(sample).read(start, **READ)
        assert clip.start == pytest.approx(expected)
        assert clip.video[0].float().mean() == pytest.approx(20 * round(expected * 10), abs=3)
        assert clip.audio[0] == pytest.approx(-1 + 2 * expected / 1.2, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "count"),
    [("", 3), ("index.jsonl", 3), ("000000.tar", 2), ("{000000..000001}.tar", 3), ("00000[1-9].tar", 1), ("*.tar", 3)],
)
def test_names_of_a_set(shards, name, count):
    folder, _ = shards
    found = read_samples(folder / name)
    assert len(found) == count
    assert [sample.index for sample in found] == list(range(count))


def test_a_manifest_is_still_a_manifest(made, tmp_path):
    (tmp_path / "m.jsonl").write_text(json.dumps({"path": str(made / "v.mp4")}))
    assert not read_samples(tmp_path / "m.jsonl")[0].in_shard


def test_the_loader_takes_them(shards):
    config = DataConfig(batch_size=3, num_frames=3, frame_size=32, num_samples=4800, num_candidates=0, num_threads=1)
    with Loader(read_shards(shards[0]), config) as loader:
        batch = next(iter(loader))
    assert sorted(batch.sample_id.tolist()) == sorted(int(key, 16) for key in KEYS)
    assert batch.audio_mask.all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"key": "../../etc/passwd"}, "key must be 16 hex digits"),
        ({"key": 3}, "key must be 16 hex digits"),
        ({"key": "f" * 16}, "key must be 16 hex digits of 63 bits"),
        ({"key": KEYS[1]}, "video.name must be"),
        ({"shard": "/etc/passwd.tar"}, "shard must name a .tar in the index's folder"),
        ({"shard": "../000000.tar"}, "shard must name a .tar in the index's folder"),
        ({"shard": "index.jsonl"}, "shard must name a .tar in the index's folder"),
        ({"shard": None}, "shard must name a .tar"),
        ({"shard": "000007.tar"}, "shard must be a readable file, got 000007.tar: No such file"),
        ({"video": "x"}, "video must be an object"),
        ({"video": VIDEO | {"name": f"{KEYS[0]}.pkl"}}, r"video.name must be \w+.mp4 or \w+.webm"),
        ({"video": VIDEO | {"offset": 513}}, "video.offset must be a positive multiple"),
        ({"video": VIDEO | {"offset": 512.0}}, "video.offset must be a positive multiple"),
        ({"video": VIDEO | {"size": -1}}, "video.size must be a count"),
        ({"video": VIDEO | {"size": 1 << 40}}, "video.size must end in 000000.tar of"),
        ({"video": VIDEO | {"sha256": "x"}}, "video.sha256 must be 64 hex digits"),
        ({"video": VIDEO | {"sha256": "0" * 64, "frames": 0}}, "video.frames must be a count above 0"),
        ({"audio": VIDEO | {"name": f"{KEYS[0]}.wav"}}, r"audio.name must be \w+.flac"),
        ({"video": None, "audio": None}, "video must be given where audio is not"),
        ({"duration": 0.0}, "duration must be seconds above 0"),
        ({"duration": float("nan")}, "duration must be seconds above 0"),
        ({"duration": True}, "duration must be seconds above 0"),
        ({"captions": [{"text": "a"}]}, r"captions\[0\]\.start must be given"),
        ({"label": {}}, "label must be a 64-bit integer"),
        ({"label": [1, "x"]}, "label must be"),
    ],
)
def test_a_wrong_line_is_refused_with_its_number(shards, changes, message):
    folder, rows = shards
    write(folder, [rows[0], rows[2], rows[1] | changes, rows[3]])
    with pytest.raises(ManifestError, match=rf"index.jsonl:3: {message}"):
        read_shards(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the index must begin with a line of settings, got an empty file"),
        ('{"format": "vatt_engine shards 2", "samples": 0}\n', "index.jsonl:1: format must be 'vatt_engine shards 1'"),
        (json_line({"format": FORMAT, "samples": 0}), "index.jsonl:1: fps must be a number above 0, got None"),
        ("[1]\n", "index.jsonl:1: the row must be a JSON object"),
        ('{"format": ', "index.jsonl:1: the row must be valid JSON"),
        ("\xff", "the text must be UTF-8"),
    ],
)
def test_a_file_that_is_no_index_is_refused(tmp_path, content, message):
    (tmp_path / "index.jsonl").write_bytes(content.encode("latin-1"))
    with pytest.raises(ManifestError, match=message):
        read_shards(tmp_path)


def test_an_index_that_is_cut_or_repeats_itself_is_refused(shards, tmp_path):
    folder, rows = shards
    write(folder, rows[:-1])
    with pytest.raises(ManifestError, match="must hold the samples its first line counts, 1 are missing"):
        read_shards(folder)
    write(folder, [*rows[:-1], rows[1]])
    with pytest.raises(ManifestError, match=rf"index.jsonl:4: key must be there once, got {KEYS[0]} on line 2 too"):
        read_shards(folder)
    write(folder, rows)
    with pytest.raises(ManifestError, match=r"each tar must be in .* with a sample, got 000002.tar"):
        read_shards(folder / "{000000..000009}.tar")
    with pytest.raises(ManifestError, match="the index must be a file, got no such file"):
        read_shards(tmp_path)


def forged(name, size, kind=tarfile.REGTYPE):
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = size, kind, "/etc/passwd"
    return info.tobuf(tarfile.USTAR_FORMAT)


def test_a_tar_that_tells_otherwise_than_the_index_is_not_opened(shards):
    folder, rows = shards
    sample, row = read_shards(folder)[0], rows[1]["video"]
    tar = bytearray(sample.video.path.read_bytes())
    for header in (
        forged(row["name"], row["size"], tarfile.SYMTYPE),
        forged(row["name"], row["size"], tarfile.LNKTYPE),
        forged(f"../{row['name']}", row["size"]),
        forged(f"/{row['name']}", row["size"]),
        forged(f"{KEYS[0]}.pkl", row["size"]),
        forged(row["name"], row["size"] - 1),
        bytes(512),
        b"\xff" * 512,
    ):
        tar[row["offset"] - 512 : row["offset"]] = header
        sample.video.path.write_bytes(tar)
        with pytest.raises(MediaError, match=rf"000000.tar/{KEYS[0]}: (the tar's member|the file) must"):
            open_media(sample)


def test_a_damaged_member_is_a_media_error_that_names_it(shards):
    folder, rows = shards
    for kind, sample in (("video", 0), ("audio", 1)):
        given, row = read_shards(folder)[sample], rows[1 + sample][kind]
        tar = bytearray((folder / "000000.tar").read_bytes())
        half = row["offset"] + row["size"] // 2
        tar[half : row["offset"] + row["size"]] = bytes(row["size"] - row["size"] // 2)
        (folder / "000000.tar").write_bytes(tar)
        with pytest.raises(MediaError, match=rf"000000.tar/{KEYS[sample]}: "):
            open_media(given).read_all(fps=10, sample_rate=48_000)
    assert open_media(read_shards(folder)[2]).read_all(fps=10, sample_rate=48_000).num_frames == 12


def test_what_is_no_video_or_over_a_limit_is_refused(shards):
    folder, rows = shards
    sample = read_shards(folder)[0]
    with pytest.raises(MediaError, match="at most 100 pixels"):
        open_media(sample, MediaLimits(max_pixels=100))
    with pytest.raises(MediaError, match=r"at most 1 s, got 1.2"):
        open_media(sample, MediaLimits(max_seconds=1.0))
    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n/etc/passwd\n#EXT-X-ENDLIST\n"
    with closing(ShardWriter(folder / "000000.tar")) as tar:
        rows[1]["video"] = tar.add(f"{KEYS[0]}.mp4", playlist) | {"frames": 12}
        rows[1]["audio"] = None
    write(folder, [HEADER | {"samples": 1}, rows[1]])
    with pytest.raises(MediaError, match="must be media that FFmpeg can decode"):
        open_media(read_shards(folder)[0])


def test_a_tar_is_plain_whole_and_the_same_every_time(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        with closing(ShardWriter(tmp_path / folder / "0.tar")) as tar:
            entries = [tar.add("x.json", b"{}"), tar.add("y.flac", b"z" * 1000)]
            assert not (tmp_path / folder / "0.tar").exists()
    content = (tmp_path / "a" / "0.tar").read_bytes()
    assert content == (tmp_path / "b" / "0.tar").read_bytes()
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        assert [(m.name, m.offset_data, m.size, m.mtime, m.uid) for m in tar] == [
            (e["name"], e["offset"], e["size"], 0, 0) for e in entries
        ]
