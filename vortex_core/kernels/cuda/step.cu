// The kernels of a step, and of NF4, in CUDA C; kernels/compiled.py launches them. `reference.py` says what each one
// computes. Arithmetic is fp32, rounded once. `value` is the type of activations: see VALUE in values.cuh.
// Legend: B pictures, T tokens, D hidden, H heads, C channels of a head.

// Words of 8 codes, the first value of a byte in its high half, to 8 values each; every 8 words share a scale.
extern "C" __global__ void decode(const unsigned *packed, const float *absmax, value *out, long long words)
{
    __shared__ float level[16];  // in 16 banks: no two lanes wait for each other
    const float levels[16] = {LEVELS};
    if (threadIdx.x == 0)
        for (int i = 0; i < 16; i++) level[i] = levels[i];
    __syncthreads();
    const long long first = (long long)blockIdx.x * blockDim.x * 4 + threadIdx.x;
    unsigned word[4];
    float scale[4];
#pragma unroll
    for (int k = 0; k < 4; k++) {  // all loads before the first use
        const long long i = first + k * blockDim.x;
        word[k] = i < words ? packed[i] : 0;
        scale[k] = i < words ? absmax[i / 8] : 0;
    }
#pragma unroll
    for (int k = 0; k < 4; k++) {
        const long long i = first + k * blockDim.x;
        float v[8];
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const unsigned byte = word[k] >> (8 * j) & 255;
            v[2 * j] = level[byte >> 4] * scale[k];
            v[2 * j + 1] = level[byte & 15] * scale[k];
        }
        if (i < words) store8(out + 8 * i, v, 8);
    }
}

// adaLN of a token by a block. With `y`, `x += gate * y` first, in place. `_b` and `_t` are strides.
extern "C" __global__ void __launch_bounds__(1024) modulate(
    value *x, long long x_b, long long x_t, const value *y, long long y_b, long long y_t, const value *gate,
    const value *shift, const value *scale, value *out, long long out_b, long long out_t, int tokens, int width)
{
    const long long picture = blockIdx.x / tokens, token = blockIdx.x % tokens;
    const int column = 8 * threadIdx.x;
    float v[8];
    adaln(v, x + picture * x_b + token * x_t, y ? y + picture * y_b + token * y_t : y, gate, shift, scale, width);
    store8(out + picture * out_b + token * out_t + column, v, width - column);
}

// RMS norm and rotary embedding in place, of the queries (blockIdx.y 0) or keys of a token: a warp for each head.
extern "C" __global__ void __launch_bounds__(256) rotate(
    value *qkv, long long stride_b, long long stride_t, const value *query_norm, const value *key_norm,
    const float *cosine, const float *sine, int tokens, int heads, int channels)
{
    const long long picture = blockIdx.x / tokens, token = blockIdx.x % tokens;
    const int lane = threadIdx.x % 32, pairs = channels / 2;
    const value *norm = blockIdx.y ? key_norm : query_norm;
    value *place = qkv + picture * stride_b + token * stride_t + (long long)blockIdx.y * heads * channels;
    float weight[PAIRS][2], c[PAIRS], s[PAIRS];
#pragma unroll
    for (int j = 0; j < PAIRS; j++) {
        const int pair = lane + 32 * j;
        const bool inside = pair < pairs;
        weight[j][0] = inside ? wide(norm[2 * pair]) : 0;
        weight[j][1] = inside ? wide(norm[2 * pair + 1]) : 0;
        c[j] = inside ? cosine[token * pairs + pair] : 0;
        s[j] = inside ? sine[token * pairs + pair] : 0;
    }
    for (int head = threadIdx.x / 32; head < heads; head += blockDim.x / 32) {
        value *x = place + (long long)head * channels;
        float v[PAIRS][2], sum = 0;
#pragma unroll
        for (int j = 0; j < PAIRS; j++) {
            const int pair = lane + 32 * j;
            v[j][0] = v[j][1] = 0;
            if (pair < pairs) load2(v[j], x + 2 * pair);
            sum += v[j][0] * v[j][0] + v[j][1] * v[j][1];
        }
        const float inverse = rsqrtf(warp_sum(sum) / channels + EPSILON);
#pragma unroll
        for (int j = 0; j < PAIRS; j++) {
            const int pair = lane + 32 * j;
            const float even = v[j][0] * inverse * weight[j][0], odd = v[j][1] * inverse * weight[j][1];
            v[j][0] = even * c[j] - odd * s[j];
            v[j][1] = even * s[j] + odd * c[j];
            if (pair < pairs) store2(x + 2 * pair, v[j]);
        }
    }
}
