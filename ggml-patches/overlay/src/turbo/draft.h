#pragma once

// llama_context_params::ctx_other of a draft's context that is made without that of its target: to measure its memory (--fit), and in
// llama-speculative. It is never looked into. The check of a context (check.h) takes it out, so that upstream does not see it.
//
// This file is included within a function (common/turbo-draft.inc).
#define LLAMA_TURBO_DRAFT (reinterpret_cast<llama_context *>(~(size_t) 0))

// Contexts that this thread makes from now on verify drafts of at most so many tokens. 0, the default: none.
void llama_turbo_expect_drafts(unsigned n_tokens);
