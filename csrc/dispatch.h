// Chooses the kernels that run on this processor.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace topk {

// The targets that were compiled and that this processor can run, best first.
std::vector<std::string> available_targets();

// The kernels of a target by name; the best ones if the name is empty, null if there are none of that name.
const Kernels* kernels_of(const std::string& target);

}  // namespace topk
