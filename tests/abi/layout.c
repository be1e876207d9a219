/* The header is plain C11, and every argument struct is an array of eight-byte slots. Prints what Python compares. */
#include <inttypes.h>
#include <stddef.h>
#include <stdio.h>

#include "polybit.h"

#define PB_IN(name) +1
#define PB_OPT(name) +1
#define PB_OUT(name) +1
#define PB_MUT(name) +1
#define PB_INS(name) +1
#define PB_MUTS(name) +1
#define PB_INT(name) +1
#define PB_FLOAT(name) +1
#define PB_DTYPE(name)
#define PB_SHAPE(name)
#define PB_OP(name, arguments) _Static_assert(sizeof(pb_##name##_args) == 8 * (0 arguments), #name);
#include "ops.def"
#undef PB_OP

_Static_assert(offsetof(pb_backend, probe) == 32, "the head of a backend: abi, size, name, device_type");
_Static_assert(sizeof(pb_context) == 88, "the context has eleven fields of eight bytes");

int main(void) {
  printf("abi %016" PRIx64 "\n", (uint64_t)PB_ABI);
#define PB_OP(name, arguments) printf("%s %d %zu\n", #name, 0 arguments, offsetof(pb_backend, name));
#include "ops.def"
  return 0;
}
