// What stands between attention's matrix products on a CPU, where torch's library has none with dropout: scores become
// dropped probabilities, and their gradients those of the scores, in one pass each, in place.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "check.h"
#include "clones.h"
#include "parallel.h"
#include "splitmix.h"
#include "tensor_view.h"

namespace py = pybind11;

namespace vatt {
namespace {

// Scores q k^T of some heads [heads, rows, rows]; the first is number `head` of all heads of all samples.
struct Rows {
  float* scores;       // become p * drop
  float* grads;        // d(p * drop), become d(q k^T); null in forward
  float* lse;          // [heads, rows] log-sum-exps of the scaled scores: forward's result, backward's input
  const float* delta;  // [heads, rows] dy_i . y_i
  uint64_t seed;
  int64_t head, rows;
  uint32_t dropped;   // of 2^31 hashes
  float scale, kept;  // kept: 1 / (1 - p)
};

// e^x for x <= 0, and 0 below -87; NaN stays NaN. Without branches, so that loops vectorise.
inline float exp_of(float x) {
  const float turns = std::floor(x * 1.44269504f + 0.5f);
  const float rest = (x - turns * 0.693359375f) + turns * 2.12194440e-4f;
  float sum = 1.9875691500e-4f;
  sum = sum * rest + 1.3981999507e-3f;
  sum = sum * rest + 8.3334519073e-3f;
  sum = sum * rest + 4.1665795894e-2f;
  sum = sum * rest + 1.6666665459e-1f;
  sum = sum * rest + 5.0000001201e-1f;
  const float value = sum * rest * rest + rest + 1.0f;
  const float power = bits_float(static_cast<uint32_t>(static_cast<int32_t>(std::max(-126.0f, turns)) + 127) << 23);
  return x < -87.0f ? 0.0f : value * power;
}

// 1 / (1 - p) or 0: the hash of vatt_engine.ops.attention.dropout_mask.
inline float drop(const Rows& r, uint64_t key, uint32_t column) {
  uint32_t x = static_cast<uint32_t>(key) ^ column * 0x9e3779b9u;
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15) ^ static_cast<uint32_t>(key >> 32)) * 0x846ca68bu;
  return ((x ^ (x >> 16)) >> 1) >= r.dropped ? r.kept : 0.0f;
}

inline uint64_t row_key(const Rows& r, int64_t i) {
  const uint64_t head = r.head + i / r.rows;
  return splitmix64(splitmix64(r.seed) ^ ((head << 32) + static_cast<uint64_t>(i % r.rows)));
}

inline void softmax_row(const Rows r, int64_t i) {
  constexpr int64_t kLanes = 16;
  float* __restrict scores = r.scores + i * r.rows;
  float highest[kLanes], sums[kLanes] = {};
  std::fill_n(highest, kLanes, -std::numeric_limits<float>::infinity());
  const int64_t whole = r.rows - r.rows % kLanes;
  for (int64_t j = 0; j < whole; j += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const float score = scores[j + lane];
      highest[lane] = score > highest[lane] ? score : highest[lane];
    }
  }
  for (int64_t j = whole; j < r.rows; ++j) highest[0] = std::max(highest[0], scores[j]);
  const float high = *std::max_element(highest, highest + kLanes) * r.scale;
  for (int64_t j = 0; j < r.rows; ++j) scores[j] = exp_of(scores[j] * r.scale - high);
  for (int64_t j = 0; j < whole; j += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += scores[j + lane];
  }
  for (int64_t j = whole; j < r.rows; ++j) sums[0] += scores[j];
  float sum = 0.0f;
  for (const float lane : sums) sum += lane;
  const uint64_t key = row_key(r, i);
  const float inverse = 1.0f / sum;
  for (int64_t j = 0; j < r.rows; ++j) scores[j] *= inverse * drop(r, key, static_cast<uint32_t>(j));
  r.lse[i] = high + std::log(sum);
}

inline void gradient_row(const Rows r, int64_t i) {
  float* __restrict scores = r.scores + i * r.rows, * __restrict grads = r.grads + i * r.rows;
  const uint64_t key = row_key(r, i);
  const float lse = r.lse[i], delta = r.delta[i];
  for (int64_t j = 0; j < r.rows; ++j) {
    const float p = exp_of(std::min(scores[j] * r.scale - lse, 0.0f));
    const float share = drop(r, key, static_cast<uint32_t>(j));
    grads[j] = p * (grads[j] * share - delta) * r.scale;
    scores[j] = p * share;
  }
}

Rows rows_of(const TensorView& scores, const TensorView& lse, const TensorView& seed, int64_t head, double dropout_p,
             double scale) {
  const bool square = scores.ndim == 3 && scores.shape[1] == scores.shape[2];
  VATT_CHECK(
      square && scores.dtype == DType::kFloat && scores.is_contiguous(),
      "attention: scores must be contiguous float32 [heads, rows, rows], got shape " << scores.shape_text() << ".");
  const bool listed = lse.ndim == 2 && lse.shape[0] == scores.shape[0] && lse.shape[1] == scores.shape[1];
  VATT_CHECK(listed && lse.dtype == DType::kFloat && lse.is_contiguous(),
             "attention: lse must be contiguous float32 [heads, rows], got shape " << lse.shape_text() << ".");
  VATT_CHECK(seed.dtype == DType::kInt64 && seed.ndim == 0, "attention: seed must be one int64.");
  for (const TensorView* tensor : {&scores, &lse, &seed}) {
    VATT_CHECK(tensor->device.device_type == kDLCPU, "attention: tensors must be on the cpu.");
  }
  return {scores.as<float>(),
          nullptr,
          lse.as<float>(),
          nullptr,
          static_cast<uint64_t>(*seed.as<int64_t>()),
          head,
          scores.shape[1],
          static_cast<uint32_t>(std::nearbyint(dropout_p * 2147483648.0)),
          static_cast<float>(scale),
          static_cast<float>(1.0 / (1.0 - dropout_p))};
}

template <typename Row>
void for_rows(const Rows& r, int64_t heads, int num_threads, const Row& row) {
  constexpr int64_t kGrain = 1 << 18;  // scores that pay for a thread
  py::gil_scoped_release release;
  parallel_for(heads * r.rows, num_threads, kGrain / std::max<int64_t>(r.rows, 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) row(r, i);
  });
}

void softmax(const TensorView& scores, const TensorView& lse, const TensorView& seed, int64_t head, double dropout_p,
             double scale, int num_threads) {
  for_rows(rows_of(scores, lse, seed, head, dropout_p, scale), scores.shape[0], num_threads, clones<softmax_row>);
}

void gradients(const TensorView& scores, const TensorView& grads, const TensorView& lse, const TensorView& delta,
               const TensorView& seed, int64_t head, double dropout_p, double scale, int num_threads) {
  Rows r = rows_of(scores, lse, seed, head, dropout_p, scale);
  r.grads = rows_of(grads, delta, seed, head, dropout_p, scale).scores;
  VATT_CHECK(grads.shape[0] == scores.shape[0] && grads.shape[1] == scores.shape[1],
             "attention: grads must have the shape of scores, got " << grads.shape_text() << ".");
  r.delta = delta.as<float>();
  for_rows(r, scores.shape[0], num_threads, clones<gradient_row>);
}

}  // namespace

void bind_attention(py::module_& m) {
  m.def("attention_softmax", &softmax, py::arg("scores"), py::arg("lse"), py::arg("seed"), py::arg("head"),
        py::arg("dropout_p"), py::arg("scale"), py::arg("num_threads"),
        "Turn scores [heads, rows, rows] into dropped probabilities in place, and write their log-sum-exps.");
  m.def("attention_gradients", &gradients, py::arg("scores"), py::arg("grads"), py::arg("lse"), py::arg("delta"),
        py::arg("seed"), py::arg("head"), py::arg("dropout_p"), py::arg("scale"), py::arg("num_threads"),
        "Turn scores into dropped probabilities and the gradients of these into those of q k^T, both in place.");
}

}  // namespace vatt
