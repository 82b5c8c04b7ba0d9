/* NVIDIA's library of products for tests: it describes and chooses products, multiplies nothing, and refuses what is described
 * in another way than its header has it. */
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

typedef int R;
typedef void *H;

size_t cublasLtGetVersion(void) { return 130100; }
R cublasLtCreate(H *h) { *h = malloc(1); return *h ? 0 : 3; }
R cublasLtDestroy(H h) { free(h); return 0; }
R cublasLtMatmulDescCreate(H *d, int compute, int factor) {
  *d = malloc(1);
  return (compute == 68 && factor == 0) || (compute == 72 && factor == 10) ? 0 : 7;
}
R cublasLtMatmulDescSetAttribute(H d, int which, const void *value, size_t bytes) {
  (void)d;
  switch (which) {
    case 3: return bytes == 4 && *(const int *)value == 1 ? 0 : 7;
    case 17: case 18: return bytes == 8 && *(void *const *)value ? 0 : 7;
    case 25: return bytes == 1 ? 0 : 7;
    default: return 7;
  }
}
R cublasLtMatmulDescDestroy(H d) { free(d); return 0; }
R cublasLtMatrixLayoutCreate(H *l, int type, uint64_t rows, uint64_t columns, int64_t ld) {
  (void)type;
  *l = malloc(1);
  return rows && columns && ld == (int64_t)rows ? 0 : 7;
}
R cublasLtMatrixLayoutDestroy(H l) { free(l); return 0; }
R cublasLtMatmulPreferenceCreate(H *p) { *p = malloc(1); return 0; }
R cublasLtMatmulPreferenceSetAttribute(H p, int which, const void *value, size_t bytes) {
  (void)p;
  return which == 1 && bytes == 8 && *(const uint64_t *)value ? 0 : 7;
}
R cublasLtMatmulPreferenceDestroy(H p) { free(p); return 0; }

struct choice { uint64_t algorithm[8]; size_t workspace; R state; float waves; int reserved[4]; };

R cublasLtMatmulAlgoGetHeuristic(H h, H desc, H a, H b, H c, H d, H preference, int asked, struct choice *to, int *count) {
  if (!h || !desc || !a || !b || !c || !d || !preference || asked != 1) return 7;
  to->algorithm[0] = 42;
  *count = 1;
  return 0;
}
R cublasLtMatmul(H h, H desc, const void *alpha, const void *a, H la, const void *b, H lb, const void *beta, const void *c,
                 H lc, void *d, H ld, const uint64_t *algorithm, void *workspace, size_t bytes, void *stream) {
  int pointers = h && desc && alpha && a && la && b && lb && beta && lc && d && ld && c == d && stream;
  return pointers && *algorithm == 42 && workspace && bytes ? 0 : 7;
}
