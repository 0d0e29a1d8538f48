// What the kernels in 8 bits share. The rotation of kernels/rotation.py is made of sums and differences. Bits of a value's
// index in its block are i0 to i5, and i6 says which half of a block of 128 it is in.
#define ROUND 12582912.0f  // 1.5 * 2**23: added to a small number, it leaves the nearest integer in the lowest bits
#define SMALLEST 1e-12f
#define FP8_MAX 448.0f

// int8 nearest to x, ties to even, in the lowest byte.
__device__ __forceinline__ unsigned rounded(float x)
{
    return __float_as_uint(__fadd_rn(x, ROUND));
}

__device__ __forceinline__ unsigned four(unsigned a, unsigned b, unsigned c, unsigned d)
{
    return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}

#ifdef __CUDACC__
// Two values to fp8 (e4m3), the first in the low byte. Nobody asks a card for it that has none.
__device__ __forceinline__ unsigned two_fp8(float a, float b)
{
    unsigned short pair = 0;
#if __CUDA_ARCH__ >= 890
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(b), "f"(a));
#endif
    return pair;
}
#endif

__device__ __forceinline__ uint2 eight_fp8(const float *v, float factor)
{
    unsigned word[2];
#pragma unroll
    for (int i = 0; i < 2; i++)
        word[i] = two_fp8(v[4 * i] * factor, v[4 * i + 1] * factor) |
                  two_fp8(v[4 * i + 2] * factor, v[4 * i + 3] * factor) << 16;
    const uint2 whole = {word[0], word[1]};
    return whole;
}

// The larger of two that are not negative; NaN is the largest.
__device__ __forceinline__ float larger(float a, float b)
{
    const unsigned x = __float_as_uint(a), y = __float_as_uint(b);
    return __uint_as_float(x > y ? x : y);
}

__device__ __forceinline__ float warp_largest(float x)
{
#pragma unroll
    for (int away = 16; away; away /= 2) x = larger(x, __shfl_xor_sync(0xffffffffu, x, away));
    return x;
}

__device__ __forceinline__ float block_largest(float x)
{
    __shared__ float part[32];
    x = warp_largest(x);
    if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = x;
    __syncthreads();
    return warp_largest(threadIdx.x % 32 < blockDim.x / 32 ? part[threadIdx.x % 32] : 0);
}
