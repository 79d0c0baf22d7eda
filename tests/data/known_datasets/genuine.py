"""Small annotation files in the formats in which the datasets are distributed, and the media that belong to them.

The folder is not called `datasets`: pytest puts its parent on sys.path, where transformers would take it for a package.
"""

HOWTO_CSV = """video_id,category_1,category_2,rank,task_id
nVbIUDjzWY4,Cars & Other Vehicles,Motorcycles,27,52907
CTPAZ2euJ2Q,"Home and Garden",Tools,35,109057
-_97kyZVWV0,Hobbies and Crafts,Crafts,34,119814
gkjnR3-ZVts,Food and Entertaining,Drinks,6,25938
"""
HOWTO_JSON = """{"gkjnR3-ZVts": {"text": ["pour water", "stir \\u00e9"], "start": [1.5, 4], "end": [4.25, 6.0]},
 "notListed00": {"text": ["x"], "start": [0], "end": [1]},
 "nVbIUDjzWY4": {"text": ["one", "two", "three"], "start": [0.0, 9.0, NaN], "end": [2.0, 3.0, 5.0]},
 "CTPAZ2euJ2Q": {"text": [], "start": [], "end": []}}
"""
AUDIOSET_LABELS = """index,mid,display_name
0,/m/09x0r,"Speech"
1,/m/05zppz,"Male speech, man speaking"
2,/t/dd00003,"Clatter"
"""
AUDIOSET_BALANCED = """# Segments csv created Sun Mar  5 10:54:31 2017
# num_ytids=4, num_segs=4, num_unique_labels=3, num_positive_labels=6
# YTID, start_seconds, end_seconds, positive_labels
--PJHxphWEs, 30.000, 40.000, "/m/09x0r,/t/dd00003"
--ZhevVpy1s, 50.000, 60.000, "/m/05zppz"
--aE2O5G5WE, 0.000, 10.000, "/t/dd00003,/m/05zppz,/m/09x0r"
-0RWZT-miFs, 420.000, 430.000, "/m/09x0r"
"""
AUDIOSET_EVAL = AUDIOSET_BALANCED.splitlines(keepends=True)
AUDIOSET_EVAL = "".join([*AUDIOSET_EVAL[:3], '-5EVALclip0, 7.000, 15.500, "/m/09x0r"\n'])
KINETICS_TRAIN = """label,youtube_id,time_start,time_end,split,is_cc
abseiling,-3B32lodo2M,59,69,train,0
"massaging person's head",_dbcJuKJQNs,40,50,train,0
"petting animal (not cat)",--nQbRBEz2s,104,114,train,1
abseiling,-3B32lodo2M,59,69,train,0
"""
KINETICS_VAL = """label,youtube_id,time_start,time_end,split,is_cc
"air drumming",_P_1FroaCdc,0,10,val,0
abseiling,lqciwm6gDrk,659,669,validate,0
"""
KINETICS_TEST = "youtube_id,time_start,time_end,split\n--6bJUbfpnQ,17,27,test\n"
MOMENTS_CATEGORIES = "clapping,0\nadult+female+singing,1\nblocking,2\n"
MOMENTS_TRAIN = (
    "blocking/getty-karate-video-id635808620_4.mp4,blocking,3,0\n"
    "clapping/yt-5of6ffo6-Bw_205.mp4,clapping,4,1\n"
    "adult+female+singing/yt-5of6ffo6-Bw_205.mp4,adult+female+singing,2,0\n"
)
UCF_CLASSES = "1 ApplyEyeMakeup\r\n2 HandstandPushups\r\n3 YoYo\r\n"
UCF_CLIPS = [
    f"{name}/v_{name.replace('Hands', 'HandS')}_g0{group}_c01.avi"
    for name in ("ApplyEyeMakeup", "HandstandPushups", "YoYo")
    for group in (1, 2, 3)
]
HMDB_CLIPS = {
    "brush_hair": [
        "April_09_brush_hair_u_nm_np1_ba_goo_0.avi",
        "Haare_k#mmen!_brush_hair_h_nm_np1_le_goo_1.avi",
        "prelinger_brush_hair_f_cm_np1_ri_med_2.avi",
    ],
    "fencing": [
        "(Rad)Schlag_die_Bank!_fencing_f_cm_np1_le_med_0.avi",
        "A&B;_fencing_u_cm_np2_ri_goo_2.avi",
        "Fechten_f\u00fcr_alle_fencing_f_nm_np2_ri_med_0.avi",
    ],
    "cartwheel": [
        "turnen_[a]_cartwheel_f_cm_np1_ri_bad_0.avi",
        "Rad_+_Handstand_cartwheel_f_cm_np1_ri_bad_1.avi",
        "unused_cartwheel_f_cm_np1_ri_bad_1.avi",
    ],
}
ESC_CSV = "filename,fold,target,category,esc10,src_file,take\n" + "".join(
    f"{fold}-1000{fold}{n}-A-{target}.wav,{fold},{target},{category},False,1000{fold}{n},A\n"
    for fold in range(1, 6)
    for n, (target, category) in enumerate([(0, "dog"), (2, "door_wood_knock"), (1, "rooster"), (0, "dog")])
)
YOUCOOK = """{"database": {
  "GLd3aX16zBg": {"duration": 241.62, "subset": "training", "recipe_type": "113", "video_url": "https://x",
    "annotations": [{"segment": [90, 102], "id": 0, "sentence": "spread margarine on two slices of white bread"},
                    {"segment": [114, 127.5], "id": 1, "sentence": "place a slice of cheese on the bread"}]},
  "9GX8f5EwwE4": {"duration": 241.64, "subset": "validation", "recipe_type": "212", "video_url": "https://y",
    "annotations": [{"segment": [25, 37], "id": 0, "sentence": "cut the onion in half and dice"}]},
  "0O4bxhpFX9o": {"duration": 311.77, "subset": "validation", "recipe_type": "101", "video_url": "https://z",
    "annotations": [{"segment": [41, 54], "id": 0, "sentence": "pick the ends off the verdalago"}]}}}
"""
MSRVTT_JSON = """{"info": {"year": "2016"}, "videos": [
 {"category": 9, "url": "https://x", "video_id": "video0", "start time": 137.72, "end time": 149.44,
  "split": "train", "id": 0},
 {"category": 1, "url": "https://x", "video_id": "video6513", "start time": 0, "end time": 10,
  "split": "validate", "id": 1},
 {"category": 1, "url": "https://x", "video_id": "video7020", "start time": 5.5, "end time": 20.25,
  "split": "test", "id": 2}],
 "sentences": [
 {"caption": "a woman creating a fondant baby", "video_id": "video7020", "sen_id": 0},
 {"caption": "a car is shown", "video_id": "video0", "sen_id": 1},
 {"caption": "someone makes a flower", "video_id": "video7020", "sen_id": 2},
 {"caption": "a red car", "video_id": "video0", "sen_id": 3}]}
"""
MSRVTT_TEST = """key,vid_key,video_id,sentence
ret0,msr7020,video7020,"a woman, creating a flower"
"""
MSRVTT_TEST_SEMICOLON = "key;vid_key;video_id;sentence\nret0;msr7020;video7020;a woman, creating a flower\n"


def hmdb_lists():
    """Three splits in which each clip trains once or twice, tests once and is unused where it is called so."""
    lists = {}
    for name, clips in HMDB_CLIPS.items():
        for split in (1, 2, 3):
            uses = [
                0 if clip.startswith("unused") else 2 if (i + split) % 3 == 1 else 1 for i, clip in enumerate(clips)
            ]
            lines = (f"{clip} {use} \n" for clip, use in zip(clips, uses))
            lists[f"{name}_test_split{split}.txt"] = "".join(lines)
    return lists


def ucf_lists():
    """Split N tests group N and trains on the others."""
    lists = {"classInd.txt": UCF_CLASSES}
    for split in (1, 2, 3):
        rows = [(clip, 1 + i // 3) for i, clip in enumerate(UCF_CLIPS)]
        test = [clip for clip, _ in rows if f"_g0{split}_" in clip]
        lists[f"testlist0{split}.txt"] = "".join(f"{clip}\r\n" for clip in test)
        lists[f"trainlist0{split}.txt"] = "".join(f"{clip} {n}\r\n" for clip, n in rows if clip not in test)
    return lists


KINETICS = {"train.csv": KINETICS_TRAIN, "val.csv": KINETICS_VAL, "test.csv": KINETICS_TEST}
FILES = {  # dataset -> its annotation files
    "howto100m": {"HowTo100M_v1.csv": HOWTO_CSV, "caption.json": HOWTO_JSON},
    "audioset": {
        "class_labels_indices.csv": AUDIOSET_LABELS,
        "balanced_train_segments.csv": AUDIOSET_BALANCED,
        "unbalanced_train_segments.csv": AUDIOSET_BALANCED,
        "eval_segments.csv": AUDIOSET_EVAL,
    },
    "kinetics400": KINETICS,
    "moments": {
        "moments_categories.txt": MOMENTS_CATEGORIES,
        "trainingSet.csv": MOMENTS_TRAIN,
        "validationSet.csv": "clapping/yt-5of6ffo6-Bw_205.mp4,clapping,5,0\n",
    },
    "ucf101": ucf_lists(),
    "hmdb51": hmdb_lists(),
    "esc50": {"esc50.csv": ESC_CSV},
    "youcook2": {"youcookii_annotations_trainval.json": YOUCOOK},
    "msrvtt": {
        "MSRVTT_data.json": MSRVTT_JSON,
        "MSRVTT_JSFUSION_test.csv": MSRVTT_TEST,
        "MSRVTT_train.9k.csv": "video_id\nvideo0\n",
        "MSRVTT_train.7k.csv": "video_id\nvideo0\n",
    },
}
MEDIA = {  # dataset -> files on disk
    "howto100m": ["nVbIUDjzWY4.mp4", "a/-_97kyZVWV0.webm", "gkjnR3-ZVts.mp4.webm", "gkjnR3-ZVts.jpg"],
    "audioset": [
        "--PJHxphWEs_30000.flac",
        "x/Y--ZhevVpy1s.wav",
        "--aE2O5G5WE.m4a",
        "--aE2O5G5WE.mp4",
        "-5EVALclip0.wav",
    ],
    "kinetics400": [
        "train/abseiling/-3B32lodo2M_000059_000069.mp4",
        "train/petting_animal_(not_cat)/--nQbRBEz2s.mp4",
        "val/air drumming/_P_1FroaCdc_000000_000010.mkv",
        "val/abseiling/lqciwm6gDrk_659_669.mp4",
        "test/--6bJUbfpnQ_000017_000027.mp4",
    ],
    "moments": [
        "training/clapping/yt-5of6ffo6-Bw_205.mp4",
        "validation/clapping/yt-5of6ffo6-Bw_205.mp4",
        "training/blocking/getty-karate-video-id635808620_4.mp4",
    ],
    "ucf101": UCF_CLIPS[:-1],
    "hmdb51": [f"{name}/{clip}" for name, clips in HMDB_CLIPS.items() for clip in clips],
    "esc50": [row.partition(",")[0] for row in ESC_CSV.splitlines()[1:]],
    "youcook2": ["training/113/GLd3aX16zBg.mp4", "validation/212/9GX8f5EwwE4.mkv"],
    "msrvtt": ["TrainValVideo/video0.mp4", "video6513.mp4", "TestVideo/video7020.mp4"],
    "imagenet": [
        "ILSVRC/train/n01440764/n01440764_10026.JPEG",
        "ILSVRC/train/n01443537/n01443537_2.JPEG",
        "ILSVRC/val/n01443537/ILSVRC2012_val_00000293.JPEG",
    ],
}


def lay_out(folder, name, files=None):
    """The annotation files and the empty media of a dataset under a folder; returns both folders."""
    annotations, media = folder / "annotations", folder / "media"
    annotations.mkdir(parents=True)
    media.mkdir()
    for file, content in (files or FILES.get(name, {})).items():
        (annotations / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    for file in MEDIA[name]:
        path = media / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return annotations, media
