// Causal attention in bfloat16 for CPUs with AVX512-BF16. Called and described by fused.py beside it.
//
// A job is one block of queries of all heads that share keys: its rows meet the keys up to its end, 512 at a time, with
// the running maximum and sum of FlashAttention (arXiv 2205.14135). Keys and values are packed once, in the pairs that
// the instruction multiplies.
#include <immintrin.h>
#include <omp.h>
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

using bf16 = uint16_t;
constexpr int kLanes = 16;                 // floats of a register
constexpr int kRows = 6;                   // rows of a tile: 6 x 4 accumulators, 4 operands, 1 broadcast
constexpr int kPanel = 64;                 // keys of a packed panel: 4 registers
constexpr int64_t kKeys = 512;             // keys between two looks at the maximum

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// e^x for x <= 0; degree 5 on [-ln2/2, ln2/2]: 2e-7 relative. NaN stays NaN.
inline __m512 exp_nonpositive(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-87.0f), x);
  const __m512 t = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f));
  const __m512 n = _mm512_roundscale_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 f = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  f = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), f);
  __m512 p = _mm512_set1_ps(8.3333337e-3f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(4.1666668e-2f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.6666667e-1f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.5f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(p, n);
}

// out[6][16 NV] = scale_r * out + a[6][2 pairs] . b[pairs][16 NV][2]
template <int NV, bool kAccumulate>
inline void tile(const bf16* a, int64_t lda, const bf16* b, int64_t ldb, int64_t pairs, float* out, int64_t ldo,
                 const float* scale) {
  __m512 acc[kRows][NV];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v)
      acc[r][v] = kAccumulate ? _mm512_mul_ps(_mm512_loadu_ps(out + r * ldo + v * kLanes), _mm512_set1_ps(scale[r]))
                              : _mm512_setzero_ps();
  for (int64_t p = 0; p < pairs; ++p) {
    __m512bh bv[NV];
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) bv[v] = (__m512bh)_mm512_loadu_si512(b + p * ldb + v * 2 * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      int32_t pair;
      std::memcpy(&pair, a + r * lda + 2 * p, 4);
      const __m512bh av = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 8
      for (int v = 0; v < NV; ++v) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], av, bv[v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < NV; ++v) _mm512_storeu_ps(out + r * ldo + v * kLanes, acc[r][v]);
}

template <bool kAccumulate>
inline void tile_columns(int nv, const bf16* a, int64_t lda, const bf16* b, int64_t ldb, int64_t pairs, float* out,
                         int64_t ldo, const float* scale) {
  switch (nv) {
    case 4: tile<4, kAccumulate>(a, lda, b, ldb, pairs, out, ldo, scale); break;
    case 3: tile<3, kAccumulate>(a, lda, b, ldb, pairs, out, ldo, scale); break;
    case 2: tile<2, kAccumulate>(a, lda, b, ldb, pairs, out, ldo, scale); break;
    default: tile<1, kAccumulate>(a, lda, b, ldb, pairs, out, ldo, scale);
  }
}

// One row's new keys: weights e^(scale (s - max)), zero beyond `seen`, as bfloat16; returns what the old sums shrink by.
inline float weigh(const float* scores, bf16* weights, int64_t seen, int64_t width, float scale, float& maximum,
                   float& sum) {
  __m512 top = _mm512_set1_ps(-INFINITY);
  int64_t i = 0;
  for (; i + kLanes <= seen; i += kLanes) top = _mm512_max_ps(top, _mm512_loadu_ps(scores + i));
  const __mmask16 rest = seen > i ? (__mmask16)((1u << (seen - i)) - 1) : 0;
  if (rest) top = _mm512_mask_max_ps(top, rest, top, _mm512_maskz_loadu_ps(rest, scores + i));
  const float now = std::max(maximum, scale * _mm512_reduce_max_ps(top));
  const __m512 factor = _mm512_set1_ps(scale), shift = _mm512_set1_ps(now);
  __m512 total = _mm512_setzero_ps();
  for (i = 0; i + kLanes <= seen; i += kLanes) {
    const __m512 e = exp_nonpositive(_mm512_fmsub_ps(_mm512_loadu_ps(scores + i), factor, shift));
    total = _mm512_add_ps(total, e);
    _mm256_storeu_si256((__m256i*)(weights + i), (__m256i)_mm512_cvtneps_pbh(e));
  }
  if (rest) {
    const __m512 s = _mm512_maskz_loadu_ps(rest, scores + i);
    const __m512 e = _mm512_maskz_mov_ps(rest, exp_nonpositive(_mm512_fmsub_ps(s, factor, shift)));
    total = _mm512_add_ps(total, e);
    _mm256_storeu_si256((__m256i*)(weights + i), (__m256i)_mm512_cvtneps_pbh(e));
    i += kLanes;
  }
  if (i < width) std::memset(weights + i, 0, (width - i) * sizeof(bf16));
  const float shrink = std::exp(maximum - now);
  sum = sum * shrink + _mm512_reduce_add_ps(total);
  maximum = now;
  return shrink;
}

}  // namespace

namespace {

struct Shape {
  int64_t B, H, KV, T, D, Dv;
  int64_t G() const { return H / KV; }
  int64_t N() const { return B * KV; }
  int64_t keys() const { return round_up(T, kPanel); }
  // Queries of a block: few enough for the rows of many heads to stay in the second cache.
  int64_t C() const { return std::max<int64_t>(8, std::min<int64_t>(64, 256 / G())); }
  int64_t M() const { return round_up(G() * C(), kRows); }
  int64_t packed_bytes() const { return N() * keys() * (D + Dv) * 2; }
  int64_t thread_bytes() const { return round_up(M() * (D * 2 + kKeys * 6 + Dv * 4 + 12), 64); }
};

}  // namespace

extern "C" int64_t attention_scratch(int64_t B, int64_t H, int64_t KV, int64_t T, int64_t D, int64_t Dv,
                                     int64_t threads) {
  const Shape shape{B, H, KV, T, D, Dv};
  return 64 + shape.packed_bytes() + threads * shape.thread_bytes();
}

// q [B,H,T,D], k [B,KV,T,D], v [B,KV,T,Dv] with strides (b, h, t) in elements; out [B,T,H,Dv].
extern "C" void attention(const bf16* q, const int64_t* qs, const bf16* k, const int64_t* ks, const bf16* v,
                          const int64_t* vs, bf16* out, int64_t B, int64_t H, int64_t KV, int64_t T, int64_t D,
                          int64_t Dv, float scale, char* scratch, int64_t threads) {
  const Shape shape{B, H, KV, T, D, Dv};
  const int64_t G = shape.G(), N = shape.N(), keys = shape.keys(), panels = keys / kPanel;
  const int64_t M = shape.M(), C = shape.C(), blocks = (T + C - 1) / C;
  bf16* kp = (bf16*)round_up((int64_t)scratch, 64);  // [N][panel][D/2][64][2]
  bf16* vp = kp + N * keys * D;                      // [N][keys/2][Dv][2]
  char* own = (char*)(vp + N * keys * Dv);
#pragma omp parallel num_threads(threads)
  {
#pragma omp for schedule(static)
    for (int64_t job = 0; job < N * panels; ++job) {
      const int64_t n = job / panels, first = job % panels * kPanel, stop = std::min(first + kPanel, T);
      const bf16* kn = k + n / KV * ks[0] + n % KV * ks[1];
      const bf16* vn = v + n / KV * vs[0] + n % KV * vs[1];
      uint32_t* to = (uint32_t*)(kp + n * keys * D + first * D);
      for (int64_t t = first; t < stop; ++t)
        for (int64_t d = 0; d < D / 2; ++d) std::memcpy(to + d * kPanel + t - first, kn + t * ks[2] + 2 * d, 4);
      for (int64_t t = stop; t < first + kPanel; ++t)
        for (int64_t d = 0; d < D / 2; ++d) to[d * kPanel + t - first] = 0;
      for (int64_t t = first; t < first + kPanel; t += 2) {
        uint32_t* row = (uint32_t*)(vp + n * keys * Dv + t * Dv);
        const bf16* a = vn + t * vs[2];
        const bf16* b = a + vs[2];
        for (int64_t d = 0; d < Dv; ++d)
          row[d] = (t < T ? a[d] : 0) | (uint32_t)(t + 1 < T ? b[d] : 0) << 16;
      }
    }
    char* mine = own + shape.thread_bytes() * omp_get_thread_num();
    float* scores = (float*)mine;            // [M][kKeys]
    float* sums = scores + M * kKeys;        // [M][Dv]
    float* maximum = sums + M * Dv;          // [M], then the weights' sums, then the factors
    float *total = maximum + M, *shrink = total + M;
    bf16* weights = (bf16*)(shrink + M);     // [M][kKeys]
    bf16* rows = weights + M * kKeys;        // [M][D]
#pragma omp for schedule(dynamic)
    for (int64_t job = 0; job < N * blocks; ++job) {
      const int64_t n = job % N, block = blocks - 1 - job / N;
      const int64_t first = block * C, stop = std::min(first + C, T), many = stop - first;
      const int64_t b = n / KV, h0 = n % KV * G, used = round_up(G * many, kRows);
      for (int64_t g = 0; g < G; ++g)
        for (int64_t t = 0; t < many; ++t)
          std::memcpy(rows + (g * many + t) * D, q + b * qs[0] + (h0 + g) * qs[1] + (first + t) * qs[2], D * 2);
      std::memset(rows + G * many * D, 0, (used - G * many) * D * 2);
      std::memset(sums, 0, used * Dv * sizeof(float));
      std::memset(weights + G * many * kKeys, 0, (used - G * many) * kKeys * 2);
      for (int64_t r = 0; r < used; ++r) maximum[r] = -INFINITY, total[r] = 0, shrink[r] = 1;
      for (int64_t from = 0; from < stop; from += kKeys) {
        const int64_t to = std::min(from + kKeys, round_up(stop, kPanel)), width = to - from;
        for (int64_t p = from; p < to; p += kPanel)
          for (int64_t r = 0; r < used; r += kRows)
            tile<4, false>(rows + r * D, D, kp + n * keys * D + p * D, 2 * kPanel, D / 2, scores + r * kKeys + p - from,
                           kKeys, nullptr);
        for (int64_t r = 0; r < G * many; ++r)
          shrink[r] = weigh(scores + r * kKeys, weights + r * kKeys,
                            std::max<int64_t>(0, std::min(width, first + r % many + 1 - from)), width, scale,
                            maximum[r], total[r]);
        for (int64_t d = 0; d < Dv; d += 4 * kLanes)
          for (int64_t r = 0; r < used; r += kRows)
            tile_columns<true>((int)std::min<int64_t>(4, (Dv - d) / kLanes), weights + r * kKeys, kKeys,
                               vp + n * keys * Dv + from * Dv + 2 * d, 2 * Dv, width / 2, sums + r * Dv + d, Dv,
                               shrink + r);
      }
      for (int64_t g = 0; g < G; ++g)
        for (int64_t t = 0; t < many; ++t) {
          const int64_t r = g * many + t;
          const __m512 by = _mm512_set1_ps(1.0f / total[r]);
          bf16* to = out + ((b * T + first + t) * H + h0 + g) * Dv;
          for (int64_t d = 0; d < Dv; d += kLanes)
            _mm256_storeu_si256((__m256i*)(to + d),
                                (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(_mm512_loadu_ps(sums + r * Dv + d), by)));
        }
    }
  }
}
