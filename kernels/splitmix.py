"""The hash behind every random choice of ours: splitmix64's finaliser (Steele, Lea and Flood 2014) of a counter."""

import triton
import triton.language as tl

GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
MIX_2 = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def splitmix64(x):
    """A bijection of 64-bit integers whose output bits all depend on all input bits."""
    x = x.to(tl.uint64, bitcast=True) + GOLDEN
    x = (x ^ (x >> 30)) * MIX_1
    x = (x ^ (x >> 27)) * MIX_2
    return (x ^ (x >> 31)).to(tl.int64, bitcast=True)
