/* A compiler for tests: machine code is four bytes, whatever the text is. */
#include <stdlib.h>
#include <string.h>

typedef int R;

R nvrtcVersion(int *major, int *minor) { *major = 13; *minor = 0; return 0; }
R nvrtcCreateProgram(void **p, const char *text, const char *name, int n, const char *const *h, const char *const *i) {
  (void)name; (void)n; (void)h; (void)i;
  *p = malloc(1);
  return strstr(text, "__global__") ? 0 : 6;
}
R nvrtcCompileProgram(void *p, int n, const char *const *options) {
  (void)p;
  return n > 0 && !strncmp(options[0], "--gpu-architecture=sm_", 22) ? 0 : 5;
}
R nvrtcGetProgramLogSize(void *p, size_t *size) { (void)p; *size = 1; return 0; }
R nvrtcGetProgramLog(void *p, char *log) { (void)p; *log = 0; return 0; }
R nvrtcGetCUBINSize(void *p, size_t *size) { (void)p; *size = 4; return 0; }
R nvrtcGetCUBIN(void *p, char *code) { (void)p; memcpy(code, "code", 4); return 0; }
R nvrtcDestroyProgram(void **p) { free(*p); return 0; }
