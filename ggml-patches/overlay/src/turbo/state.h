#pragma once

#include <cstdint>
#include <utility>
#include <vector>

class llama_io_read_i;
class llama_io_write_i;
class llama_kv_cache;

// What a state has of ours, in front of v_trans, the first of the numbers that upstream writes before K and V:
//
//   "TSIZ"                      upstream's numbers include the sizes of rotations; only where they do, and for caches of ours only
//   "TCAL", digest              of the calibration
//   "TXEC", copies              of exact tokens, see exact.h
//
// v_trans itself is 0 or 1. A cache of ours has a turbo type, a calibration or copies. So a state that a build on another upstream has saved is
// refused with the reason wherever the layouts differ, and never misread. States without a turbo type stay those of upstream.
//
// Unmarked states, of upstream's types, are left to upstream. Where one with sizes is read without, the size of K's group stands in the place of
// its type, and 64 is the number of turbo2. It is refused even then, since the row size that follows has K's type in its upper half.

//   ranges: of cells, pairs of begin and end
void llama_turbo_write_state(const llama_kv_cache &                             kv,
                             llama_io_write_i &                                 io,
                             uint32_t                                           stream,
                             const std::vector<std::pair<uint32_t, uint32_t>> & ranges);

// Reads all of it and then v_trans, which upstream has read already: the first word. False, with the reason in the log: the state was saved
// with another layout, with another calibration, or with none, or its copies are damaged. Copies are taken where there is room for them.
//   cells: that the state goes to
bool llama_turbo_read_state(const llama_kv_cache &        kv,
                            llama_io_read_i &             io,
                            uint32_t                      stream,
                            const std::vector<uint32_t> & cells,
                            uint32_t &                    v_trans);
