// The launchers of core/launch with a device that launches nothing: it writes down what is to be launched, and
// python/polybit/backends/metal.py hands that to torch, which alone can encode for its MPS stream.
//
// A launcher sees made-up addresses. It runs twice, at two bases: a word of a kernel's arguments that moves with the
// base is a pointer, and says into which tensor; every other word is a number.
#include <cstddef>
#include <vector>

#include "../../core/simt/emulator.h"
#include "../../core/simt/tile_simdgroup.h"
#include "../../core/kernels/kernels.h"
#include "../../core/launch/table.h"
#include "../../core/op_kinds.h"

namespace {

constexpr int64_t tensors_max = 28;  // that one launch can name: Metal has 31 buffers, of which three are taken
constexpr int64_t words_max = 512;   // 4 KiB, what torch can pass by value
constexpr uint64_t first_base = uint64_t(1) << 62, moved = uint64_t(1) << 61, room = uint64_t(1) << 40;

}  // namespace

extern "C" {
struct pb_metal_launch {
  const char *kernel;
  int64_t groups, group_dim;
  int64_t word_count, tensor_count;
  int64_t words[words_max];      // of a pointer: bytes from the beginning of its tensor
  uint8_t slots[words_max];      // 0 for a number, else 1 + the place in `tensors`
  int64_t tensors[tensors_max];  // places in the list of the caller; its length is the scratch
};
struct pb_metal_op {
  const char *name, *kinds;  // as in core/registry.h
};
struct pb_metal_field {
  const char *name;
  int64_t place;
};
}

namespace {

struct Recording {
  DLTensor *const *tensors;
  int64_t count;
  bool again = false;
  size_t next = 0;
  std::vector<pb_metal_launch> launches;

  pb_status add(pb_context *ctx, const char *kernel, int64_t groups, uint32_t group_dim, const void *args,
                size_t bytes) {
    if (groups > 0x7fffffff)
      return pb::launch::fail(ctx, PB_UNSUPPORTED, "too large for one launch: %lld groups",
                              static_cast<long long>(groups));
    if (!again) {
      pb_metal_launch launch = {};
      launch.kernel = kernel;
      launch.groups = groups;
      launch.group_dim = group_dim;
      launch.word_count = static_cast<int64_t>(bytes / 8);
      __builtin_memcpy(launch.words, args, bytes);
      launches.push_back(launch);
      return PB_OK;
    }
    if (next == launches.size() || launches[next].kernel != kernel)
      return pb::launch::fail(ctx, PB_ERROR, "%s: the launches depend on addresses", kernel);
    return point(ctx, &launches[next++], static_cast<const char *>(args));
  }

  // Tells pointers from numbers.
  pb_status point(pb_context *ctx, pb_metal_launch *launch, const char *args) const {
    for (int64_t i = 0; i < launch->word_count; i++) {
      uint64_t word;
      __builtin_memcpy(&word, args + 8 * i, 8);
      const uint64_t before = static_cast<uint64_t>(launch->words[i]);
      if (word == before) continue;
      const int64_t tensor = static_cast<int64_t>((before - first_base) / room);
      if (word - before != moved || tensor < 0 || tensor > count)
        return pb::launch::fail(ctx, PB_ERROR, "%s: argument %lld depends on an address", launch->kernel,
                                static_cast<long long>(i));
      int64_t slot = 0;
      while (slot < launch->tensor_count && launch->tensors[slot] != tensor) slot++;
      if (slot == tensors_max)
        return pb::launch::fail(ctx, PB_ERROR, "%s: more than %lld tensors", launch->kernel,
                                static_cast<long long>(tensors_max));
      if (slot == launch->tensor_count) launch->tensors[launch->tensor_count++] = tensor;
      launch->slots[i] = static_cast<uint8_t>(slot + 1);
      const uint64_t begin = tensor < count ? tensors[tensor]->byte_offset : 0;
      launch->words[i] = static_cast<int64_t>((before - first_base) % room - begin);
    }
    return PB_OK;
  }
};

// Of every kernel that a launcher may choose: one that is not in entries.def does not compile.
template <class K>
struct KernelName;
#define PB_ENTRY(name, ...) \
  template <> \
  struct KernelName<__VA_ARGS__> { \
    static constexpr const char *value = #name; \
  };
#define PB_TILES pb::SimdgroupTiles
#include "../../core/kernels/entries.def"

struct Recorder {
  typedef pb::SimdgroupTiles Tiles;
  static constexpr int64_t tensors = tensors_max;
  static uint32_t width(pb_context *) { return 32; }
  template <class K>
  static pb_status launch(pb_context *ctx, int64_t groups, uint32_t group_dim, const typename K::Args &args) {
    static_assert(sizeof args % 8 == 0 && sizeof args <= 8 * words_max, "what a launch can carry");
    static_assert(sizeof(typename K::Local) <= 32768, "threadgroup memory");
    static_assert(K::group_max <= 1024, "threads of a group");
    if (groups == 0) return PB_OK;
    return static_cast<Recording *>(ctx->stream)->add(ctx, KernelName<K>::value, groups, group_dim, &args, sizeof args);
  }
};

}  // namespace

extern "C" {

PB_EXPORT uint64_t polybit_metal_abi() { return PB_ABI; }

// Of the structures that metal.py has as well, one after another: the size, without a name, and the place of each
// field. Then a null name.
PB_EXPORT pb_metal_field polybit_metal_field(int64_t index) {
#define PB_SIZE(type) {"", sizeof(type)}
#define PB_FIELD(type, field) \
  { \
    #field, offsetof(type, field) \
  }
  static const pb_metal_field fields[] = {PB_SIZE(DLTensor),
                                          PB_FIELD(DLTensor, data),
                                          PB_FIELD(DLTensor, device.device_type),
                                          PB_FIELD(DLTensor, device.device_id),
                                          PB_FIELD(DLTensor, ndim),
                                          PB_FIELD(DLTensor, dtype.code),
                                          PB_FIELD(DLTensor, dtype.bits),
                                          PB_FIELD(DLTensor, dtype.lanes),
                                          PB_FIELD(DLTensor, shape),
                                          PB_FIELD(DLTensor, strides),
                                          PB_FIELD(DLTensor, byte_offset),
                                          PB_SIZE(pb_tensor_list),
                                          PB_FIELD(pb_tensor_list, count),
                                          PB_FIELD(pb_tensor_list, tensors),
                                          PB_SIZE(pb_context),
                                          PB_FIELD(pb_context, size),
                                          PB_FIELD(pb_context, stream),
                                          PB_FIELD(pb_context, device_index),
                                          PB_FIELD(pb_context, error),
                                          PB_FIELD(pb_context, error_size),
                                          PB_FIELD(pb_context, scratch),
                                          PB_FIELD(pb_context, scratch_size),
                                          PB_FIELD(pb_context, scratch_needed),
                                          PB_FIELD(pb_context, thread_count),
                                          PB_FIELD(pb_context, parallel_for),
                                          PB_FIELD(pb_context, deterministic),
                                          PB_SIZE(pb_metal_op),
                                          PB_FIELD(pb_metal_op, name),
                                          PB_FIELD(pb_metal_op, kinds),
                                          PB_SIZE(pb_metal_launch),
                                          PB_FIELD(pb_metal_launch, kernel),
                                          PB_FIELD(pb_metal_launch, groups),
                                          PB_FIELD(pb_metal_launch, group_dim),
                                          PB_FIELD(pb_metal_launch, word_count),
                                          PB_FIELD(pb_metal_launch, tensor_count),
                                          PB_FIELD(pb_metal_launch, words),
                                          PB_FIELD(pb_metal_launch, slots),
                                          PB_FIELD(pb_metal_launch, tensors),
                                          {nullptr, 0}};
#undef PB_SIZE
#undef PB_FIELD
  return fields[index];
}

// The ops of this library's table, then a null name.
PB_EXPORT pb_metal_op polybit_metal_op(int64_t index) {
#define PB_OP(name, arguments) {#name, arguments},
  static const pb_metal_op ops[] = {
#include "../../core/ops.def"
      {nullptr, nullptr}};
#undef PB_OP
  return ops[index];
}

// The launches of op `index`, valid until this thread's next call. `tensors` are those of args, in any order but each
// once; their data is set here. Of ctx the caller gives error, scratch_size and deterministic.
PB_EXPORT pb_status polybit_metal_record(int64_t index, pb_context *ctx, const void *args, DLTensor *const *tensors,
                                         int64_t count, const pb_metal_launch **launches, int64_t *launch_count) {
  typedef pb_status (*Launcher)(pb_context *, const void *);
  static const Launcher launchers[] = {
#define PB_OP(op, arguments) \
  [](pb_context *c, const void *a) { return pb::launch::op<Recorder>(c, static_cast<const pb_##op##_args *>(a)); },
#include "../../core/ops.def"
#undef PB_OP
  };
  thread_local Recording recording;
  recording = Recording{tensors, count, false, 0, {}};
  *launch_count = 0;
  if (static_cast<uint64_t>(count) >= moved / room) return pb::launch::fail(ctx, PB_UNSUPPORTED, "too many tensors");
  for (int pass = 0; pass < 2; pass++) {
    const uint64_t base = first_base + (pass ? moved : 0);
    for (int64_t i = 0; i < count; i++)
      tensors[i]->data = reinterpret_cast<void *>(base + static_cast<uint64_t>(i) * room);
    ctx->scratch = ctx->scratch_size ? reinterpret_cast<void *>(base + static_cast<uint64_t>(count) * room) : nullptr;
    ctx->stream = &recording;
    recording.again = pass;
    PB_TRY(launchers[index](ctx, args));
  }
  *launches = recording.launches.data();
  *launch_count = static_cast<int64_t>(recording.launches.size());
  return PB_OK;
}
}
