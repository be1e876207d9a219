// One sample on one backend.
#pragma once
#include <string>
#include <vector>

#include "registry.h"
#include "samples.h"

// The sample's problem in words; empty if there is none. `backend`, one of `backends`, has the sample's op.
std::string check(const std::vector<pb::Backend> &backends, size_t backend, const Sample &sample, bool &unsupported);
