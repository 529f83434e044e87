// What AVX-512 has instructions for: Vec<16>'s masks, powers of two, permutations. Included by vec.h.
#pragma once

#include <immintrin.h>

namespace hetero {

template <>
struct LaneMask<16> {
  __mmask16 bits;
};

HK_INLINE LaneMask<16> operator<(Vec<16> a, Vec<16> b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
HK_INLINE LaneMask<16> operator>(Vec<16> a, Vec<16> b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
HK_INLINE LaneMask<16> operator==(Vec<16> a, Vec<16> b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }

HK_INLINE Vec<16> select(LaneMask<16> mask, Vec<16> a, Vec<16> b) { return _mm512_mask_blend_ps(mask.bits, b.v, a.v); }

HK_INLINE Vec<16> add_unless(LaneMask<16> mask, Vec<16> sum, Vec<16> x) {
  return _mm512_mask_add_ps(sum.v, _knot_mask16(mask.bits), sum.v, x.v);
}

HK_INLINE Vec<16> fma(Vec<16> a, Vec<16> b, Vec<16> c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }

HK_INLINE Vec<16> permute(Vec<16> table, Vec<16>::Ints index) {
  return _mm512_permutexvar_ps(reinterpret_cast<__m512i>(index), table.v);
}

HK_INLINE Vec<16> maximum(Vec<16> a, Vec<16> b) { return _mm512_max_ps(a.v, b.v); }  // b where either is NaN

namespace math {

// With tables of sixteen entries, one permutation each: polynomials a third as long, which relieves the two pipes that
// multiply. Errors as the generic functions': below 1e-7 and 1.8e-7.
template <>
struct Functions<Vec<16>> {
  // x = k / 16 + r, 2^x = 2^floor(k / 16) 2^((k mod 16) / 16) 2^r.
  static HK_INLINE Vec<16> exp2_bounded(Vec<16> x) {
    const __m512i table = _mm512_setr_epi32(0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532, 0x3f75fed7, 0x3f75583f, 0x3f7504f3, 0x3f7508a4, 0x3f75672a, 0x3f76248c, 0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d);  // bits of 2^(j / 16), less j 2^19
    const __m512 magic = _mm512_set1_ps(786432.f);  // 1.5 2^19: the sum's last bits are k
    const __m512 sum = _mm512_add_ps(x.v, magic), rounded = _mm512_sub_ps(sum, magic), r = _mm512_sub_ps(x.v, rounded);
    const __m512i k = _mm512_castps_si512(sum);
    const __m512 power = _mm512_castsi512_ps(
        _mm512_add_epi32(_mm512_permutexvar_epi32(k, table), _mm512_slli_epi32(k, 19)));
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(5.550213531e-2f), r, _mm512_set1_ps(2.402342856e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.931471825e-1f));
    return _mm512_fmadd_ps(_mm512_mul_ps(power, r), p, power);
  }

  // 1 + e = 2^n m, c about 1 / m by m's first four bits: log2(1 + e) = n - log2(c) + log2(1 + f), f = m c - 1. The first c
  // is 1, which keeps the precision of small e.
  static HK_INLINE Vec<16> log2_1p(Vec<16> e) {
    const __m512i inverses = _mm512_setr_epi32(0x7f000000, 0x7eea0000, 0x7edd0000, 0x7ed20000, 0x7ec80000, 0x7ebf0000, 0x7eb60000, 0x7eae0000, 0x7ea70000, 0x7ea10000, 0x7e9b0000, 0x7e950000, 0x7e900000, 0x7e8b0000, 0x7e860000, 0x7e820000);  // bits of c, plus an exponent
    const __m512 logarithms = _mm512_setr_ps(
        0.f, 0.129635274f, 0.212097436f, 0.285754472f, 0.356143802f, 0.422571182f, 0.492205352f, 0.557056487f, 0.616295695f,
        0.669083118f, 0.723875582f, 0.780831456f, 0.830075026f, 0.881058931f, 0.933910787f, 0.977632165f);
    const __m512 one = _mm512_set1_ps(1.f), u = _mm512_add_ps(e.v, one);
    const __m512i bits = _mm512_castps_si512(u), index = _mm512_srli_epi32(bits, 19);
    const __m512i exponent = _mm512_and_epi32(bits, _mm512_set1_epi32(0x7f800000));
    const __m512 scale = _mm512_castsi512_ps(_mm512_sub_epi32(_mm512_permutexvar_epi32(index, inverses), exponent));
    const __m512 f = _mm512_fmadd_ps(e.v, scale, _mm512_sub_ps(scale, one));
    const __m512 whole = _mm512_add_ps(_mm512_getexp_ps(u), _mm512_permutexvar_ps(index, logarithms));
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(-3.394427299e-1f), f, _mm512_set1_ps(4.808358550e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(-7.213628888e-1f));
    p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(1.442695141f));
    return _mm512_fmadd_ps(p, f, whole);
  }
};

}  // namespace math

HK_INLINE LaneMask<16> equals(const int32_t* labels, int32_t value, Vec<16>) {
  return {_mm512_cmpeq_epi32_mask(_mm512_loadu_si512(labels), _mm512_set1_epi32(value))};
}

HK_INLINE LaneMask<16> not_negative(const int32_t* labels, Vec<16>) {
  return {_mm512_cmpge_epi32_mask(_mm512_loadu_si512(labels), _mm512_setzero_si512())};
}

}  // namespace hetero
