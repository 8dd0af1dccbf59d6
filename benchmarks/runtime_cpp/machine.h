// SPDX-License-Identifier: Apache-2.0
// What a report says about where it was measured.
#ifndef XSHARE_BENCH_MACHINE_H
#define XSHARE_BENCH_MACHINE_H

#include <string>

std::string processor();
int cores();
std::string utc_time();

// Of the checkout that this was built from, with + where files differ from it; empty where git cannot say.
std::string git_commit();

#endif  // XSHARE_BENCH_MACHINE_H
