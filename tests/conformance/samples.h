// The samples that samples.py wrote, with their expected outputs; it describes the layout of the file.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "polybit.h"

struct Tensor {
  DLDataType dtype;
  std::vector<int64_t> shape;
  std::vector<uint8_t> bytes;
};

// One slot of the argument struct. kind: a letter of pb::Op::kinds.
struct Argument {
  char kind;
  int64_t integer = 0;                // n
  double real = 0;                    // f
  std::vector<Tensor> given = {};     // i m I M; ? where there is one
  std::vector<Tensor> expected = {};  // o m M
};

enum class Compare : uint64_t { tolerance, bits, bits_and_nan };  // bits: any NaN is any NaN

struct Sample {
  uint64_t op;  // its place in pb::op_table()
  std::string id;
  Compare compare;
  double rtol, atol;
  std::vector<Argument> arguments;
};

// Throws std::runtime_error where the file cannot be read, is damaged, or was written for another op table.
std::vector<Sample> read_samples(const std::string &path);
