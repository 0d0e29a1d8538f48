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
extern "C" __global__ void __launch_bounds__(512) modulate(
    value *x, long long x_b, long long x_t, const value *y, long long y_b, long long y_t, const value *gate,
    const value *shift, const value *scale, value *out, long long out_b, long long out_t, int tokens, int width)
{
    const long long picture = blockIdx.x / tokens, token = blockIdx.x % tokens;
    value *to = out + picture * out_b + token * out_t;
    float v[TURNS][8];
    adaln(v, x + picture * x_b + token * x_t, y ? y + picture * y_b + token * y_t : y, gate, shift, scale, width);
#pragma unroll
    for (int k = 0; k < TURNS; k++) {
        const int column = 8 * (k * blockDim.x + threadIdx.x);
        store8(to + column, v[k], width - column);
    }
}

// Normalized attention guidance of a token by a block: `wanted` led away from `avoided`. `terms`: scale, tau, alpha.
extern "C" __global__ void __launch_bounds__(512) guide(
    const value *wanted, long long wanted_b, long long wanted_t, const value *avoided, long long avoided_b,
    long long avoided_t, const float *terms, value *out, long long out_b, long long out_t, int tokens, int width)
{
    const long long picture = blockIdx.x / tokens, token = blockIdx.x % tokens;
    wanted += picture * wanted_b + token * wanted_t;
    avoided += picture * avoided_b + token * avoided_t;
    value *to = out + picture * out_b + token * out_t;
    const float scale = terms[0], tau = terms[1], alpha = terms[2];
    float plain[TURNS][8], led[TURNS][8], before = 0, after = 0;
#pragma unroll
    for (int k = 0; k < TURNS; k++) {  // columns beyond the row are 0
        const int column = 8 * (k * blockDim.x + threadIdx.x);
        load8(plain[k], wanted + column, width - column);
        load8(led[k], avoided + column, width - column);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            led[k][i] = plain[k][i] * scale - led[k][i] * (scale - 1);
            before += fabsf(plain[k][i]);
            after += fabsf(led[k][i]);
        }
    }
    before = fmaxf(block_sum(before), LEAST_NORM);
    const float ratio = fmaxf(block_sum(after), LEAST_NORM) / before, share = alpha * fminf(ratio, tau) / ratio;
#pragma unroll
    for (int k = 0; k < TURNS; k++) {
        const int column = 8 * (k * blockDim.x + threadIdx.x);
#pragma unroll
        for (int i = 0; i < 8; i++) plain[k][i] = plain[k][i] * (1 - alpha) + led[k][i] * share;
        store8(to + column, plain[k], width - column);
    }
}

// RMS norm and rotary embedding in place, of the queries (blockIdx.y 0) or keys of a token: a warp for HEADS heads at a
// time. A lane takes 4 channels, which are two pairs; their number is a multiple of 4, and at most 128.
#define HEADS 3
extern "C" __global__ void __launch_bounds__(256) rotate(
    value *qkv, long long stride_b, long long stride_t, const value *query_norm, const value *key_norm,
    const float *cosine, const float *sine, int tokens, int heads, int channels)
{
    const long long picture = blockIdx.x / tokens, token = blockIdx.x % tokens;
    const int channel = threadIdx.x % 32 * 4, warps = blockDim.x / 32;
    const bool inside = channel < channels;
    value *place = qkv + picture * stride_b + token * stride_t + (long long)blockIdx.y * heads * channels + channel;
    float weight[4], c[2], s[2];
    if (inside) {
        load4(weight, (blockIdx.y ? key_norm : query_norm) + channel);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            c[i] = cosine[(token * channels + channel) / 2 + i];
            s[i] = sine[(token * channels + channel) / 2 + i];
        }
    }
    for (int first = threadIdx.x / 32; first < heads; first += HEADS * warps) {
        float v[HEADS][4] = {};
#pragma unroll
        for (int h = 0; h < HEADS; h++)  // all loads before the first use
            if (inside && first + h * warps < heads) load4(v[h], place + (long long)(first + h * warps) * channels);
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            float sum = 0;
#pragma unroll
            for (int i = 0; i < 4; i++) sum += v[h][i] * v[h][i];
            const float inverse = rsqrtf(warp_sum(sum) / channels + EPSILON);
            if (!inside || first + h * warps >= heads) continue;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const float even = v[h][2 * i] * inverse * weight[2 * i];
                const float odd = v[h][2 * i + 1] * inverse * weight[2 * i + 1];
                v[h][2 * i] = even * c[i] - odd * s[i];
                v[h][2 * i + 1] = even * s[i] + odd * c[i];
            }
            store4(place + (long long)(first + h * warps) * channels, v[h]);
        }
    }
}
