// The rotation of kernels/rotation.py in CUDA C: sums and differences, so nothing is multiplied by +-1. What all kernels
// in 8 bits share. Index bits of a value in its block of 64 are i0 to i5, and i6 says which half of 128 it is in.
#define ROUND 12582912.0f  // 1.5 * 2**23: added to a small number, it leaves the nearest integer in the lowest bits
#define SMALLEST 1e-12f

// int8 nearest to x * factor, ties to even, in the lowest byte. The product is rounded before, as in the reference.
__device__ __forceinline__ unsigned rounded(float x, float factor)
{
    return __float_as_uint(__fadd_rn(__fmul_rn(x, factor), ROUND));
}

__device__ __forceinline__ unsigned four(unsigned a, unsigned b, unsigned c, unsigned d)
{
    return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
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
