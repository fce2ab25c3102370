#pragma once

#include "llama.h"

struct llama_model;

// Called before a context is made. Reads the settings (settings.h) and hands them to the caches of this context, switches flash attention on
// where its cache types need it, calibrates the model where nobody has done so yet, and refuses what can't work, with the reason in the log.
// False: the context must not be made.
bool llama_turbo_check_context(llama_model & model, llama_context_params & params);
