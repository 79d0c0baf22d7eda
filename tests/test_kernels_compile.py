"""Every row of the kernels' config tables, compiled for each architecture it is for: no spills, and memory suffices.

Needs no GPU. `pytest -s tests/test_kernels_compile.py` prints what ptxas gave each kernel. A kernel joins by one line
in LAUNCHES: a function that yields what its launcher may launch. Here the options of a row of a table take its
architectures in turn; `make soak` compiles each option for each. build/triton keeps what was compiled, by its sources.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from vatt_engine.kernels import (
    attention,
    attention_bwd,
    attention_tile,
    drop_token,
    nce,
    segment_sum,
    tokenize,
    tokenize_patches,
)

pytestmark = pytest.mark.slow

CACHE = Path(__file__).resolve().parents[1] / "build" / "triton"
ARCHS = (80, 90, 100)
# Bytes of shared memory a block may ask for (CUDA programming guide). The rows for 80 also serve 8.6, 8.9 and 12.0,
# which have least.
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_MEMORY_COLUMNS = 512
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}


class Launch(NamedTuple):
    """One kernel as its launcher calls it.

    In `args` "*bf16:16" is a pointer to bfloat16 that 16 divides, "i32" an integer; all else is known at compile time.
    """

    kernel: Any
    label: str
    args: dict[str, Any]
    row: Any = None  # of the table of tiles, which stands for all launches of the kernel that have it
    archs: tuple[int, ...] = ARCHS
    tensor_cores: bool = False
    small: bool = False  # tiles below the 64 rows that the instructions of 90 and 100 take: those of 80 are used


# A video of [T, 224, 224, 3] read in words, in bytes, in bytes of windows that are cropped and mirrored; a waveform.
VIDEO = {"P": 3072, "RUN": 48, "CHANNELS": 3, "PATCH_H": 16, "stride_t": "i32", "stride_y": "i32", "FLIP": False}
READS = {
    "words": VIDEO | {"video_ptr": "*u8:16", "ALIGN": 16},
    "bytes": VIDEO | {"video_ptr": "*u8:16", "ALIGN": 16},
    "windows": VIDEO | {"video_ptr": "*u8:16", "ALIGN": 1, "FLIP": True},
    "wave": VIDEO | {"video_ptr": "*fp32:16", "ALIGN": 4, "P": 128, "RUN": 128, "CHANNELS": 1, "PATCH_H": 1},
}
ROWS = {"num_rows": "i32", "dim": "i32:16", "rows_per_sample": "i32", "corner_ptr": "*i64:16"}
KEEP = {"keep_ptr": "*i64:16", "keep_stride_b": "i32:16", "keep_stride_k": 1}
ASSERTS = {"debug": True, "sanitize_overflow": False}
TAKEN = {"num_warps", "num_stages", *ASSERTS}  # of a launch, beside the kernel's own arguments


def integers(names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), "i32")


def tokenize_fwd() -> Iterator[Launch]:
    terms = {"bias_ptr": "*fp32:16", "pos_ptr": "*fp32:16", "agg_ptr": "*fp32:16", "out_ptr": "*fp32:16"}
    for tiles in tokenize.FWD_TILES:
        for read, half in (("words", "bf16"), ("bytes", "bf16"), ("windows", "fp16"), ("wave", "bf16")):
            word = 4 if read == "words" else 1
            if word in tiles.words:
                dtype = half if tiles.half else "fp32"
                args = READS[read] | ROWS | KEEP | terms | {"weight_ptr": f"*{dtype}:16", "WORD": word}
                label = f"{read} {dtype} {tiles.block_m}x{tiles.block_n}x{tiles.block_k}"
                yield Launch(
                    tokenize.tokenize_fwd_kernel,
                    label,
                    args | tiles.arguments(),
                    tiles,
                    tiles.archs,
                    tensor_cores=tiles.half,
                )


def tokenize_bwd() -> Iterator[Launch]:
    for tiles in tokenize.BWD_TILES:
        for read, half in (("bytes", "bf16"), ("windows", "fp16"), ("wave", "bf16")):
            dtype = half if tiles.half else "fp32"
            args = READS[read] | ROWS | {"grad_ptr": f"*{dtype}:16", "out_ptr": "*fp32:16", "AGG": True}
            args |= {"rows_per_split": "i32:16"} | tiles.arguments()
            label = f"{read} {dtype} {tiles.block_m}x{tiles.block_n}x{tiles.block_k}"
            yield Launch(tokenize.tokenize_bwd_kernel, label, args, tiles, tiles.archs, tensor_cores=tiles.half)


def patch_corner() -> Iterator[Launch]:
    args = integers("num_rows rows_per_sample stride_t stride_y height width size_h size_w grid_t grid_h grid_w")
    args |= KEEP | {"crop_ptr": "*i64:16", "flip_ptr": "*i1", "corner_ptr": "*i64:16"}
    args |= {"stride_b": "i64", "AGG": 1, "ALIGN": 1, "CHANNELS": 3, "PATCH_T": 4, "PATCH_H": 16, "PATCH_W": 16}
    args |= {"BLOCK": tokenize_patches.CORNER_BLOCK, "num_warps": 4} | ASSERTS
    yield Launch(tokenize_patches.patch_corner_kernel, "windows", args)


def drop_tokens() -> Iterator[Launch]:
    args = integers("num_tokens num_kept width x_stride_b x_stride_n keep_stride_b") | {"x_stride_d": 1}
    args |= {"x_ptr": "*bf16:16", "keep_ptr": "*i64:16", "out_ptr": "*bf16:16", "keep_stride_k": 1} | ASSERTS
    for tiles in drop_token.TILES:
        yield Launch(drop_token.drop_token_fwd_kernel, "bf16", args | tiles.arguments(), tiles)


def sample_keep() -> Iterator[Launch]:
    args = integers("num_tokens num_kept") | {"seed_ptr": "*i64:16", "sample_id_ptr": "*i64:16", "num_warps": 4}
    for tiles in drop_token.SORT_TILES:
        sort = args | {"keep_ptr": "*i64:16", "BLOCK_N": tiles.num_tokens, "num_warps": tiles.num_warps}
        yield Launch(drop_token.sample_keep_kernel, f"of {tiles.num_tokens}", sort, tiles)
    args = {name: value for name, value in args.items() if name != "num_kept"}
    args |= {"key_ptr": "*i64:16", "BLOCK_N": drop_token.KEY_BLOCK}
    yield Launch(drop_token.sample_keys_kernel, "any", args)


def segment_sums() -> Iterator[Launch]:
    args = integers("num_groups width row_stride_z start_stride_z x_rows_z repeat step")
    args |= {"x_ptr": "*bf16:16", "row_ptr": "*i64:16", "start_ptr": "*i64:16"}
    for tiles in segment_sum.TILES:
        for out, acc in (("bf16", tl.float32), ("fp32", tl.float32), ("fp64", tl.float64)):
            more = {"out_ptr": f"*{out}:16", "ACC": acc} | tiles.arguments()
            yield Launch(segment_sum.segment_sum_kernel, f"to {out}", args | more, tiles)


# Video at 50 % kept, the text tower, the packed modality-agnostic backbone, progressive DropToken.
ATTENTION = {
    "dense": {"TAIL": 32},
    "text": {"bias_ptr": "half", "mask_ptr": "*i1:16", "seed_ptr": "*i64:16", "TAIL": 32},
    "packed": {"tile_ptr": "*i32:16", "mask_ptr": "*i1:16", "seed_ptr": "*i64:16"},
    "keep": {"keep_ptr": "*i64:16", "seed_ptr": "*i64:16", "TAIL": 16} | ASSERTS,
}
ATTENTION_TABLES = {
    attention.attention_fwd_kernel: attention.FWD_TILES,
    attention_bwd.attention_dq_kernel: attention_bwd.DQ_TILES,
    attention_bwd.attention_dkv_kernel: attention_bwd.DKV_TILES,
    attention_bwd.attention_dbias_kernel: attention_bwd.DBIAS_TILES,
}


def attention_passes() -> Iterator[Launch]:
    pointers = dict.fromkeys(["bias_ptr", "mask_ptr", "tile_ptr", "seed_ptr", "keep_ptr"])
    statistics = dict.fromkeys(["lse_ptr", "delta_ptr", "dbias_ptr"], "*fp32:16") | {
        "scale": "fp32",
        "inverse_keep": "fp32",
    }
    strides = {f"stride_{axis}": "i32:16" for axis in "bhn"} | integers("keep_stride_b bias_stride_b")
    sizes = integers("num_heads num_tiles num_rows num_tokens mask_first threshold batch samples") | {"D": 64}
    for kernel, table in ATTENTION_TABLES.items():
        loops_over_queries = kernel is attention_bwd.attention_dkv_kernel
        for tiles in table:
            half = "bf16" if tiles.half else "fp32"
            rows = dict.fromkeys(["q_ptr", "k_ptr", "v_ptr", "out_ptr", "dout_ptr", "dqkv_ptr"], f"*{half}:16")
            whole = {"TAIL": tiles.block_m if loops_over_queries else tiles.block_n}
            for name, options in ATTENTION.items():
                if (name == "text" and not tiles.bias) or (name != "text" and "dbias" in kernel.__name__):
                    continue
                args = rows | pointers | statistics | strides | sizes | whole | options | tiles.arguments()
                args = {
                    k: f"*{half}:16" if v == "half" else v
                    for k, v in args.items()
                    if k in TAKEN | set(kernel.arg_names)
                }
                label = f"{name} {half} {tiles.block_m}x{tiles.block_n}"
                yield Launch(
                    kernel,
                    label,
                    args,
                    tiles,
                    tiles.archs,
                    tensor_cores=tiles.half,
                    small=tiles.block_m < 64 > tiles.block_n,
                )


def nce_tiles() -> Iterator[Launch]:
    args = integers("num_rows num_columns first_sample") | {"a_ptr": "", "b_ptr": "", "mask_ptr": "*u8:16"}
    args |= dict.fromkeys(("row_scale_ptr", "column_scale_ptr", "positive_ptr"), "*fp32:16")
    parts = dict.fromkeys(("row_part_ptr", "column_part_ptr"), "*fp32:16")
    sums = dict.fromkeys(("row_ptr", "column_ptr", "d_row_ptr", "d_column_ptr", "d_positive_ptr"), "*fp32:16")
    for tiles in nce.TILES:
        dtype = "bf16" if tiles.half else "fp32"
        args |= {"a_ptr": f"*{dtype}:16", "b_ptr": f"*{dtype}:16", "D": 512} | tiles.arguments()
        for offset, candidates in (("fp32", 1), (None, 5))[0 if tiles.min_rows else 1 :]:
            args |= {"offset": offset, "P": candidates}
            label = f"{dtype} {'' if offset else 'no '}offset {tiles.block_m}x{tiles.block_n}x{tiles.block_k}"
            yield Launch(nce.nce_stats_kernel, label, args | parts, tiles, tiles.archs, tensor_cores=tiles.half)
            gradient = args | sums | {"g_ptr": f"*{dtype}:16"}
            yield Launch(nce.nce_grad_kernel, label, gradient, tiles, tiles.archs, tensor_cores=tiles.half)


LAUNCHES = [
    *attention_passes(),
    *tokenize_fwd(),
    *tokenize_bwd(),
    *patch_corner(),
    *drop_tokens(),
    *sample_keep(),
    *segment_sums(),
    *nce_tiles(),
]


def compiled(launch: Launch, arch: int) -> Any:
    args = dict(launch.args)
    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(launch.kernel.arg_names):
        value = args.pop(name)
        if isinstance(value, str):
            signature[name], _, divisor = value.partition(":")
            if divisor:
                attributes[(i,)] = [["tt.divisibility", int(divisor)]]
        else:
            signature[name], constants[(i,)] = "constexpr", value
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=args)


def in_turn(launches: Iterable[Launch]) -> set[tuple[str, str, int]]:
    """Names of launches and architectures: every option and every architecture of each row, and few pairs of them."""
    rows: dict[Any, list[Launch]] = {}
    for launch in launches:
        rows.setdefault((launch.kernel, launch.row), []).append(launch)
    drawn = set()
    for number, options in enumerate(rows.values()):
        archs = options[0].archs
        for i in range(max(len(options), len(archs))):
            launch = options[i % len(options)]
            drawn.add((launch.kernel.__name__, launch.label, archs[(i + number) % len(archs)]))
    return drawn


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch):
    """Triton finds what it has compiled by a hash of the kernel, all that it calls, its arguments and options."""
    monkeypatch.setattr(triton.knobs.cache, "dir", str(CACHE))


@pytest.fixture(scope="module")
def report():
    line = "{:<24} {:<28} {:>4} {:>5} {:>7} {:>7} {:>6}".format
    rows = [line("kernel", "launch", "arch", "REG", "SHARED", "STACK", "LOCAL")]
    yield lambda *row: rows.append(line(*row))
    print("\n" + "\n".join(rows))


def every_launch() -> Iterator[Any]:
    """What pytest runs: each launch for each of its architectures, those that are not drawn in `make soak` alone."""
    drawn = in_turn(LAUNCHES)
    for launch in LAUNCHES:
        for arch in launch.archs:
            name = launch.kernel.__name__, launch.label, arch
            yield pytest.param(
                launch, arch, id="-".join(map(str, name)), marks=[] if name in drawn else pytest.mark.soak
            )


def test_the_draw_leaves_nothing_out():
    """Every row with every architecture and with every option."""
    drawn = in_turn(LAUNCHES)
    for launch in LAUNCHES:
        name, row = (
            launch.kernel.__name__,
            [x.label for x in LAUNCHES if (x.kernel, x.row) == (launch.kernel, launch.row)],
        )
        assert [arch for arch in launch.archs if not any((name, label, arch) in drawn for label in row)] == []
        assert any((name, launch.label, arch) in drawn for arch in launch.archs)
    assert len(drawn) < 0.7 * sum(len(launch.archs) for launch in LAUNCHES)


@pytest.mark.parametrize(("launch", "arch"), every_launch())
def test_compiles_without_spills(launch, arch, report, tmp_path):
    kernel = compiled(launch, arch)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(cubin)]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    shared = kernel.metadata.shared
    report(launch.kernel.__name__, launch.label, arch, used["REG"], shared, used["STACK"], used["LOCAL"])

    assert used["STACK"] == used["LOCAL"] == 0, f"{used} spills"
    assert shared <= SHARED_LIMIT[arch]
    assert kernel.metadata.tmem_size <= TENSOR_MEMORY_COLUMNS  # beyond it the kernel is but a trap
    assert ("__assertfail" in kernel.asm["ptx"]) == launch.args.get("debug", False)
    products = [name for name in TENSOR_CORES.values() if name in kernel.asm["ptx"]]
    assert products == ([TENSOR_CORES[80 if launch.small else arch]] if launch.tensor_cores else [])


@pytest.mark.parametrize("integer", [1, "i64"])
@pytest.mark.parametrize(
    "launch", {launch.kernel: launch for launch in LAUNCHES}.values(), ids=lambda launch: launch.kernel.__name__
)
def test_any_integer_compiles(launch, integer):
    """Triton compiles a kernel anew where an integer is 1 (then a constant) or needs 64 bits."""
    args = {name: integer if str(value).startswith("i32") else value for name, value in launch.args.items()}
    assert compiled(launch._replace(args=args), 90).asm["cubin"]


class NoGPU:
    """A driver that names an architecture: launches go as far as the compiled kernel."""

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return -1  # Triton keeps compiled kernels by device: none that has a GPU gets these

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that launchers compile on CPU tensors; none runs."""
    names = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        names.append(self.fn.__name__)
        assert all(extent > 0 for extent in grid)
        assert run(self, *args, grid=grid, warmup=True, **kwargs).asm["cubin"]

    monkeypatch.setattr(triton.runtime.driver, "_active", NoGPU())
    monkeypatch.setattr(JITFunction, "run", compile_only)
    for module in (tokenize, nce, attention_tile):
        monkeypatch.setattr(module, "arch_of", lambda device: 90)
    return names


def test_launchers_call_what_compiles(launched):
    """The arguments that the launchers really pass: their names, types, options, and what may be None."""
    video = torch.zeros(2, 8, 32, 32, 3, dtype=torch.uint8)
    weight, keep = torch.zeros(48, 3072), torch.zeros(2, 5, dtype=torch.int64)
    size, patch = [32, 32], [4, 16, 16]
    row, pos = torch.zeros(48), torch.zeros(8, 48)
    crop, flip = torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, dtype=torch.bool)
    out = tokenize.tokenize_fwd(video, weight, row, pos, row, keep, None, None, size, patch, torch.bfloat16)
    tokenize.tokenize_fwd(video, weight, None, None, None, None, crop, flip, size, patch, torch.float32)
    needs = [True] * 4
    rest = (video, keep, None, None, size, patch, True, torch.bfloat16, torch.float32, needs)
    tokenize.tokenize_bwd(out, *rest)
    drop_token.drop_token_bwd(drop_token.drop_token_fwd(pos[None], keep[0]), keep[0], 8)
    for tokens in (8, 10_000):
        drop_token.sample_keep(torch.tensor(1), keep[:, 0], tokens, 4)
    attend()
    a, b, vector, scale = (
        torch.zeros(8, 16).bfloat16(),
        torch.zeros(9, 2, 16).bfloat16(),
        torch.ones(9),
        torch.ones(9, 2),
    )
    for mask, offset in ((None, 1.0), (torch.ones(9, dtype=torch.uint8), None)):
        block = (a, b, vector[:8], scale, mask, 1, offset)
        nce.stats_strip(*block, torch.ones(1, 8), torch.ones(1, 18), torch.ones(8, 2))
        vectors = (vector[:8], vector, vector[:8])
        nce.gradient_tile(*block, *vectors, *vectors, torch.ones(8, 18).bfloat16())
    assert {launch.kernel.__name__ for launch in LAUNCHES} == set(launched)


def attend():
    """A tower of video, the text tower with dropout, packed sequences, and rows through an index."""
    q = torch.zeros(2, 2, 785, 64, dtype=torch.bfloat16)
    bias, mask, seed = torch.zeros(2, 17, 17), torch.ones(2, 17, dtype=torch.bool), torch.tensor(1)
    words, keep = q[:, :, :17].float(), torch.arange(2 * 600).view(2, 600) % 601
    for x, *options in (
        (q, None, None, None, None, None, 0.0),
        (words, None, bias, mask, seed, None, 0.1),
        (q[:1], None, None, mask[:1], seed, [0, 700, 768, 785], 0.1),
        (q, keep, None, None, None, None, 0.0),
    ):
        y, lse = attention.attention_fwd(x, x, x, *options, 0.125)
        attention_bwd.attention_bwd(y, x, x, x, y, lse, *options, 0.125, options[1] is not None)
