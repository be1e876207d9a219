// All kernels.
#ifndef PB_KERNELS_KERNELS_H
#define PB_KERNELS_KERNELS_H

#include "blockwise.h"
#include "copy.h"
#include "gather.h"
#include "gemv.h"
#include "int8.h"
#include "kbit.h"
#include "multi.h"
#include "optim.h"

#endif
