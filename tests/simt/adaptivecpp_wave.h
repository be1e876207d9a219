// The wave of AdaptiveCpp on a CPU, whose sub-groups have one lane: PB_SUB_GROUP work-items that exchange words through
// the memory of the group. Every thread of the group has to come to a shuffle, not only those of the wave.
struct Wave {
  sycl::nd_item<1> item;
  u32 *exchange;  // a word for each thread of the group
  u32 tid() const { return u32(item.get_local_linear_id()); }
  u32 group() const { return u32(item.get_group(0)); }
  u32 group_dim() const { return u32(item.get_local_range(0)); }
  u32 lane() const { return tid() % width(); }
  u32 width() const { return PB_SUB_GROUP; }
  void barrier() const { sycl::group_barrier(item.get_group()); }
  u32 shuffle_xor(u32 value, u32 mask) const { return shuffle(value, lane() ^ mask); }
  u32 shuffle(u32 value, u32 source) const {
    exchange[tid()] = value;
    barrier();
    const u32 result = exchange[tid() - lane() + source];
    barrier();
    return result;
  }
};
