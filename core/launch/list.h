// Launches over a list of tensors of any length: one for each so many as fit into the arguments (core/kernels/list.h).
#ifndef PB_LAUNCH_LIST_H
#define PB_LAUNCH_LIST_H

#include "launch.h"
#include "../kernels/list.h"

namespace pb {
namespace launch {

inline Dtype dtype_of(const DLTensor *t) {
  if (is_fp32(t)) return dtype_fp32;
  if (is_fp16(t)) return dtype_fp16;
  if (is_bf16(t)) return dtype_bf16;
  return t->dtype.code == kDLUInt && t->dtype.bits == 8 ? dtype_u8 : dtype_none;
}

// The tensor of a list that is to be filled in.
template <u32 POINTERS>
class ListEntry {
 public:
  ListEntry(List<POINTERS> *list, i64 i) : list_(list), i_(i) {
    list_->n[i] = list_->kind[i] = 0;
    for (u32 k = 0; k < POINTERS; k++) list_->p[i][k] = nullptr;
  }
  i64 place() const { return list_->base + i_; }  // in the list of the caller
  void elements(i64 n) { list_->n[i_] = n; }
  void pointer(u32 k, const void *p, Dtype dtype) {
    list_->p[i_][k] = static_cast<u8 *>(const_cast<void *>(p));
    list_->kind[i_] |= i64(dtype) << (4 * k) | i64(aligned(16, p)) << (32 + k);
  }
  void tensor(u32 k, const DLTensor *t) { pointer(k, data<u8>(t), dtype_of(t)); }

 private:
  List<POINTERS> *list_;
  i64 i_;
};

// Tensors in one launch, where the device bounds how many a launch can name; six may be named beside the list.
template <class Device, class Lists, class = void>
constexpr i64 list_capacity = Lists::capacity;
template <class Device, class Lists>
constexpr i64 list_capacity<Device, Lists, std::void_t<decltype(Device::tensors)>> =
    (Device::tensors - 6) / Lists::pointers < Lists::capacity ? (Device::tensors - 6) / Lists::pointers
                                                              : i64(Lists::capacity);

// K over `count` tensors; `args` is all but K::Args::list. `fill` is given a ListEntry, sets it, and returns how many
// groups work on it: with 0 the tensor is passed over.
template <class Device, class K, class Fill>
pb_status launch_list(pb_context *ctx, i64 count, typename K::Args args, const Fill &fill) {
  typedef decltype(args.list) Lists;
  Lists &list = args.list;
  for (list.base = 0; list.base < count; list.base += list.count) {
    const i64 left = count - list.base, capacity = list_capacity<Device, Lists>;
    list.count = left < capacity ? left : capacity;
    i64 groups = 0;
    for (i64 i = 0; i < list.count; i++) {
      list.first_group[i] = groups;
      groups += fill(ListEntry<Lists::pointers>(&list, i));
    }
    PB_TRY(Device::template launch<K>(ctx, groups, K::group_max, args));
  }
  return PB_OK;
}

}  // namespace launch
}  // namespace pb
#endif
