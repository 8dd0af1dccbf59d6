// SPDX-License-Identifier: Apache-2.0
// Where things lie in the workspace of a call with many rows. Its first cleared_size() bytes are set to 0
// before the first kernel; the rest is written before it is read.
#ifndef XSHARE_CUDA_WORKSPACE_H
#define XSHARE_CUDA_WORKSPACE_H

#include <stddef.h>

#include "cuda/args.h"

namespace xshare {

// What rows take: by the warm-up, as exempt rows, by their own choice, and at the end. Laid out as in
// row.cuh.
struct Sets {
    uint32_t warmup[32], exempt[32], before[32], after[32];
};
constexpr int kSetWords = sizeof(Sets) / 4;
constexpr int kWordsBeforeRefining = kSetWords - 32;  // stage 5 writes `after`

XSHARE_METHOD uint32_t* words_of(Sets& sets) { return sets.warmup; }
XSHARE_METHOD const uint32_t* words_of(const Sets& sets) { return sets.warmup; }

struct Totals {
    uint64_t sums[kMaxExperts], proposed[kMaxExperts];  // laid out as in row.cuh
    Sets sets;
    uint32_t active[32];
    uint32_t num_real_rows, num_placed_rows, num_requests, num_long_requests, warmup_overflow;
};

// A request with more rows than this is summed up by several blocks.
#if defined(XSHARE_CHUNK_ROWS)  // fewer, for tests
constexpr int kChunkRows = XSHARE_CHUNK_ROWS;
#else
constexpr int kChunkRows = 256;
#endif

// The column sums of one such request.
struct RequestSums {
    uint64_t sums[kMaxExperts];  // laid out as in row.cuh
};

// Of an open hash table.
struct Slot {
    uint32_t request;  // id + 1; 0 = empty
    uint32_t num_rows;
};

// Used by the host for the sizes and by every kernel for the addresses.
class Workspace {
  public:
    Totals* totals = nullptr;
    Slot* slots = nullptr;                 // [num_slots]
    RequestSums* long_requests = nullptr;  // [T / kChunkRows]
    uint32_t* first_of_slot = nullptr;     // [num_slots] the request's first place in rows_by_request
    uint32_t* sums_of_slot = nullptr;      // [num_slots] the place in long_requests, of a long one
    int32_t* slot_of_request = nullptr;    // [T]
    int32_t* slot_of_row = nullptr;        // [T], -1 = takes no part
    uint32_t* place_in_request = nullptr;  // [T]
    int32_t* rows_by_request = nullptr;    // [T]
    uint32_t num_slots = 0;                // a power of two, at most half of it taken
    int hash_shift = 32;

    XSHARE_METHOD explicit Workspace(const RouteArgs& args) : base_(args.workspace) {
        take(totals, 1);
        cleared_ = used_;
        if (args.p.request_budget == 0) return;
        const uint32_t rows = static_cast<uint32_t>(args.p.num_tokens);
        for (num_slots = 1; num_slots < 2 * rows; num_slots *= 2) --hash_shift;
        take(slots, num_slots);
        take(long_requests, rows / kChunkRows);
        cleared_ = used_;
        take(first_of_slot, num_slots);
        take(sums_of_slot, num_slots);
        take(slot_of_request, rows);
        take(slot_of_row, rows);
        take(place_in_request, rows);
        take(rows_by_request, rows);
    }

    XSHARE_METHOD size_t size() const { return used_; }
    XSHARE_METHOD size_t cleared_size() const { return cleared_; }

  private:
    template <typename Type>
    XSHARE_METHOD void take(Type*& array, size_t count) {
        if (base_ != nullptr) array = reinterpret_cast<Type*>(base_ + used_);
        used_ = (used_ + count * sizeof(Type) + kWorkspaceAlignment - 1) / kWorkspaceAlignment *
                kWorkspaceAlignment;
    }

    unsigned char* base_;
    size_t used_ = 0, cleared_ = 0;
};

}  // namespace xshare

#endif  // XSHARE_CUDA_WORKSPACE_H
