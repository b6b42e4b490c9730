// Which kernels run on this processor.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace topk {

// The targets that were compiled and that this processor can run, best first.
std::vector<std::string> available_targets();

// The kernels of a target by name; of the best where the name is empty, null where there are none by that name.
const Kernels* kernels_of(const std::string& target);

}  // namespace topk
