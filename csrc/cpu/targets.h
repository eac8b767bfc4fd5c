// Which instruction sets this binary has kernels for, which of them this CPU can run, and which one is in use.
#pragma once

#include <string>
#include <vector>

#include "linear.h"

namespace mxq {

// Names that can be used here, slowest first; always begins with "scalar".
std::vector<std::string> usable_targets();
// Throws std::invalid_argument with the usable ones if `name` is none of them.
void set_target(const std::string& name);
// The fastest usable one unless set_target() was called.
const Target& current_target();

}  // namespace mxq
