// What all kernels in CUDA C share: types, rounding, vector loads, sums. It comes first in the text that is compiled.
// VALUE is the type of activations: 0 float, 1 bfloat16, 2 half.
#if VALUE == 0
typedef float value;
#else
typedef unsigned short value;
#endif

#ifdef __CUDACC__
__device__ __forceinline__ float wide(value x)
{
#if VALUE == 0
    return x;
#elif VALUE == 1
    return __uint_as_float((unsigned)x << 16);
#else
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
#endif
}

__device__ __forceinline__ value narrow(float x)
{
#if VALUE == 0
    return x;
#else
    value y;
#if VALUE == 1
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
#else
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
#endif
    return y;
#endif
}
#endif

union Eight {
    uint4 whole[sizeof(value) / 2];
    value at[8];
};

// 8 neighbours, of which `count` or more exist; the others are 0. In loads of 16 bytes where they lie so.
__device__ __forceinline__ Eight raw8(const value *from, int count)
{
    Eight raw;
    if (count >= 8 && (size_t)from % 16 == 0) {
#pragma unroll
        for (int i = 0; i < (int)sizeof(value) / 2; i++) raw.whole[i] = ((const uint4 *)from)[i];
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) raw.at[i] = i < count ? from[i] : 0;
    }
    return raw;
}

__device__ __forceinline__ void load8(float *v, const value *from, int count)
{
    const Eight raw = raw8(from, count);
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = wide(raw.at[i]);
}

__device__ __forceinline__ void store8(value *to, const float *v, int count)
{
    if (count >= 8 && (size_t)to % 16 == 0) {
        Eight raw;
#pragma unroll
        for (int i = 0; i < 8; i++) raw.at[i] = narrow(v[i]);
#pragma unroll
        for (int i = 0; i < (int)sizeof(value) / 2; i++) ((uint4 *)to)[i] = raw.whole[i];
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (i < count) to[i] = narrow(v[i]);
    }
}

__device__ __forceinline__ void round8(float *v)
{
#pragma unroll
    for (int i = 0; i < 8; i++) v[i] = wide(narrow(v[i]));
}

union Four {
#if VALUE == 0
    uint4 whole;
#else
    uint2 whole;
#endif
    value at[4];
};

// 4 neighbours that lie at a multiple of their size.
__device__ __forceinline__ void load4(float *v, const value *from)
{
    Four raw;
    raw.whole = *(const decltype(raw.whole) *)from;
#pragma unroll
    for (int i = 0; i < 4; i++) v[i] = wide(raw.at[i]);
}

__device__ __forceinline__ void store4(value *to, const float *v)
{
    Four raw;
#pragma unroll
    for (int i = 0; i < 4; i++) raw.at[i] = narrow(v[i]);
    *(decltype(raw.whole) *)to = raw.whole;
}

// Sums over a warp, and over a block of whole warps; every thread gets them, and their order never changes.
__device__ __forceinline__ float warp_sum(float x)
{
#pragma unroll
    for (int away = 16; away; away /= 2) x += __shfl_xor_sync(0xffffffffu, x, away);
    return x;
}

__device__ __forceinline__ float block_sum(float x)
{
    __shared__ float part[32];
    x = warp_sum(x);
    __syncthreads();  // `part` is used again and again
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
    __syncthreads();
    return warp_sum(threadIdx.x % 32 < blockDim.x / 32 ? part[threadIdx.x % 32] : 0);
}

// adaLN of the row `x` by a block, to `v`. With `y`, `x += gate * y` first, in place. A thread takes TURNS times 8
// columns, so that few threads have to meet.
#define TURNS 3
__device__ __forceinline__ void adaln(
    float (*v)[8], value *x, const value *y, const value *gate, const value *shift, const value *scale, int width)
{
    float other[8], factor[8], sum = 0;
    Eight scales[TURNS], shifts[TURNS];
#pragma unroll
    for (int k = 0; k < TURNS; k++) {  // all loads early: two sums follow, for which all threads wait
        const int column = 8 * (k * blockDim.x + threadIdx.x);
        load8(v[k], x + column, width - column);
        scales[k] = raw8(scale + column, width - column);
        shifts[k] = raw8(shift + column, width - column);
    }
    if (y) {
#pragma unroll
        for (int k = 0; k < TURNS; k++) {
            const int column = 8 * (k * blockDim.x + threadIdx.x);
            load8(other, y + column, width - column);
            load8(factor, gate + column, width - column);
#pragma unroll
            for (int i = 0; i < 8; i++) v[k][i] += other[i] * factor[i];
            round8(v[k]);
            store8(x + column, v[k], width - column);
        }
    }
#pragma unroll
    for (int k = 0; k < TURNS; k++)
#pragma unroll
        for (int i = 0; i < 8; i++) sum += v[k][i];
    const float mean = block_sum(sum) / width;
    sum = 0;
#pragma unroll
    for (int k = 0; k < TURNS; k++) {
        const int column = 8 * (k * blockDim.x + threadIdx.x);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            v[k][i] = column + i < width ? v[k][i] - mean : 0;
            sum += v[k][i] * v[k][i];
        }
    }
    const float inverse = rsqrtf(block_sum(sum) / width + EPSILON);
#pragma unroll
    for (int k = 0; k < TURNS; k++)
#pragma unroll
        for (int i = 0; i < 8; i++) v[k][i] = v[k][i] * inverse * (1 + wide(scales[k].at[i])) + wide(shifts[k].at[i]);
}
