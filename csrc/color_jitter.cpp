// Brightness, saturation, contrast and hue of uint8 frames in place: what vatt_engine/data/augment.py says in PyTorch,
// where every step writes all its colours to memory. Here a frame goes to float once and back once.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>

#include "check.h"
#include "clones.h"
#include "tensor_view.h"

namespace py = pybind11;

namespace vatt {
namespace {

struct ColorChange {
  float brightness;  // added, in 0..255
  float saturation;  // factor; 1: as it is
  float contrast;    // factor; 1: as it is
  float hue;         // in sixths of a turn; 0: as it is
};

constexpr int64_t kBlock = 512;  // pixels whose colours stay in the first cache from one step to the next

using Colors = std::array<std::array<float, kBlock>, 3>;

// x -> high - (high - x) * min(high / (high - low), factor), and grey where high <= 0.
inline void saturate(float* __restrict red, float* __restrict green, float* __restrict blue, float factor) {
  for (int64_t i = 0; i < kBlock; ++i) {
    const float high = std::max(std::max(red[i], green[i]), blue[i]);
    const float low = std::min(std::min(red[i], green[i]), blue[i]);
    const float ratio = high / (high - low);
    const float scale = ratio > 0.0f ? std::min(ratio, factor) : 0.0f;  // 0 / 0 is not above 0
    red[i] = high - (high - red[i]) * scale;
    green[i] = high - (high - green[i]) * scale;
    blue[i] = high - (high - blue[i]) * scale;
  }
}

// The hue in sixths of a turn, turned; red is full for |hue| <= 1, none for |hue| >= 2, and so on around 2 and 4.
inline void turn_hue(float* __restrict red, float* __restrict green, float* __restrict blue, float turn) {
  for (int64_t i = 0; i < kBlock; ++i) {
    const float r = red[i], g = green[i], b = blue[i];
    const float high = std::max(std::max(r, g), b), low = std::min(std::min(r, g), b);
    const float span = high - low;
    const float scale = 1.0f / (span > 0.0f ? span : 1.0f);
    const float of_blue = (r - g) * scale + 4.0f, of_green = (b - r) * scale + 2.0f, of_red = (g - b) * scale;
    const float other = high == g ? of_green : of_blue;
    float hue = (high == r ? of_red : other) + turn;
    hue -= std::floor(hue / 6.0f) * 6.0f;
    const auto part = [&](float share) { return std::min(std::max(share, 0.0f), 1.0f) * span + low; };
    red[i] = part(std::fabs(hue - 3.0f) - 1.0f);
    green[i] = part(2.0f - std::fabs(hue - 2.0f));
    blue[i] = part(2.0f - std::fabs(hue - 4.0f));
  }
}

inline void read_block(const uint8_t* __restrict pixels, int64_t count, const ColorChange& change, Colors& colors) {
  float* __restrict red = colors[0].data(), * __restrict green = colors[1].data(), * __restrict blue = colors[2].data();
  for (int64_t i = 0; i < count; ++i) {
    red[i] = pixels[3 * i] + change.brightness;
    green[i] = pixels[3 * i + 1] + change.brightness;
    blue[i] = pixels[3 * i + 2] + change.brightness;
  }
  if (change.saturation != 1.0f) saturate(red, green, blue, change.saturation);
}

inline double sum_of(const float* values, int64_t count) {
  constexpr int64_t kLanes = 16;
  float lanes[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) lanes[lane] += values[i + lane];
  }
  double sum = 0.0;
  for (; i < count; ++i) sum += values[i];
  for (const float lane : lanes) sum += lane;
  return sum;
}

inline uint8_t to_pixel(float color) {
  return static_cast<uint8_t>(static_cast<int32_t>(std::nearbyint(std::min(std::max(color, 0.0f), 255.0f))));
}

// Contrast is the distance from the frame's own mean, so its colours are read twice.
inline void jitter_frame(uint8_t* pixels, int64_t count, const ColorChange& change) {
  Colors colors{};
  std::array<float, 3> mean{};
  if (change.contrast != 1.0f) {
    std::array<double, 3> sums{};
    for (int64_t first = 0; first < count; first += kBlock) {
      const int64_t size = std::min(kBlock, count - first);
      read_block(pixels + 3 * first, size, change, colors);
      for (int c = 0; c < 3; ++c) sums[c] += sum_of(colors[c].data(), size);
    }
    for (int c = 0; c < 3; ++c) mean[c] = static_cast<float>(sums[c] / static_cast<double>(count));
  }
  for (int64_t first = 0; first < count; first += kBlock) {
    const int64_t size = std::min(kBlock, count - first);
    uint8_t* out = pixels + 3 * first;
    read_block(out, size, change, colors);
    if (change.contrast != 1.0f) {
      for (int c = 0; c < 3; ++c) {
        for (float& color : colors[c]) color = (color - mean[c]) * change.contrast + mean[c];
      }
    }
    if (change.hue != 0.0f) turn_hue(colors[0].data(), colors[1].data(), colors[2].data(), change.hue);
    for (int64_t i = 0; i < size; ++i) {
      for (int c = 0; c < 3; ++c) out[3 * i + c] = to_pixel(colors[c][i]);
    }
  }
}

void color_jitter(const TensorView& frames, double brightness, double saturation, double contrast, double hue) {
  const bool shaped = frames.dtype == DType::kUInt8 && frames.ndim == 4 && frames.shape[3] == 3 &&
                      frames.is_contiguous() && frames.device.device_type == kDLCPU;
  VATT_CHECK(shaped, "color_jitter: frames must be contiguous uint8 [T, H, W, 3] on the cpu, got shape "
                         << frames.shape_text() << ".");
  const ColorChange change{static_cast<float>(255 * brightness), static_cast<float>(saturation),
                           static_cast<float>(contrast), static_cast<float>(6 * hue)};
  const int64_t count = frames.shape[1] * frames.shape[2];
  py::gil_scoped_release release;
  for (int64_t t = 0; t < frames.shape[0]; ++t)
    clones<jitter_frame>(frames.as<uint8_t>() + 3 * count * t, count, change);
}

}  // namespace

void bind_color_jitter(py::module_& m) {
  m.def("color_jitter", &color_jitter, py::arg("frames"), py::arg("brightness"), py::arg("saturation"),
        py::arg("contrast"), py::arg("hue"),
        "Change the colours of frames [T, H, W, 3] uint8 in place: 0..1 added, two factors, parts of a turn.");
}

}  // namespace vatt
