// Errors with values in their text: `<where>: <argument> must <expectation>, got <value>.`
#pragma once

#include <sstream>
#include <stdexcept>

// VATT_CHECK(dim == 4, "tokenize: patch must have 4 numbers, got " << dim << ".");  pybind11 raises it as ValueError.
#define VATT_CHECK(condition, message)          \
  do {                                          \
    if (!(condition)) {                         \
      std::ostringstream text_;                 \
      text_ << message;                         \
      throw std::invalid_argument(text_.str()); \
    }                                           \
  } while (0)
