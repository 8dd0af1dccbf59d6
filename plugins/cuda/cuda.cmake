# SPDX-License-Identifier: Apache-2.0
# libxshare_cuda.so: libxshare.so and the device functions in one library, the CUDA runtime linked statically.
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  message(WARNING "XSHARE_CUDA is on, but there is no nvcc: set CUDACXX to build libxshare_cuda.so")
  return()
endif()
include(cuda/architectures.cmake)
if(NOT CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES ${XSHARE_DEFAULT_ARCHITECTURES})
endif()
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)

add_library(xshare_cuda SHARED cuda/api.cpp cuda/route.cpp $<TARGET_PROPERTY:xshare,SOURCES>)
target_include_directories(xshare_cuda PRIVATE . PUBLIC include)
list(JOIN CMAKE_CUDA_ARCHITECTURES " " XSHARE_ARCHITECTURES)
target_compile_definitions(xshare_cuda PRIVATE
  $<TARGET_PROPERTY:xshare,COMPILE_DEFINITIONS> "XSHARE_ARCHITECTURES=\"${XSHARE_ARCHITECTURES}\"")
target_link_libraries(xshare_cuda PRIVATE CUDA::cudart_static $<TARGET_PROPERTY:xshare,LINK_LIBRARIES>)
target_link_options(xshare_cuda PRIVATE $<TARGET_PROPERTY:xshare,LINK_OPTIONS> -Wl,--exclude-libs,ALL)

foreach(experts IN ITEMS 1 2 4 8 12 16)  # kExpertsPerLane in cuda/plan.h
  add_library(xshare_kernels_${experts} OBJECT cuda/kernels.cu)
  target_include_directories(xshare_kernels_${experts} PRIVATE . include)
  target_compile_definitions(xshare_kernels_${experts} PRIVATE XSHARE_EXPERTS_PER_LANE=${experts})
  target_compile_options(xshare_kernels_${experts} PRIVATE
    --fmad=false -Werror=all-warnings -Xptxas=-v -Xfatbin=-compress-all -Xcompiler=-Wall,-Wextra,-ffp-contract=off)
  target_link_libraries(xshare_cuda PRIVATE xshare_kernels_${experts})
endforeach()
