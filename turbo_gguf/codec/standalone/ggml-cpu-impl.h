#pragma once

// Stands in for upstream's header of the same name: see ggml.h.

#include "ggml-impl.h"
