/* A driver for tests: device memory is memory of the process, kernels do nothing, and every call is written down in the
 * file that FAKE_CUDA_LOG names. Further variables make it another machine: FAKE_CUDA_INIT is what cuInit returns,
 * FAKE_CUDA_CAPABILITY two digits, FAKE_CUDA_FREE the bytes that are free, FAKE_CUDA_LOST the launch of a process at which
 * the device is lost. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef int R;
typedef unsigned long long P;

static void note(const char *name, unsigned long long number) {
  const char *path = getenv("FAKE_CUDA_LOG");
  FILE *f = path ? fopen(path, "a") : 0;
  if (!f) return;
  fprintf(f, "%s %llu\n", name, number);
  fclose(f);
}

static long variable(const char *name, long usual) {
  const char *text = getenv(name);
  return text ? atol(text) : usual;
}

R cuInit(unsigned flags) { (void)flags; return (R)variable("FAKE_CUDA_INIT", 0); }
R cuDriverGetVersion(int *v) { *v = 13000; return 0; }
R cuDeviceGetCount(int *n) { *n = 1; return 0; }
R cuDeviceGet(int *d, int i) { *d = i; return 0; }
R cuDeviceGetName(char *name, int len, int d) { (void)d; strncpy(name, "Fake GPU", (size_t)len); return 0; }
R cuDeviceGetAttribute(int *v, int which, int d) {
  (void)d;
  long capability = variable("FAKE_CUDA_CAPABILITY", 90);
  *v = which == 75 ? (int)(capability / 10) : which == 76 ? (int)(capability % 10) : which == 16 ? 132 : 0;
  return 0;
}
R cuDevicePrimaryCtxRetain(void **c, int d) { (void)d; *c = malloc(1); note("context", 1); return 0; }
R cuDevicePrimaryCtxRelease_v2(int d) { (void)d; note("release", 1); return 0; }
R cuCtxSetCurrent(void *c) { (void)c; return 0; }
R cuMemGetInfo_v2(size_t *free, size_t *total) {
  *free = (size_t)variable("FAKE_CUDA_FREE", 1L << 30);
  *total = 1UL << 30;
  return 0;
}
R cuMemAlloc_v2(P *at, size_t bytes) { *at = (P)(size_t)calloc(1, bytes); note("alloc", bytes); return *at ? 0 : 2; }
R cuMemFree_v2(P at) { free((void *)(size_t)at); note("free", 1); return 0; }
R cuMemHostAlloc(void **at, size_t bytes, unsigned flags) {
  (void)flags;
  *at = malloc(bytes);
  note("pin", bytes);
  return *at ? 0 : 2;
}
R cuMemFreeHost(void *at) { free(at); note("unpin", 1); return 0; }
R cuMemcpyHtoDAsync_v2(P to, const void *from, size_t bytes, void *s) {
  (void)s;
  memcpy((void *)(size_t)to, from, bytes);
  note("upload", bytes);
  return 0;
}
R cuMemcpyDtoHAsync_v2(void *to, P from, size_t bytes, void *s) {
  (void)s;
  memcpy(to, (void *)(size_t)from, bytes);
  note("download", bytes);
  return 0;
}
R cuMemsetD8Async(P at, unsigned char byte, size_t bytes, void *s) {
  (void)s;
  memset((void *)(size_t)at, byte, bytes);
  return 0;
}
R cuStreamCreate(void **s, unsigned flags) { *s = malloc(1); note("stream", flags); return 0; }
R cuStreamDestroy_v2(void *s) { free(s); note("destroy-stream", 1); return 0; }
R cuStreamSynchronize(void *s) { (void)s; return 0; }
R cuStreamBeginCapture_v2(void *s, int mode) { (void)s; (void)mode; note("capture", 1); return 0; }
R cuStreamEndCapture(void *s, void **graph) { (void)s; *graph = malloc(1); note("captured", 1); return 0; }
R cuEventCreate(void **e, unsigned flags) { *e = malloc(1); note("event", flags); return 0; }
R cuEventRecord(void *e, void *s) { (void)e; (void)s; return 0; }
R cuEventSynchronize(void *e) { (void)e; return 0; }
R cuEventDestroy_v2(void *e) { free(e); note("destroy-event", 1); return 0; }
R cuModuleLoadData(void **m, const void *image) { (void)image; *m = malloc(1); note("module", 1); return 0; }
R cuModuleUnload(void *m) { free(m); note("unload", 1); return 0; }
R cuModuleGetFunction(void **f, void *m, const char *name) { (void)name; *f = m; return 0; }
R cuFuncSetAttribute(void *f, int which, int value) { (void)f; note("shared", which == 8 ? (P)value : 0); return 0; }
R cuLaunchKernel(void *f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                 void *s, void **args, void **extra) {
  static long launches;
  (void)f; (void)by; (void)bz; (void)shared; (void)s; (void)args; (void)extra;
  note("launch", (P)gx * gy * gz * bx);
  if (++launches == variable("FAKE_CUDA_LOST", 0)) return 700;
  return gx && gy && gz == 1 && bx && bx <= 1024 && args[0] ? 0 : 1;
}
R cuGraphInstantiateWithFlags(void **e, void *g, P flags) { (void)g; (void)flags; *e = malloc(1); note("graph", 1); return 0; }
R cuGraphLaunch(void *e, void *s) { (void)e; (void)s; note("replay", 1); return 0; }
R cuGraphExecDestroy(void *e) { free(e); note("destroy-graph", 1); return 0; }
R cuGraphDestroy(void *g) { free(g); return 0; }
