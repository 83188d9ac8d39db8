/* SPDX-License-Identifier: Apache-2.0
 *
 * Kernels of PixelWizard Runtime, compiled ahead of time. The CUDA driver is opened when it is first
 * needed, so that the library loads on a machine without one.
 *
 * Functions that can fail return a pw_status and write one line of text into `message`.
 */
#ifndef PW_KERNELS_H
#define PW_KERNELS_H

#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
  PW_OK = 0,
  PW_NO_DRIVER = 1,    /* no CUDA driver on this machine, or one that lacks a function we need */
  PW_DRIVER_ERROR = 2, /* a call of the driver failed */
  PW_BAD_ARGUMENT = 3
} pw_status;

typedef struct {
  const char *key;        /* the variant: kernel, types of its arguments, constants, warps */
  const char *entry;      /* name of the function in the cubin */
  const char *parameters; /* a letter each: p pointer, i int32, l int64, f float */
  int arch;               /* 90 for sm_90a and so on */
  int num_warps;          /* per block, to launch with */
  int registers;          /* per thread */
  int stack_bytes;        /* per thread: spilled registers */
  int shared_bytes;       /* dynamic shared memory per block */
  int scratch_bytes;      /* global memory per block, for descriptors made on the GPU */
} pw_kernel;

int pw_kernels_count(void);
const pw_kernel *pw_kernels_get(int index);           /* NULL if out of range */
int pw_kernels_find(const char *key, int arch);       /* its index, -1 if not found */
const char *pw_kernels_manifest(void);                /* JSON: versions, toolchains, digest of the sources, kernels */

/* PW_OK if there is a CUDA driver. */
pw_status pw_kernels_driver(char *message, size_t size);

/* Load a kernel into the current CUDA context before its first launch. */
pw_status pw_kernels_load(int index, char *message, size_t size);

/* Launch a kernel of the current CUDA context on `stream`.
 *
 * grid: blocks along three axes.
 * arguments: addresses of the parameters' values, as for cuLaunchKernel.
 * scratch: device memory, scratch_bytes per block, or 0 if the kernel needs none.
 */
pw_status pw_kernels_launch(int index, void *stream, const unsigned grid[3], void *const *arguments,
                            unsigned long long scratch, char *message, size_t size);

#ifdef __cplusplus
}
#endif
#endif
