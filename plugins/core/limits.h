// SPDX-License-Identifier: Apache-2.0
// Sizes that every implementation can rely on.
#ifndef XSHARE_CORE_LIMITS_H
#define XSHARE_CORE_LIMITS_H

namespace xshare {

constexpr int kMaxExperts = 512;
constexpr int kMaxTopK = 16;
// A utility is at most 1, so a column sum is at most 2^20 * 2^20 = 2^40: room for the expert id beside it
// (ordering.h).
constexpr int kMaxTokens = 1 << 20;
constexpr int kWorkspaceAlignment = 64;  // bytes

}  // namespace xshare

#endif  // XSHARE_CORE_LIMITS_H
