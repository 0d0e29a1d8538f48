#define BLOCK 256

// Words of 8 codes to fp8, divided by `row_scale`. As `decode` in step.cu.
extern "C" __global__ void __launch_bounds__(BLOCK) decode_fp8(
    const unsigned *packed, const float *absmax, const float *row_scale, uint2 *out, long long words, int words_a_row)
{
    __shared__ float level[16];
    const float levels[16] = {LEVELS};
    if (threadIdx.x == 0)
        for (int i = 0; i < 16; i++) level[i] = levels[i];
    __syncthreads();
    const long long first = (long long)blockIdx.x * BLOCK * 4 + threadIdx.x;
    unsigned word[4];
    float scale[4];
#pragma unroll
    for (int k = 0; k < 4; k++) {
        const long long i = first + k * BLOCK;
        word[k] = i < words ? packed[i] : 0;
        scale[k] = i < words ? absmax[i / 8] / row_scale[i / words_a_row] : 0;
    }
#pragma unroll
    for (int k = 0; k < 4; k++) {
        const long long i = first + k * BLOCK;
        float v[8];
#pragma unroll
        for (int j = 0; j < 8; j++) v[j] = level[word[k] >> 4 * (j ^ 1) & 15];
        if (i < words) out[i] = eight_fp8(v, scale[k]);
    }
}
