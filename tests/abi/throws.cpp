// A plug-in whose entry point throws an exception class of its own: type and destructor live in this library.
#include <exception>
#include <string>

#include "polybit.h"

namespace {
class Trouble : public std::exception {
 public:
  explicit Trouble(std::string text) : text_(std::move(text)) {}
  const char *what() const noexcept override { return text_.c_str(); }

 private:
  std::string text_;
};
}  // namespace

extern "C" const pb_backend *polybit_backend(uint64_t) {
#ifdef THROW_INT
  throw 42;
#else
  throw Trouble("the licence server of the dummy device does not answer, says its entry point");
#endif
}
