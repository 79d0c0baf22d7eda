// CRC-32C (Castagnoli) of bytes: the checksum of TensorFlow's checkpoints. Where the processor has an instruction for
// it (SSE 4.2), three parts of the data are summed at once, since one sum waits three cycles for each eight bytes.
#include <pybind11/pybind11.h>

#include <array>
#include <cstdint>
#include <cstring>

#include "check.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <nmmintrin.h>
#define VATT_SSE42 1
#else
#define VATT_SSE42 0
#endif

namespace py = pybind11;

namespace vatt {
namespace {

constexpr uint32_t kPolynomial = 0x82f63b78u;  // bits reversed
constexpr size_t kLane = 4096;                 // bytes that each of the three sums takes in a turn

using Table = std::array<uint32_t, 256>;

// kSlices[k][b]: the register after the byte b and k zero bytes.
std::array<Table, 8> make_slices() {
  std::array<Table, 8> slices{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t value = byte;
    for (int bit = 0; bit < 8; ++bit) value = (value >> 1) ^ ((value & 1u) ? kPolynomial : 0u);
    slices[0][byte] = value;
  }
  for (size_t k = 1; k < slices.size(); ++k) {
    for (size_t byte = 0; byte < 256; ++byte) {
      const uint32_t before = slices[k - 1][byte];
      slices[k][byte] = (before >> 8) ^ slices[0][before & 0xffu];
    }
  }
  return slices;
}

const std::array<Table, 8> kSlices = make_slices();

uint32_t update_portable(uint32_t state, const uint8_t* data, size_t size) {
  for (; size >= 8; data += 8, size -= 8) {
    const uint32_t low = state ^ (data[0] | uint32_t{data[1]} << 8 | uint32_t{data[2]} << 16 | uint32_t{data[3]} << 24);
    state = kSlices[7][low & 0xffu] ^ kSlices[6][(low >> 8) & 0xffu] ^ kSlices[5][(low >> 16) & 0xffu] ^
            kSlices[4][low >> 24] ^ kSlices[3][data[4]] ^ kSlices[2][data[5]] ^ kSlices[1][data[6]] ^
            kSlices[0][data[7]];
  }
  for (; size > 0; ++data, --size) state = (state >> 8) ^ kSlices[0][(state ^ *data) & 0xffu];
  return state;
}

#if VATT_SSE42
// [k][b]: the register that holds b in its byte k, after kLane zero bytes. Registers add up, so four look-ups move one.
std::array<Table, 4> make_moved() {
  static const std::array<uint8_t, kLane> zeros{};
  std::array<Table, 4> moved{};
  for (int k = 0; k < 4; ++k) {
    for (uint32_t bit = 1; bit < 256; bit *= 2) {
      const uint32_t value = update_portable(bit << (8 * k), zeros.data(), zeros.size());
      for (uint32_t below = 0; below < bit; ++below) moved[k][bit + below] = moved[k][below] ^ value;
    }
  }
  return moved;
}

inline uint64_t load(const uint8_t* data) {
  uint64_t word;
  std::memcpy(&word, data, sizeof(word));
  return word;
}

__attribute__((target("sse4.2"))) uint32_t update_sse42(uint32_t state, const uint8_t* data, size_t size) {
  static const std::array<Table, 4> moved = make_moved();
  const auto move = [](uint64_t value) {
    return moved[0][value & 0xffu] ^ moved[1][(value >> 8) & 0xffu] ^ moved[2][(value >> 16) & 0xffu] ^
           moved[3][(value >> 24) & 0xffu];
  };
  for (; size >= 3 * kLane; data += 3 * kLane, size -= 3 * kLane) {
    uint64_t first = state, second = 0, third = 0;
    for (size_t i = 0; i < kLane; i += 8) {
      first = _mm_crc32_u64(first, load(data + i));
      second = _mm_crc32_u64(second, load(data + kLane + i));
      third = _mm_crc32_u64(third, load(data + 2 * kLane + i));
    }
    state = move(move(first) ^ second) ^ static_cast<uint32_t>(third);
  }
  for (; size >= 8; data += 8, size -= 8) state = static_cast<uint32_t>(_mm_crc32_u64(state, load(data)));
  for (; size > 0; ++data, --size) state = _mm_crc32_u8(state, *data);
  return state;
}
#endif

uint32_t crc32c(const py::buffer& data, uint32_t crc, bool portable) {
  const py::buffer_info info = data.request();
  py::ssize_t expected = info.itemsize;
  bool contiguous = true;
  for (py::ssize_t axis = info.ndim - 1; axis >= 0; --axis) {
    contiguous = contiguous && (info.shape[axis] < 2 || info.strides[axis] == expected);
    expected *= info.shape[axis];
  }
  VATT_CHECK(contiguous, "crc32c: data must be contiguous, got a strided buffer.");
  const auto* bytes = static_cast<const uint8_t*>(info.ptr);
  const size_t size = static_cast<size_t>(info.size) * static_cast<size_t>(info.itemsize);
  py::gil_scoped_release release;
#if VATT_SSE42
  if (!portable && __builtin_cpu_supports("sse4.2")) return ~update_sse42(~crc, bytes, size);
#else
  (void)portable;
#endif
  return ~update_portable(~crc, bytes, size);
}

}  // namespace

void bind_crc32c(py::module_& m) {
  m.def("crc32c", &crc32c, py::arg("data"), py::arg("crc") = 0, py::arg("portable") = false,
        "CRC-32C of a contiguous buffer, going on from `crc`; `portable` leaves the processor's instruction alone.");
}

}  // namespace vatt
