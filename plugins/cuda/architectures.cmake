# SPDX-License-Identifier: Apache-2.0
# What the kernels are built for: the one list. Nothing in them needs an "a" (90a, 100a).
set(XSHARE_ALL_ARCHITECTURES 80 86 87 89 90 100 103 110 120 121)
# A100; H100, H200; B200; RTX Blackwell. What is newer or between runs code of its family or makes its own of the PTX.
set(XSHARE_DEFAULT_ARCHITECTURES 80-real 90-real 100-real 120-real 90-virtual)
