// All kernels of one CPU target.
#pragma once

#include "attention.h"
#include "feed_forward.h"

namespace topk {

struct Kernels {
  const char* target;
  AttentionKernels attention;
  FeedForwardKernels feed_forward;
};

}  // namespace topk
