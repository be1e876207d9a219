#include "samples.h"

#include <cstring>
#include <fstream>
#include <iterator>
#include <stdexcept>

#include "registry.h"

namespace {

class Reader {
 public:
  explicit Reader(const std::string &path) : path_(path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) fail("cannot be read");
    bytes_.assign(std::istreambuf_iterator<char>(file), {});
  }
  [[noreturn]] void fail(const std::string &what) const { throw std::runtime_error(path_ + ": " + what); }
  bool at_end() const { return place_ == bytes_.size(); }

  const char *take(uint64_t count) {
    if (count > bytes_.size() - place_) fail("ends too early, or is damaged");
    place_ += count;
    return bytes_.data() + (place_ - count);
  }
  template <class T>
  T number() {
    static_assert(sizeof(T) == 8, "every number of the file is eight bytes");
    T value;
    std::memcpy(&value, take(8), 8);
    return value;
  }
  // How many of something that takes at least `least` bytes each.
  uint64_t count(uint64_t least) {
    const uint64_t n = number<uint64_t>();
    if (n > (bytes_.size() - place_) / least) fail("ends too early, or is damaged");
    return n;
  }
  std::string text() {
    const uint64_t length = count(1);
    return std::string(take(length), length);
  }
  Tensor tensor() {
    Tensor t;
    t.dtype = {static_cast<uint8_t>(number<uint64_t>()), static_cast<uint8_t>(number<uint64_t>()), 1};
    t.shape.resize(count(8));
    for (int64_t &size : t.shape) size = number<int64_t>();
    const uint64_t length = count(1);
    const char *from = take(length);
    t.bytes.assign(from, from + length);
    return t;
  }
  std::vector<Tensor> tensors() {
    std::vector<Tensor> list(count(32));
    for (Tensor &t : list) t = tensor();
    return list;
  }

 private:
  std::string path_;
  std::vector<char> bytes_;
  uint64_t place_ = 0;
};

uint64_t op_named(const Reader &file, const std::string &name) {
  const std::vector<pb::Op> &table = pb::op_table();
  for (uint64_t i = 0; i < table.size(); i++)
    if (name == table[i].name) return i;
  file.fail("no op is called " + name);
}

Sample read_sample(Reader &file) {
  Sample sample;
  sample.op = op_named(file, file.text());
  sample.id = file.text();
  sample.compare = Compare(file.number<uint64_t>());
  sample.rtol = file.number<double>();
  sample.atol = file.number<double>();
  for (const char *kind = pb::op_table()[sample.op].kinds; *kind; kind++) {
    if (*kind == 'd' || *kind == 's') continue;
    Argument argument = {*kind};
    if (*kind == 'n')
      argument.integer = file.number<int64_t>();
    else if (*kind == 'f')
      argument.real = file.number<double>();
    else if (*kind != 'o')
      argument.given = file.tensors();
    sample.arguments.push_back(argument);
  }
  for (Argument &argument : sample.arguments)
    if (std::strchr("omM", argument.kind)) argument.expected = file.tensors();
  return sample;
}

}  // namespace

std::vector<Sample> read_samples(const std::string &path) {
  Reader file(path);
  if (std::memcmp(file.take(8), "polybit1", 8) != 0) file.fail("is no file of samples");
  if (file.number<uint64_t>() != PB_ABI) file.fail("was written for another op table: write it again");
  std::vector<Sample> samples;
  for (uint64_t left = file.count(1); left; left--) samples.push_back(read_sample(file));
  if (!file.at_end()) file.fail("goes on behind its last sample");
  return samples;
}
