// SPDX-License-Identifier: Apache-2.0
// What ends a run: each is one line on standard error and an exit code.
#ifndef XSHARE_BENCH_ERROR_H
#define XSHARE_BENCH_ERROR_H

#include <stdexcept>

// Something is missing or failed: exit code 1.
struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// The command line asks for something that cannot be: exit code 2.
struct UsageError : Error {
    using Error::Error;
};

#endif  // XSHARE_BENCH_ERROR_H
