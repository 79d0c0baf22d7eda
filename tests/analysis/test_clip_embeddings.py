"""Features and t-SNE: what is averaged, where sound meets text, and the same picture for the same numbers."""

import pytest
import torch
from torch.nn import functional as F

from vatt_engine import Batch, create_model
from vatt_engine.analysis.activation import MeanActivation
from vatt_engine.analysis.embeddings import common_space, densities, token_means, tsne
from vatt_engine.tasks.visualize import every_token
from vatt_engine.testing import Sum, assert_same_sums, transformer_terms

AGNOSTIC = {
    "backbone": "agnostic",
    "shared": {"num_layers": 2, "dim": 128, "ff_dim": 256, "num_heads": 4, "head_dim": 32, "dropout": 0.0},
    "video.pre_projection": True,
    "audio.pre_projection": True,
    "text.position.dropout": 0.0,
}
# What vatt_tiny adds up in its stems, a patch and the mean over tokens, and on the way to the common space.
STEM = Sum(768 + 128 + 75)
WHOLE = Sum(768 + transformer_terms(layers=4, dim=128, ff_dim=256, tokens=73) + 3 * 128)
WORDS = torch.tensor([[5, 9, 3, 0, 0], [7, 0, 0, 0, 0]])


@pytest.fixture(params=[{}, AGNOSTIC], ids=["specific", "agnostic"])
def model(request):
    return create_model("vatt_tiny", **request.param).eval()


@torch.no_grad()
def test_token_means_are_those_of_the_stem_and_leave_padding_out(model):
    stems = model.backbone.stems if model.config.backbone == "agnostic" else {"audio": model.audio.stem}
    wave = torch.randn(2, 9600)
    assert_same_sums(token_means(model, "audio", wave), stems["audio"](wave)[:, 1:].mean(1), STEM)
    means = token_means(model, "text", WORDS)
    assert_same_sums(means[1], token_means(model, "text", WORDS[1:, :1])[0], STEM)
    assert not torch.allclose(means[0], token_means(model, "text", WORDS[:1, :2])[0])


@torch.no_grad()
def test_sound_goes_through_the_video_audio_space_to_the_text(model):
    """Where the picture's own way leads: an audio head that copies the video's gives the video's place."""
    batch = Batch(video=torch.randint(0, 256, (3, 8, 48, 48, 3), dtype=torch.uint8))
    pooled, outputs = model.encode_video(batch.video), model(batch)
    assert_same_sums(common_space(model, "video", pooled), F.normalize(outputs.video_text, dim=-1), WHOLE)
    model.heads.audio_video = torch.nn.Identity()
    found = common_space(model, "audio", outputs.video_audio)
    assert_same_sums(found, F.normalize(outputs.video_text, dim=-1), WHOLE)


def test_tsne_is_a_function_of_rows_and_seed_and_keeps_groups_apart():
    torch.manual_seed(1)
    first, second = torch.randn(30, 16) + 8 * torch.eye(16)[0], torch.randn(30, 12) - 8 * torch.eye(12)[1]
    points = tsne([first, second])
    assert torch.equal(points, tsne([first, second]))
    assert torch.equal(points, tsne([torch.cat([first, F.pad(second, (0, 4))])]))
    a, b = points[:30], points[30:]
    spread = max((x - x.mean(0)).norm(dim=1).median() for x in (a, b))
    assert (a.mean(0) - b.mean(0)).norm() > 2 * spread
    with pytest.raises(ValueError, match=r"tsne: features must hold at least 4 clips, got 3\."):
        tsne([torch.zeros(3, 2)])


def test_densities_have_area_one_and_lie_where_the_cosines_do():
    rows = densities(torch.tensor([1.0, 1.0, 0.5, -1.0]), torch.linspace(-1, 1, 1000))
    width = 2 / len(rows)
    assert sum(row["positive"] for row in rows) * width == pytest.approx(1, abs=1e-4)
    assert rows[-1]["positive"] * width == pytest.approx(0.5, abs=1e-4)
    assert rows[0]["positive"] * width == pytest.approx(0.25, abs=1e-4)
    assert {round(row["random"], 1) for row in rows} == {0.5}


@pytest.mark.parametrize("hook", ["mlp-input", "mlp-output"])
@torch.no_grad()
def test_activations_are_means_over_tokens_without_padding(model, hook):
    means = MeanActivation(hook)
    for row in WORDS[:, None]:
        with means.watch(model, "text", row):
            every_token(model, "text", row)
    transformer = model.backbone.transformer if model.config.backbone == "agnostic" else model.text.transformer
    layer, seen = transformer.layers[1], []
    handle = layer.ff_in.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    for ids in ([5, 9, 3], [7]):
        padded = torch.tensor([ids + [0] * (5 - len(ids))])
        every_token(model, "text", padded)
        seen[-1] = seen[-1][0, : 1 + len(ids)]
    handle.remove()
    rows = torch.cat(seen)
    if hook == "mlp-output":
        rows = layer.ff_out(F.gelu(layer.ff_in(rows)))
    torch.testing.assert_close(means.layers["text"][1], rows.double().mean(0), rtol=1e-4, atol=1e-5)
    before = means.layers["text"].clone()
    every_token(model, "text", WORDS)
    assert torch.equal(means.layers["text"], before), "nothing is watched any more"
