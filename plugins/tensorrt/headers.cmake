# SPDX-License-Identifier: Apache-2.0
# Sets XSHARE_TENSORRT_INCLUDE to the folder of NvInfer.h and says where it came from. In order: TENSORRT_ROOT (a CMake or
# an environment variable), the usual system places, and the PyPI package kernel-lens (2.0.1), which carries NVIDIA's
# headers of TensorRT 10.14:  pip install --no-deps kernel-lens==2.0.1
unset(XSHARE_TENSORRT_INCLUDE CACHE) # a second configuration looks again, and says again where it found them
set(XSHARE_TENSORRT_ROOTS ${TENSORRT_ROOT} $ENV{TENSORRT_ROOT})
find_path(XSHARE_TENSORRT_INCLUDE NvInferRuntime.h PATHS ${XSHARE_TENSORRT_ROOTS}
          PATH_SUFFIXES include include/${CMAKE_LIBRARY_ARCHITECTURE} NO_DEFAULT_PATH)
set(XSHARE_TENSORRT_FOUND_IN "TENSORRT_ROOT")

if(NOT XSHARE_TENSORRT_INCLUDE)
  find_path(XSHARE_TENSORRT_INCLUDE NvInferRuntime.h PATHS /usr/local/tensorrt /opt/tensorrt PATH_SUFFIXES include)
  set(XSHARE_TENSORRT_FOUND_IN "the system")
endif()

if(NOT XSHARE_TENSORRT_INCLUDE)
  find_package(Python3 COMPONENTS Interpreter QUIET)
  if(Python3_EXECUTABLE)
    execute_process(
      COMMAND "${Python3_EXECUTABLE}" -c
              "import importlib.util as u; print(u.find_spec('kernel_lens').submodule_search_locations[0])"
      OUTPUT_VARIABLE XSHARE_KERNEL_LENS ERROR_QUIET OUTPUT_STRIP_TRAILING_WHITESPACE)
  endif()
  if(XSHARE_KERNEL_LENS)
    find_path(XSHARE_TENSORRT_INCLUDE NvInferRuntime.h PATHS "${XSHARE_KERNEL_LENS}/include/tensorrt" NO_DEFAULT_PATH)
  endif()
  set(XSHARE_TENSORRT_FOUND_IN "the Python package kernel-lens")
endif()

if(NOT XSHARE_TENSORRT_INCLUDE)
  message(FATAL_ERROR "No TensorRT headers: set TENSORRT_ROOT to a TensorRT folder, install its development package, "
                      "or run: pip install --no-deps kernel-lens==2.0.1")
endif()

# Newer headers define NV_TENSORRT_MAJOR through TRT_MAJOR_ENTERPRISE.
file(STRINGS "${XSHARE_TENSORRT_INCLUDE}/NvInferVersion.h" XSHARE_TENSORRT_LINES REGEX "M(AJOR|INOR)[A-Z_]* [0-9]+")
foreach(part MAJOR MINOR)
  string(REGEX MATCH "(NV_TENSORRT|TRT)_${part}[A-Z_]* ([0-9]+)" XSHARE_IGNORED "${XSHARE_TENSORRT_LINES}")
  set(XSHARE_TENSORRT_${part} "${CMAKE_MATCH_2}")
endforeach()
if(NOT XSHARE_TENSORRT_MAJOR GREATER_EQUAL 10)
  message(FATAL_ERROR "TensorRT 10 or newer is needed, but ${XSHARE_TENSORRT_INCLUDE} has ${XSHARE_TENSORRT_MAJOR}")
endif()
message(STATUS "TensorRT ${XSHARE_TENSORRT_MAJOR}.${XSHARE_TENSORRT_MINOR} headers from ${XSHARE_TENSORRT_FOUND_IN}: "
               "${XSHARE_TENSORRT_INCLUDE}")
