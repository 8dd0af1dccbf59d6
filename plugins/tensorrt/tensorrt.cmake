# SPDX-License-Identifier: Apache-2.0
# libnvinfer_plugin_xshare.so: the TensorRT plugin with the device functions of libxshare_cuda.so and the CUDA runtime in
# it. It is linked against no TensorRT: it uses the one that loads it.
if(NOT TARGET xshare_cuda)
  message(FATAL_ERROR "XSHARE_TENSORRT needs XSHARE_CUDA=ON and nvcc")
endif()
include(tensorrt/headers.cmake)

set(XSHARE_TENSORRT_EXPORTS ${CMAKE_CURRENT_SOURCE_DIR}/tensorrt/exports.map)
add_library(nvinfer_plugin_xshare SHARED
  tensorrt/fields.cpp tensorrt/library.cpp tensorrt/log.cpp tensorrt/routing_creator.cpp tensorrt/routing_plugin.cpp
  tensorrt/runtime.cpp $<TARGET_PROPERTY:xshare_cuda,SOURCES>)
target_include_directories(nvinfer_plugin_xshare PRIVATE . include)
target_include_directories(nvinfer_plugin_xshare SYSTEM PRIVATE ${XSHARE_TENSORRT_INCLUDE} ${CUDAToolkit_INCLUDE_DIRS})
target_compile_definitions(nvinfer_plugin_xshare PRIVATE $<TARGET_PROPERTY:xshare_cuda,COMPILE_DEFINITIONS>)
# A unique symbol would keep the library in memory when TensorRT unloads it.
target_compile_options(nvinfer_plugin_xshare PRIVATE -fno-gnu-unique)
get_target_property(XSHARE_CUDA_LIBRARIES xshare_cuda LINK_LIBRARIES)  # the kernels and the CUDA runtime
target_link_libraries(nvinfer_plugin_xshare PRIVATE ${XSHARE_CUDA_LIBRARIES} ${CMAKE_DL_LIBS})
target_link_options(nvinfer_plugin_xshare PRIVATE
  $<TARGET_PROPERTY:xshare,LINK_OPTIONS> -Wl,--version-script=${XSHARE_TENSORRT_EXPORTS} -Wl,--exclude-libs,ALL)
set_target_properties(nvinfer_plugin_xshare PROPERTIES LINK_DEPENDS ${XSHARE_TENSORRT_EXPORTS})
