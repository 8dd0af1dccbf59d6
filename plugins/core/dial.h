// SPDX-License-Identifier: Apache-2.0
// What a dial says, whatever it holds.
#ifndef XSHARE_CORE_DIAL_H
#define XSHARE_CORE_DIAL_H

#include "core/platform.h"
#include "xshare/xshare.h"

namespace xshare {

XSHARE_FN int dialled_budget(const xshare_route_params& p, const xshare_dial& dial) {
    return dial.budget > p.top_k ? dial.budget : p.top_k;
}

XSHARE_FN double dialled_coverage(const xshare_dial& dial) {
    return dial.coverage > 0.0 ? (dial.coverage < 1.0 ? dial.coverage : 1.0) : 0.0;
}

}  // namespace xshare

#endif  // XSHARE_CORE_DIAL_H
