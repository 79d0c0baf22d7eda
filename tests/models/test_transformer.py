"""The transformer: progressive DropToken, and a block that torch.compile takes whole."""

from __future__ import annotations

import pytest
import torch

from vatt_engine import create_model, ops
from vatt_engine.models.config import TextConfig, TransformerConfig
from vatt_engine.models.transformer import Block, Transformer
from vatt_engine.testing import gradients, randn

RATES = (1.0, 0.5, 1.0, 0.3)


def transformer(**changes):
    torch.manual_seed(0)
    config = {"num_layers": 4, "dim": 48, "ff_dim": 96, "num_heads": 3, "head_dim": 16, "dropout": 0.0}
    return Transformer(TransformerConfig(**config | {"keep_rates": RATES} | changes)).double().train()


def layer_inputs(module, x, **drop):
    """What every layer saw, and the output."""
    seen = []
    hooks = [layer.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for layer in module.layers]
    y = module.forward_dropping(x, **{"seed": 3, "sample_id": None} | drop)
    for hook in hooks:
        hook.remove()
    return seen, y


def test_tokens_of_each_layer():
    """AGG and int(rate * others): 21 others, then 10, then 3; AGG stays first, in order with nobody else."""
    module = transformer()
    x = torch.arange(22.0, dtype=torch.float64)[None, :, None].expand(2, 22, 48)
    for layer in module.layers:  # blocks that pass their tokens on, so that a token is its number
        layer.attention.out.weight.data.zero_()
        layer.ff_out.weight.data.zero_()
    seen, _ = layer_inputs(module, x)
    numbers = [tokens[0, :, 0].long().tolist() for tokens in seen]
    assert [len(n) for n in numbers] == [22, 11, 11, 4]
    assert all(n[0] == 0 and len(set(n)) == len(n) for n in numbers)
    assert set(numbers[3]) < set(numbers[1])
    again, _ = layer_inputs(module, x)
    other, _ = layer_inputs(module, x, seed=4)
    assert torch.equal(again[3], seen[3])
    assert not torch.equal(other[1], seen[1])


def test_each_sample_by_its_id():
    module = transformer()
    x = randn(3, 22, 48, dtype=torch.float64)
    ids = torch.tensor([5, 9, 5])
    _, y = layer_inputs(module, x[[0, 1, 0]], sample_id=ids)
    _, alone = layer_inputs(module, x[1:2], sample_id=ids[1:2])
    assert torch.equal(y[0], y[2])
    torch.testing.assert_close(y[1:2], alone)


def test_layers_draw_from_streams_of_their_own():
    module = transformer(keep_rates=(1.0, 0.5, 0.5, 1.0))
    for layer in module.layers:
        layer.attention.out.weight.data.zero_()
        layer.ff_out.weight.data.zero_()
    x = torch.arange(41.0, dtype=torch.float64)[None, :, None].expand(1, 41, 48)
    seen, _ = layer_inputs(module, x)
    first, second = (tokens[0, :, 0].long() for tokens in seen[1:3])
    kept = [first[1:].tolist().index(n) for n in second[1:].tolist()]  # places among the 20 that came in
    assert kept != (ops.sample_keep(20, 10, seed=3 + (2 << 48))).tolist()[::-1]
    assert kept == ops.sample_keep(20, 10, seed=3 + (3 << 48)).tolist()


def test_all_tokens_in_evaluation_and_without_rates():
    x = randn(2, 9, 48, dtype=torch.float64)
    for module in (transformer().eval(), transformer(keep_rates=())):
        assert torch.equal(module.forward_dropping(x, seed=1, sample_id=None), module(x))


def test_gathered_first_is_attention_through_the_index():
    """A block on tokens gathered before it, and the same on all tokens by ops.attention(keep=...)."""
    module = transformer()
    block, x = module.layers[0], randn(2, 22, 48, dtype=torch.float64).requires_grad_()
    keep = torch.tensor([[0, 4, 21, 7, 8], [0, 20, 1, 3, 2]])
    qkv = block.attention.qkv(block.attention_norm(x)).view(2, 22, 3, 3, 16)
    attended = ops.attention(qkv, keep=keep).transpose(1, 2).flatten(2)
    y = ops.drop_token(x, keep) + block.attention.out(attended)
    y = y + block.ff_out(torch.nn.functional.gelu(block.ff_in(block.ff_norm(y))))
    gathered = block(ops.drop_token(x, keep))
    torch.testing.assert_close(y, gathered, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(*(gradients(out, [x])[0] for out in (y, gathered)), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("tower", ["video", "audio", "shared"])
def test_models_take_it(tower):
    """Fewer tokens of that tower come out in training; text keeps all its words."""
    name = "vatt_ma_base" if tower == "shared" else "vatt_bbs"
    small = {"num_layers": 2, "keep_rates": (1.0, 0.5)}
    model = create_model(
        name,
        video={"num_frames": 8, "frame_size": (64, 64)} | ({"transformer": small} if tower == "video" else {}),
        audio={"num_samples": 2560} | ({"transformer": small} if tower == "audio" else {}),
        text={"vocabulary_size": 50},
        **({"shared": small} if tower == "shared" else {}),
    ).train()
    given = {"video": torch.zeros(2, 8, 64, 64, 3, dtype=torch.uint8), "audio": torch.zeros(2, 2560)}
    for modality in ("video", "audio"):
        encoder = getattr(model, modality, None) or (lambda x, m=modality, **drop: model.backbone(m, x, **drop))
        kept = {"video": 16, "audio": 10}[modality]  # DropToken's half of 32 and 20
        tokens = encoder(given[modality], seed=1)
        assert tokens.shape[1] == 1 + (kept // 2 if tower in (modality, "shared") else kept)
    if tower == "shared":
        assert model.backbone("text", torch.ones(2, 16, dtype=torch.int64)).shape[1] == 17


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: TransformerConfig(keep_rates=(0.5,)),
            r"keep_rates must be \(\) or 12 numbers in \(0, 1\], one per layer, got \(0.5",
        ),
        (
            lambda: TransformerConfig(num_layers=1, keep_rates=(0.0,)),
            r"keep_rates must be \(\) or 1 numbers in \(0, 1\]",
        ),
        (
            lambda: TextConfig(transformer=TransformerConfig(num_layers=1, keep_rates=(0.5,))),
            "text.transformer.keep_rates",
        ),
    ],
)
def test_bad_rates(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("masked", [False, True])
def test_a_block_compiles_whole(masked):
    """fullgraph: forward and backward, with dropout, bias and mask; without dropout the numbers are eager's."""
    block = transformer(dropout=0.0).float().layers[0]
    x, rest = randn(2, 9, 48).requires_grad_(), ()
    if masked:
        rest = (randn(3, 9, 9, seed=1), torch.arange(9).expand(2, 9) < 7)
    compiled = torch.compile(block, fullgraph=True)
    y, want = compiled(x, *rest), block(x, *rest)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(gradients(y, [x]), gradients(want, [x]))
    dropping = Block(TransformerConfig(dim=48, ff_dim=96, num_heads=3, head_dim=16, dropout=0.5))
    y = torch.compile(dropping, fullgraph=True, backend="aot_eager")(x, *rest)
    assert y.isfinite().all()
    assert not torch.equal(y, dropping(x, *rest))
