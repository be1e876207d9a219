// Every entry point, for DPC++ (compile.cpp).
#include "../../core/kernels/sycl.h"

#define PB_TILES pb::SyclTiles
#define PB_WIDE_TILES
#define PB_ENTRY PB_SYCL_ENTRY
#include "../../core/kernels/entries.def"
