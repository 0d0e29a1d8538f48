// NF4 to rotated int8, and the scale of each row for that; NF4 to fp8. Levels for int8 are those of fp16: their sums are
// exact in fp32 in any order, so results are equal to the reference's, bit for bit. A thread rotates the 64 values of a
// scale, a "half".
#define REPLICAS 16  // of the table: each lane of half a warp has its own banks
#define BLOCK 256

// Of each byte, which is two codes, the sum and the difference of its levels: the rotation's first stage.
__device__ __forceinline__ void fill_table(float2 *table)
{
    const float even = half_level[threadIdx.x >> 4], odd = half_level[threadIdx.x & 15];
    for (int i = 0; i < REPLICAS; i++)
        table[threadIdx.x * REPLICAS + (threadIdx.x + i) % REPLICAS] = make_float2(even + odd, even - odd);
    __syncthreads();
}

// A half, rotated and scaled. If `joined`, the sum with that of the lane beside it, or for odd lanes the difference.
__device__ __forceinline__ void rotate_half(float *v, const Half &half, const float2 *table, bool joined)
{
    unsigned words[8];
    half.unpack(words);
    const float2 *mine = table + threadIdx.x % REPLICAS;
#pragma unroll
    for (int i = 0; i < 64; i += 2) {  // the sign is (-1)^(i0 i1 + i2 i3 + i4 i5): here it swaps sum and difference
        const float2 pair = mine[(words[i / 8] >> 4 * (i % 8) & 255) * REPLICAS];
        v[i] = i & 2 ? pair.y : pair.x;
        v[i + 1] = i & 2 ? pair.x : pair.y;
    }
    turn_half(v, half.scale, joined);
}

// All halves of a weight, divided by `row_scale` and `root`, that of a rotation's width. Blocks take turns.
extern "C" __global__ void __launch_bounds__(BLOCK, 2) decode_rotated(
    const uint4 *packed, const float *absmax, const float *row_scale, uint4 *out, int halves, int halves_a_row,
    int joined, float root)
{
    __shared__ float2 table[256 * REPLICAS];
    __shared__ uint4 staged[BLOCK * 4];
    fill_table(table);
    const int lane = threadIdx.x % 32, step = gridDim.x * BLOCK;
    uint4 *mine = staged + threadIdx.x / 32 * 128;
    int first = blockIdx.x * BLOCK + threadIdx.x - lane;  // of the warp's 32 halves
    Half half, next;
    next.load(packed, absmax, first + lane, first + lane < halves);
    for (; first < halves; first += step) {
        half = next;
        const int after = first + lane + step;
        next.load(packed, absmax, after, after < halves);
        const int row = (first + lane) / halves_a_row;
        const float unit = first + lane < halves ? row_scale[row] : 1;
        half.scale = __fmul_rn(half.scale, 1 / __fmul_rn(unit, root));
        float v[64];
        rotate_half(v, half, table, joined);
#pragma unroll
        for (int c = 0; c < 4; c++) {  // through shared memory, so that a warp writes neighbours
            unsigned word[4];
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const float *four_of = v + 16 * c + 4 * k;
                word[k] = four(rounded(four_of[0]), rounded(four_of[1]),
                               rounded(four_of[2]), rounded(four_of[3]));
            }
            const uint4 whole = {word[0], word[1], word[2], word[3]};
            mine[lane * 4 + (c ^ (lane >> 1 & 3))] = whole;
        }
        __syncwarp();
#pragma unroll
        for (int c = 0; c < 4; c++) {
            const int slot = c * 32 + lane, from = slot / 4;
            if (first + from < halves)
                out[4 * (long long)first + slot] = mine[from * 4 + ((slot & 3) ^ (from >> 1 & 3))];
        }
        __syncwarp();
    }
}

// `unit` times the largest of each row, in which a warp takes a row: what `decode_rotated` divides it by.
extern "C" __global__ void __launch_bounds__(BLOCK, 2) rotated_scales(
    const uint4 *packed, const float *absmax, float *out, int rows, int halves_a_row, int joined, float unit)
{
    __shared__ float2 table[256 * REPLICAS];
    fill_table(table);
    const int lane = threadIdx.x % 32, warps = gridDim.x * (BLOCK / 32);
    for (int row = blockIdx.x * (BLOCK / 32) + threadIdx.x / 32; row < rows; row += warps) {
        float largest = SMALLEST;
        for (int first = 0; first < halves_a_row; first += 32) {
            Half half;
            half.load(packed, absmax, (long long)row * halves_a_row + first + lane, first + lane < halves_a_row);
            float v[64];
            rotate_half(v, half, table, joined);
#pragma unroll
            for (int i = 0; i < 64; i++) largest = larger(largest, fabsf(v[i]));
        }
        largest = warp_largest(largest);
        if (lane == 0) out[row] = largest * unit;
    }
}

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
