// Pieces of the patch matrix on their way to shared memory: which patch a row is, sixteen of its elements at a time
// from the video into registers, and from there, converted to T, into a swizzled tile.
//
// Bytes are offset by 127.5, which loses nothing: x - 127.5 = (2 x - 255) / 2 has eight significant bits, which
// bfloat16 and float16 hold. The product's last step multiplies by 2/255: 2/255 x - 1 = 2/255 (x - 127.5).
#pragma once

#include <cstring>
#include <type_traits>

#include "cuda_utils.cuh"
#include "product.cuh"
#include "tensor_core.cuh"
#include "tokenize_device.h"

namespace vatt {

constexpr float kByteScale = 2.0f / 255.0f;

// ---- rows -----------------------------------------------------------------------------------------------------------

constexpr int64_t kNoPatch = -1;  // the AGG row, or a row behind the last: zeros

// Where row `i` of the patch matrix starts in the video, times two, plus one if its window is mirrored; or kNoPatch.
// Traps on tokens outside the grid and windows outside the video.
__device__ __forceinline__ int64_t find_patch(const TokenizeRows& rows, int64_t i) {
  const PatchParams& p = rows.patches;
  if (i >= rows.count()) return kNoPatch;
  const int64_t b = i / rows.per_sample(), k = i % rows.per_sample() - rows.agg;
  if (k < 0) return kNoPatch;
  const int64_t token = kept_token(p, b, k);
  if (token < 0 || token >= num_tokens(p)) __trap();
  if (p.crop) {
    const int64_t y = p.crop[2 * b], x = p.crop[2 * b + 1];
    if (y < 0 || y > rows.max_crop_y || x < 0 || x > rows.max_crop_x) __trap();
  }
  return patch_offset(p, b, token) * 2 + is_flipped(p, b);
}

// ---- sixteen elements of a patch ------------------------------------------------------------------------------------

constexpr int kChunk = 16;

// Elements first .. first + 15 of a patch; `whole` says that they lie in one run of pixels.
struct ChunkPlace {
  int first, size;  // elements; of the whole patch
  int run, in_run;  // the run of the first element, its place there
  int64_t start;    // of that run, from the patch's first
  bool whole;

  __device__ __forceinline__ ChunkPlace(const PatchParams& p, int first)
      : first(first), size(static_cast<int>(patch_size(p))) {
    const int length = static_cast<int>(run_length(p));
    run = first / length;
    in_run = first % length;
    start = run_offset(p, run);
    whole = length % kChunk == 0 && p.channels <= 4;
  }
};

template <bool kBytes>
__device__ __forceinline__ float pixel_value(const PatchParams& p, int64_t index) {
  float value = 0.0f;
  if constexpr (kBytes) {
    value = static_cast<float>(static_cast<const uint8_t*>(p.video)[index]) - 127.5f;
  } else {
    VATT_DISPATCH_FLOAT(p.video_dtype, Pixel, value = to_float(static_cast<const Pixel*>(p.video)[index]));
  }
  return value;
}

// A chunk of any kind, element by element: put(i, value) for each of the sixteen.
template <bool kBytes, typename Put>
__device__ __forceinline__ void each_element(const PatchParams& p, int64_t patch, const ChunkPlace& at,
                                             const Put& put) {
  const int length = static_cast<int>(run_length(p));
  int run = at.run, e = at.in_run;
  int64_t pixels = (patch >> 1) + at.start;
#pragma unroll 4
  for (int i = 0; i < kChunk; ++i) {
    const bool inside = at.first + i < at.size;
    put(i, inside ? pixel_value<kBytes>(p, pixels + run_element(p, e, patch & 1)) : 0.0f);
    if (++e == length && inside) {
      e = 0;
      pixels = (patch >> 1) + run_offset(p, ++run);
    }
  }
}

// Sixteen bytes on their way through registers: load() starts the reading by aligned words of four (one of sixteen,
// where they lie so), get(), as late as possible, waits for them and puts the bytes in order. Any bytes where there is
// no patch: what they are multiplied with is zero, or the sum is not stored.
class ByteChunk {
 public:
  // False if the chunk has to go by store_pixels.
  __device__ __forceinline__ bool load(const PatchParams& p, int64_t patch, const ChunkPlace& at) {
#pragma unroll
    for (uint32_t& word : words_) word = 0x80808080u;
    how_ = 0;
    if (patch == kNoPatch || at.first >= at.size) return true;
    if (!at.whole) return false;
    const uint8_t* run = static_cast<const uint8_t*>(p.video) + (patch >> 1) + at.start;
    const int length = static_cast<int>(run_length(p)), channels = static_cast<int>(p.channels);
    // Element e = x * C + c of a mirrored run is its byte C * (width - 1) - e + 2 c. So of the 20 bytes from
    // C * (width - 1) - in_run - 15 on, byte 15 - i + 2 c is element i, and four elements come out of two words.
    const bool mirrored = patch & 1;
    const int from = mirrored ? length - channels - at.in_run - 15 : at.in_run;
    const int shift = static_cast<int>(reinterpret_cast<uintptr_t>(run + from) % 4);
    how_ = 8 * shift | mirrored << 5 | at.in_run % channels << 8 | channels << 16;
    if (!mirrored && reinterpret_cast<uintptr_t>(run + from) % 16 == 0) {
      const uint4 all = *reinterpret_cast<const uint4*>(run + from);
      words_[0] = all.x, words_[1] = all.y, words_[2] = all.z, words_[3] = all.w;
    } else {
#pragma unroll
      for (int i = 0; i < 6; ++i) {
        const int word = from - shift + 4 * i;  // one that holds no byte of the run is not read
        if (word > -4 && word < length) words_[i] = *reinterpret_cast<const uint32_t*>(run + word);
      }
    }
    return true;
  }

  __device__ __forceinline__ void get(uint32_t (&bytes)[kChunk / 4]) const {
    uint32_t window[5];
#pragma unroll
    for (int i = 0; i < 5; ++i) window[i] = __funnelshift_r(words_[i], words_[i + 1], how_ & 31);
    int channel = how_ >> 8 & 255;
    const int channels = how_ >> 16;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bytes[i] = window[i];
      if (how_ & 32) {
        uint32_t selector = 0;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          selector |= static_cast<uint32_t>(3 - j + 2 * channel) << (4 * j);
          channel = channel + 1 == channels ? 0 : channel + 1;
        }
        bytes[i] = __byte_perm(window[3 - i], window[4 - i], selector);
      }
    }
  }

 private:
  uint32_t words_[6];
  int how_;  // bits to shift by, 32 if mirrored; from bit 8 the first byte's channel; from bit 16 the channels
};

// Four bytes as values x - 127.5 of T, all steps exact. In bfloat16 without a conversion: 128 + (low seven bits of x)
// is made of bits, -128 or -256 is added, by the top bit of x, then 1/2. In float16: 1024 + x is made of bits, then
// -1152 and 1/2 are added.
template <typename T>
__device__ __forceinline__ void convert_bytes(uint32_t word, uint32_t* values) {
  if constexpr (std::is_same_v<T, float>) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      values[i] = float_bits(static_cast<float>(word >> (8 * i) & 0xff) - 127.5f);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t two = __byte_perm(word, 0, i ? 0x4342 : 0x4140);
      values[i] =
          std::is_same_v<T, BFloat16>
              ? add2<T>(add2<T>((two & 0x007f007fu) | 0x43004300u, (two & 0x00800080u) ^ 0xc380c380u), 0x3f003f00u)
              : add2<T>(add2<T>(two | 0x64006400u, 0xe480e480u), 0x38003800u);
    }
  }
}

// ---- tiles in shared memory -----------------------------------------------------------------------------------------

// Sixteen bytes of aligned values of T from any float type.
template <typename T, typename Pixel>
__device__ __forceinline__ void store_vector(unsigned char* piece, const Pixel* pixels) {
  constexpr int kVector = 16 / sizeof(T);
  Pixel values[kVector];
  if constexpr (sizeof(values) >= 16) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(values) / 16); ++i) {
      const uint4 four = reinterpret_cast<const uint4*>(pixels)[i];
      memcpy(values + i * 16 / sizeof(Pixel), &four, 16);
    }
  } else {
    const uint2 two = *reinterpret_cast<const uint2*>(pixels);
    memcpy(values, &two, 8);
  }
  T converted[kVector];
#pragma unroll
  for (int i = 0; i < kVector; ++i) converted[i] = from_float<T>(to_float(values[i]));
  uint4 four;
  memcpy(&four, converted, 16);
  *reinterpret_cast<uint4*>(piece) = four;
}

template <typename T, int kRowBytes>
__device__ __forceinline__ void store_bytes(unsigned char* tile, int row, int chunk, const ByteChunk& chunk_bytes) {
  constexpr int kPieces = kChunk * sizeof(T) / 16, kWords = 4 / kPieces;
  uint32_t bytes[kChunk / 4];
  chunk_bytes.get(bytes);
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    uint32_t values[4];
#pragma unroll
    for (int j = 0; j < kWords; ++j) convert_bytes<T>(bytes[i * kWords + j], values + j * sizeof(T));
    *reinterpret_cast<uint4*>(tile + tile_offset<kRowBytes>(row, chunk * kPieces + i)) =
        make_uint4(values[0], values[1], values[2], values[3]);
  }
}

// A chunk straight from the video: of floats, or of bytes that do not lie sixteen in a run.
template <typename T, int kRowBytes, bool kBytes>
__device__ __forceinline__ void store_pixels(unsigned char* tile, int row, int chunk, const PatchParams& p,
                                             int64_t patch, const ChunkPlace& at) {
  constexpr int kPieces = kChunk * sizeof(T) / 16, kVector = 16 / sizeof(T);
  const auto piece = [&](int i) { return tile + tile_offset<kRowBytes>(row, chunk * kPieces + i); };
  if (patch == kNoPatch || at.first >= at.size) {
    for (int i = 0; i < kPieces; ++i) *reinterpret_cast<uint4*>(piece(i)) = make_uint4(0, 0, 0, 0);
    return;
  }
  if (!kBytes && at.whole && !(patch & 1)) {
    bool done = false;
    VATT_DISPATCH_FLOAT(p.video_dtype, Pixel, {
      const Pixel* pixels = static_cast<const Pixel*>(p.video) + (patch >> 1) + at.start + at.in_run;
      done = reinterpret_cast<uintptr_t>(pixels) % 16 == 0;
      if (done) {
        for (int i = 0; i < kPieces; ++i) store_vector<T>(piece(i), pixels + i * kVector);
      }
    });
    if (done) return;
  }
  each_element<kBytes>(p, patch, at, [&](int i, float value) {
    reinterpret_cast<T*>(piece(i / kVector))[i % kVector] = from_float<T>(value);
  });
}

// A thread's part of a tile of the patch matrix: chunk `chunk` of every kRowStep-th row. Bytes that lie sixteen in a
// run are fetched into registers long before they are put into the tile; all else is read when it is put.
template <typename T, int kRowBytes, bool kBytes, int kRows, int kRowStep>
class VideoTile {
 public:
  __device__ __forceinline__ VideoTile(int row, int chunk) : row_(row), chunk_(chunk) {}

  // patch_of(j): the patch of the thread's j-th row.
  template <typename PatchOf>
  __device__ __forceinline__ void fetch(const PatchParams& p, const ChunkPlace& at, const PatchOf& patch_of) {
    if constexpr (kBytes) {
      waiting_ = 0;
#pragma unroll
      for (int j = 0; j < kRows; ++j) waiting_ |= !bytes_[j].load(p, patch_of(j), at) << j;
    }
  }

  // The tile begins at row `row0` of the patch matrix, the chunk at element `first` of the patch.
  __device__ __forceinline__ void put(unsigned char* tile, const TokenizeRows& rows, int64_t row0, int first) const {
    if constexpr (kBytes) {
#pragma unroll
      for (int j = 0; j < kRows; ++j) {
        if (!(waiting_ >> j & 1)) store_bytes<T, kRowBytes>(tile, row_ + j * kRowStep, chunk_, bytes_[j]);
      }
    }
    if (waiting_ == 0) return;
    const ChunkPlace at(rows.patches, first);
#pragma unroll 1
    for (int j = 0; j < kRows; ++j) {
      const int row = row_ + j * kRowStep;
      if (waiting_ >> j & 1) {
        store_pixels<T, kRowBytes, kBytes>(tile, row, chunk_, rows.patches, find_patch(rows, row0 + row), at);
      }
    }
  }

 private:
  int row_, chunk_;
  ByteChunk bytes_[kRows];
  unsigned waiting_ = (1u << kRows) - 1;  // rows that are not in bytes_
};

}  // namespace vatt
