// Numbers of 16 bits, which are computed with as floats.

#pragma once

#include <cstdint>
#include <cstring>

namespace lean {

struct Half {
  uint16_t bits;
  operator float() const {
    const uint32_t sign = (bits & 0x8000u) << 16, rest = bits & 0x7fffu;
    uint32_t wide;
    if (rest >= 0x7c00u) {  // infinite, or no number
      wide = 0x7f800000u | (rest & 0x3ffu) << 13;
    } else if (rest >= 0x400u) {
      wide = (rest << 13) + (112u << 23);
    } else {  // a denormal is so many times 2^-24
      const float value = static_cast<float>(rest) * 5.9604644775390625e-8f;
      return sign ? -value : value;
    }
    wide |= sign;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }
  Half() = default;
  explicit Half(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, sizeof wide);
    const uint32_t sign = wide >> 16 & 0x8000u;
    wide &= 0x7fffffffu;
    if (wide > 0x7f800000u) {
      bits = static_cast<uint16_t>(sign | 0x7e00u);
    } else if (wide >= 0x477ff000u) {  // rounds to more than 65504
      bits = static_cast<uint16_t>(sign | 0x7c00u);
    } else if (wide >= 0x38800000u) {
      const uint32_t odd = wide >> 13 & 1u;
      bits = static_cast<uint16_t>(sign | ((wide - (112u << 23) + 0xfffu + odd) >> 13));
    } else {  // adding 0.5 rounds to a multiple of 2^-24, in the last bits
      float magnitude;
      std::memcpy(&magnitude, &wide, sizeof magnitude);
      magnitude += 0.5f;
      std::memcpy(&wide, &magnitude, sizeof wide);
      bits = static_cast<uint16_t>(sign | (wide - 0x3f000000u));
    }
  }
};

struct Brain {
  uint16_t bits;
  operator float() const {
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }
  Brain() = default;
  explicit Brain(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, sizeof wide);
    if ((wide & 0x7fffffffu) > 0x7f800000u) {
      bits = 0x7fc0u;
    } else {
      bits = static_cast<uint16_t>((wide + 0x7fffu + (wide >> 16 & 1u)) >> 16);
    }
  }
};

}  // namespace lean
