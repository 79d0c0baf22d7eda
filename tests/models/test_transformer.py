"""The transformer: progressive DropToken, and a block that torch.compile takes whole."""

from __future__ import annotations

import pytest
import torch

from vatt_engine import create_model, ops
from vatt_engine.models.config import TextConfig, TransformerConfig
from vatt_engine.models.transformer import Block, SelfAttention, Transformer
from vatt_engine.testing import (
    Sum,
    assert_same_sums,
    assert_within_budget,
    gradients,
    randn,
    sum_budget,
    transformer_terms,
)

RATES = (1.0, 0.5, 1.0, 0.3)
FORWARD = Sum(transformer_terms(layers=4, dim=48, ff_dim=96, tokens=22))
BOTH_PASSES = Sum(2 * FORWARD.terms + 3 * 22)  # and the sum over rows of a parameter's gradient


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
    assert_same_sums(y[0], y[2], FORWARD)  # rows of one product need not be added up alike either
    assert_same_sums(y[1:2], alone, FORWARD)


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
    assert_same_sums(y, gathered, FORWARD)
    assert_same_sums(*(gradients(out, [x])[0] for out in (y, gathered)), BOTH_PASSES)


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


@pytest.mark.parametrize("form", ["plain", "text", "dropping"])
def test_agg_alone_is_row_0(form):
    """Output and all gradients are the whole last layer's; the bias of k, which softmax does not see, has none."""
    module, x = transformer(keep_rates=RATES if form == "dropping" else ()), randn(3, 9, 48, dtype=torch.float64)
    x.requires_grad_()
    rest = {}
    if form == "text":
        biases = [randn(3, 9, 9, seed=n, dtype=torch.float64).requires_grad_() for n in range(4)]
        rest = {"biases": biases, "key_mask": torch.arange(9).expand(3, 9) < torch.tensor([[9], [4], [1]])}
    leaves = [x, *rest.get("biases", ()), *module.parameters()]

    def run(agg_only):
        if form == "dropping":
            y = module.forward_dropping(x, seed=3, sample_id=None, agg_only=agg_only)
        else:
            y = module(x, agg_only=agg_only, **rest)
        return [y[:, :1], *gradients(y[:, :1], leaves)]

    alone, whole = run(True), run(False)
    assert alone[0].shape == (3, 1, 48)
    names = ["y", "x", *["bias"] * len(rest.get("biases", ())), *(name for name, _ in module.named_parameters())]
    largest = max(want.abs().max().item() for want in whole)
    for name, got, want in zip(names, alone, whole):
        assert_same_sums(got, want, BOTH_PASSES._replace(size=largest), name=name)
    assert not alone[names.index("layers.3.attention.qkv.bias")][48:96].any()


def test_agg_alone_in_half_precision():
    """As close to float64 as the whole layer is, whose k and v are rounded to bfloat16 where here x and W q are."""
    module, x = transformer(keep_rates=()).float(), randn(4, 65, 48)
    exact = transformer(keep_rates=())(x.double())[:, :1]
    with torch.autocast("cpu", torch.bfloat16):
        assert_within_budget(module(x, agg_only=True), module(x)[:, :1], exact, FORWARD)


def test_probabilities_of_agg_are_dropped():
    """v is the identity: y holds each p that was kept, over 1 - 0.4, and the bias of v times their sum."""
    attention = (
        SelfAttention(TransformerConfig(dim=64, ff_dim=8, num_heads=1, head_dim=64, dropout=0.4)).double().train()
    )
    with torch.no_grad():
        attention.qkv.weight.zero_()
        attention.qkv.weight[128:].copy_(torch.eye(64))
        attention.qkv.bias[128:].fill_(1.0)
        attention.out.weight.copy_(torch.eye(64))
    y = attention(torch.eye(64, dtype=torch.float64)[None], agg_only=True)[0, 0]
    kept = y - y.sum() / 65  # y_j = p_j + sum of all p
    count = int((kept > 0.01).sum())
    torch.testing.assert_close(kept.sort().values[-count:], torch.full((count,), 1 / 64 / 0.6, dtype=torch.float64))
    assert kept.sort().values[:-count].abs().max() < sum_budget(Sum(3 * 64), dtype=torch.float64)
    assert 20 < count < 57  # of 64, 38.4 are expected, five deviations of 3.9


def test_layers_that_are_compiled_give_the_same():
    module, x = transformer(keep_rates=(), num_layers=3).float(), randn(2, 9, 48).requires_grad_()
    whole, alone = (gradients(module(x, agg_only=agg_only), [x])[0] for agg_only in (False, True))
    module.compile_layers()
    for want, agg_only in ((whole, False), (alone, True)):
        assert_same_sums(gradients(module(x, agg_only=agg_only), [x])[0], want, BOTH_PASSES)


@pytest.mark.parametrize("masked", [False, True])
def test_a_block_compiles_whole(masked):
    """fullgraph: forward and backward, with dropout, bias and mask; without dropout the numbers are eager's."""
    block = transformer(dropout=0.0).float().layers[0]
    x, rest = randn(2, 9, 48).requires_grad_(), ()
    if masked:
        rest = (randn(3, 9, 9, seed=1), torch.arange(9).expand(2, 9) < 7)
    compiled = torch.compile(block, fullgraph=True)
    y, want = compiled(x, *rest), block(x, *rest)
    assert_same_sums(y, want, FORWARD)
    assert_same_sums(*(gradients(out, [x])[0] for out in (y, want)), BOTH_PASSES)
    dropping = Block(TransformerConfig(dim=48, ff_dim=96, num_heads=3, head_dim=16, dropout=0.5))
    y = torch.compile(dropping, fullgraph=True, backend="aot_eager")(x, *rest)
    assert y.isfinite().all()
    assert not torch.equal(y, dropping(x, *rest))
