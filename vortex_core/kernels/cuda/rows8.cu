// The row kernels of a step with results in 8 bits: a block takes a token, and finds its scale in registers. `kind` is 0
// for fp8, and for rotated int8 the halves that a block of the rotation has. A thread has chunks of 8 neighbours,
// `blockDim.x` chunks apart, so its lane's bits are the index bits i3 to i6.
#define CHUNKS 4

// Rotates the rounded row `v`; values beyond `width` are 0. Signs that all values of a lane have in common go into `sign`.
__device__ __forceinline__ void rotate_chunk(float *v, bool joined, float &sign)
{
    const int i3 = threadIdx.x & 1, i4 = threadIdx.x >> 1 & 1, i5 = threadIdx.x >> 2 & 1, i6 = threadIdx.x >> 3 & 1;
#pragma unroll
    for (int bit = 0; bit < 3; bit++)
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const int i = (k >> bit << (bit + 1)) | (k & ((1 << bit) - 1)), j = i | 1 << bit;
            const float flip = bit == 2 ? (i3 ? -1.0f : 1.0f) : bit == 0 && i & 2 ? -1.0f : 1.0f;
            const float a = v[i], b = v[j];
            v[i] = fmaf(flip, b, a);
            v[j] = fmaf(-flip, b, a);
        }
    // a lane computes `own + c * other`, and leaves out a sign that it owes: of s, and of each difference
    const float c[4] = {i3 ? -1.0f : 1.0f, i4 ^ i5 ? -1.0f : 1.0f, i4 ^ i5 ? -1.0f : 1.0f, i6 ? -1.0f : 1.0f};
#pragma unroll
    for (int stage = 0; stage < 3; stage++)
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = fmaf(c[stage], __shfl_xor_sync(0xffffffffu, v[i], 1 << stage), v[i]);
    if (joined)
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = fmaf(c[3], __shfl_xor_sync(0xffffffffu, v[i], 8), v[i]);
    sign = (i4 & i5) ^ i3 ^ i4 ^ i5 ^ (joined ? i6 : 0) ? -1.0f : 1.0f;
}

// The row `v`, whose values beyond `width` are 0, to `out`, and its scale; in int8 it is `unit` times the largest.
template <int COUNT>
__device__ __forceinline__ void write_eight(
    float (*v)[8], signed char *out, float *scale, int width, int kind, float unit)
{
    float largest = SMALLEST, sign = 1;
#pragma unroll
    for (int c = 0; c < COUNT; c++) {
        if (kind) {
            round8(v[c]);
            rotate_chunk(v[c], kind == 2, sign);
        }
#pragma unroll
        for (int i = 0; i < 8; i++) largest = larger(largest, fabsf(v[c][i]));
    }
    largest = block_largest(largest);  // NaN in a row must show, and would not in integers: its scale is NaN
    const float found = kind ? largest * unit : largest / FP8_MAX;
    if (threadIdx.x == 0) *scale = found;
    const float factor = kind ? sign * (127 / largest) : 1 / found;
#pragma unroll
    for (int c = 0; c < COUNT; c++) {
        const int column = 8 * (c * blockDim.x + threadIdx.x);
        if (column >= width) continue;
        if (kind) {
            unsigned n[8];
#pragma unroll
            for (int i = 0; i < 8; i++) n[i] = rounded(__fmul_rn(v[c][i], factor));
            const uint2 whole = {four(n[0], n[1], n[2], n[3]), four(n[4], n[5], n[6], n[7])};
            *(uint2 *)(out + column) = whole;
        } else {
            *(uint2 *)(out + column) = eight_fp8(v[c], factor);
        }
    }
}

// As `modulate`. `scale_b` is a stride of `out_scale`, whose tokens follow each other.
extern "C" __global__ void __launch_bounds__(512) modulate8(
    value *x, long long x_b, long long x_t, const value *y, long long y_b, long long y_t, const value *gate,
    const value *shift, const value *scale, signed char *out, long long out_b, long long out_t, float *out_scale,
    long long scale_b, long long scale_t, int tokens, int width, int kind, float unit)
{
    const long long picture = blockIdx.x / tokens, token = blockIdx.x % tokens;
    float v[TURNS][8];
    adaln(v, x + picture * x_b + token * x_t, y ? y + picture * y_b + token * y_t : y, gate, shift, scale, width);
    write_eight<TURNS>(
        v, out + picture * out_b + token * out_t, out_scale + picture * scale_b + token * scale_t, width, kind, unit);
}

// `first` values of `before` as they are, then `x`, with `gelu` after GELU (tanh form): `width` in all.
extern "C" __global__ void __launch_bounds__(1024) narrow8(
    const value *before, long long before_b, long long before_t, const value *x, long long x_b, long long x_t,
    signed char *out, long long out_b, long long out_t, float *out_scale, long long scale_b, long long scale_t,
    int tokens, int first, int width, int gelu, int kind, float unit)
{
    const long long picture = blockIdx.x / tokens, token = blockIdx.x % tokens;
    float v[CHUNKS][8];
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        const int column = 8 * (c * blockDim.x + threadIdx.x);
        if (column < first) {
            load8(v[c], before + picture * before_b + token * before_t + column, 8);
            continue;
        }
        load8(v[c], x + picture * x_b + token * x_t + column - first, width - column);
        if (gelu)
#pragma unroll
            for (int i = 0; i < 8; i++) {  // x * (1 + tanh(u)) / 2 is x / (1 + exp(-2 u)): exact for small results, too
                const float u = v[c][i] * (0.7978845608028654f + 0.035677408136300125f * v[c][i] * v[c][i]);
                v[c][i] = __fdividef(v[c][i], 1 + __expf(-2 * u));
            }
    }
    write_eight<CHUNKS>(
        v, out + picture * out_b + token * out_t, out_scale + picture * scale_b + token * scale_t, width, kind, unit);
}
