// NF4 with the low-rank update of LoRAs (kernels/adapter.py), rounded once: to values, fp8 or rotated int8, or the
// largest of each row. A block takes 64 rows, which share a part, and 128 columns; a thread 8 of each. R operations a
// value are few: there is no need for tensor cores, and sums are fp32. The update comes first, while codes arrive.
#define ROWS 64
#define COLUMNS 128
#define RANKS 16  // at once; their number is a multiple of it
#define THREADS 128

enum { VALUES, EIGHT_BITS, LARGEST };

struct Task {
    const void *packed;
    const float *absmax, *row_scale;  // the latter may be null
    void *out;
    const void *up, *down;  // fp32, bf16 or fp16, as `type` says: see VALUE
    const int *part;
    const float *scale;
    int ranks, type, rows, columns, what;
    float unit;  // of the largest
};

// Some ranks of both factors. 8 columns of `down` are in two planes, so that a warp's lanes read neighbours.
struct Factors {
    float4 down[RANKS][2][COLUMNS / 8], up[RANKS][ROWS / 4];
};

template <bool ROTATED> union Memory {
    Factors factors;
    float4 tile[ROTATED ? ROWS : 1][COLUMNS / 4];
};

#ifdef __CUDACC__
template <int TYPE> __device__ __forceinline__ float wide_as(unsigned short x)
{
    if (TYPE == 1) return __uint_as_float((unsigned)x << 16);
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}
#endif

// 8 neighbours of a factor, the first of which is a multiple of 8.
__device__ __forceinline__ void factors8(float *v, const void *from, long long first, int type)
{
    if (type == 0) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float4 x = ((const float4 *)from)[first / 4 + i];
            v[4 * i] = x.x, v[4 * i + 1] = x.y, v[4 * i + 2] = x.z, v[4 * i + 3] = x.w;
        }
        return;
    }
    const uint4 raw = ((const uint4 *)from)[first / 8];
    const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const unsigned short x = words[i / 2] >> 16 * (i % 2);
        v[i] = type == 1 ? wide_as<1>(x) : wide_as<2>(x);
    }
}

// The ranks from `start` on, `down` times strengths; zeros outside.
__device__ __forceinline__ void load(Factors &factors, const Task &task, int row, int column, int start)
{
    const int part = task.part[row / ROWS], group = threadIdx.x % (COLUMNS / 8), mine = threadIdx.x % ROWS;
    float v[8] = {};
#pragma unroll
    for (int i = 0; i < RANKS; i += THREADS / (COLUMNS / 8)) {
        const int r = i + threadIdx.x / (COLUMNS / 8);
        const long long rank = (long long)part * task.ranks + start + r;
        if (column + 8 * group < task.columns)
            factors8(v, task.down, rank * task.columns + column + 8 * group, task.type);
        const float s = task.scale[rank];
        factors.down[r][0][group] = make_float4(v[0] * s, v[1] * s, v[2] * s, v[3] * s);
        factors.down[r][1][group] = make_float4(v[4] * s, v[5] * s, v[6] * s, v[7] * s);
    }
    float u[8] = {};
    const int r = 8 * (threadIdx.x / ROWS);
    if (row + mine < task.rows) factors8(u, task.up, (long long)(row + mine) * task.ranks + start + r, task.type);
#pragma unroll
    for (int i = 0; i < 8; i++) ((float *)factors.up[r + i])[mine] = u[i];
}

// The update of 8 rows and columns, from `row` and `column` of the block on.
__device__ __forceinline__ void update(float (*v)[8], Factors &factors, const Task &task, int row, int column)
{
    const int group = threadIdx.x / (COLUMNS / 8), across = threadIdx.x % (COLUMNS / 8);
    for (int start = 0; start < task.ranks; start += RANKS) {
        if (start) __syncthreads();  // all have read the ranks before
        load(factors, task, row, column, start);
        __syncthreads();
#pragma unroll 4
        for (int r = 0; r < RANKS; r++) {
            const float4 a[2] = {factors.up[r][2 * group], factors.up[r][2 * group + 1]};
            const float4 b[2] = {factors.down[r][0][across], factors.down[r][1][across]};
            const float left[8] = {a[0].x, a[0].y, a[0].z, a[0].w, a[1].x, a[1].y, a[1].z, a[1].w};
            const float right[8] = {b[0].x, b[0].y, b[0].z, b[0].w, b[1].x, b[1].y, b[1].z, b[1].w};
#pragma unroll
            for (int i = 0; i < 8; i++)
#pragma unroll
                for (int j = 0; j < 8; j++) v[i][j] = fmaf(left[i], right[j], v[i][j]);
        }
    }
}

// Where 4 columns of a row of the tile lie: neither who writes a half of a row nor who reads 8 columns waits for others.
__device__ __forceinline__ int place(int row, int four)
{
    return four ^ ((2 * row + four / 16) & 7) ^ (four / 8 & 1);
}

// A half of 64 for each thread, rotated, to the tile; two threads take a row.
__device__ __forceinline__ void rotate_tile(
    float4 (*tile)[COLUMNS / 4], const Half &half, const float *level, bool joined)
{
    const int row = threadIdx.x / 2, first = threadIdx.x % 2 * 16;
    unsigned words[8];
    half.unpack(words);
    float v[64];
#pragma unroll
    for (int i = 0; i < 64; i += 2) {  // here the rotation's sign swaps sum and difference, as in decode8.cu
        const float even = level[words[i / 8] >> 4 * (i % 8 + 1) & 15], odd = level[words[i / 8] >> 4 * (i % 8) & 15];
        v[i] = i & 2 ? even - odd : even + odd;
        v[i + 1] = i & 2 ? even + odd : even - odd;
    }
    turn_half(v, half.scale, joined);
#pragma unroll
    for (int i = 0; i < 16; i++)
        tile[row][place(row, first + i)] = make_float4(v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]);
}

// 8 rows and columns to `out`; all of a thread's lie inside or outside of the columns.
template <bool ROTATED>
__device__ __forceinline__ void finish(float (*v)[8], const Task &task, int row, int column)
{
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const bool inside = row + i < task.rows && column < task.columns;
        if (task.what == LARGEST) {
            float largest = SMALLEST;
#pragma unroll
            for (int j = 0; j < 8; j++) largest = larger(largest, fabsf(v[i][j]));
#pragma unroll
            for (int away = COLUMNS / 16; away; away /= 2)
                largest = larger(largest, __shfl_xor_sync(0xffffffffu, largest, away));
            // floats that are not negative are ordered as their bits
            if (row + i < task.rows && threadIdx.x % (COLUMNS / 8) == 0)
                atomicMax((unsigned *)task.out + row + i, __float_as_uint(largest * task.unit));
            continue;
        }
        if (!inside) continue;
        const long long at = (long long)(row + i) * task.columns + column;
        const float factor = task.row_scale ? 1 / task.row_scale[row + i] : 1;
        if (ROTATED) {
            unsigned n[8];
#pragma unroll
            for (int j = 0; j < 8; j++) n[j] = rounded(__fmul_rn(v[i][j], factor));
            const uint2 whole = {four(n[0], n[1], n[2], n[3]), four(n[4], n[5], n[6], n[7])};
            ((uint2 *)task.out)[at / 8] = whole;
        } else if (task.what == EIGHT_BITS) {
            ((uint2 *)task.out)[at / 8] = eight_fp8(v[i], factor);
        } else {
#pragma unroll
            for (int j = 0; j < 8; j++) v[i][j] *= factor;
            store8((value *)task.out + at, v[i], 8);
        }
    }
}

__device__ __forceinline__ void adapted_plain(const Task &task)
{
    __shared__ Memory<false> memory;
    __shared__ float level[16];
    const float levels[16] = {LEVELS};
    if (threadIdx.x == 0)
        for (int i = 0; i < 16; i++) level[i] = levels[i];
    const int first = blockIdx.y * ROWS, start = blockIdx.x * COLUMNS;
    const int row = first + threadIdx.x / (COLUMNS / 8) * 8, column = start + threadIdx.x % (COLUMNS / 8) * 8;
    unsigned word[8];
    float scale[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const bool inside = row + i < task.rows && column < task.columns;
        const long long at = (long long)(row + i) * task.columns + column;
        word[i] = inside ? ((const unsigned *)task.packed)[at / 8] : 0;
        scale[i] = inside ? task.absmax[at / 64] : 0;
    }
    float v[8][8] = {};
    update(v, memory.factors, task, first, start);
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
        for (int j = 0; j < 8; j++) v[i][j] = fmaf(level[word[i] >> 4 * (j ^ 1) & 15], scale[i], v[i][j]);
    finish<false>(v, task, row, column);
}

// `root`: what the rotation's sums are multiplied by.
__device__ __forceinline__ void adapted_turned(const Task &task, bool joined, float root)
{
    __shared__ Memory<true> memory;
    __shared__ float level[16];
    if (threadIdx.x < 16) level[threadIdx.x] = half_level[threadIdx.x];
    const int first = blockIdx.y * ROWS, start = blockIdx.x * COLUMNS;
    Half half;
    const int mine = first + threadIdx.x / 2, from = start + threadIdx.x % 2 * 64;
    half.load((const uint4 *)task.packed, task.absmax, ((long long)mine * task.columns + from) / 64,
              mine < task.rows && from < task.columns);
    float v[8][8] = {};
    update(v, memory.factors, task, first, start);
    __syncthreads();  // the tile lies where the factors were
    rotate_tile(memory.tile, half, level, joined);
    __syncthreads();
    const int down = threadIdx.x / (COLUMNS / 8) * 8, across = threadIdx.x % (COLUMNS / 8) * 2;
#pragma unroll
    for (int i = 0; i < 8; i++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
            const float4 x = memory.tile[down + i][place(down + i, across + j)];
            v[i][4 * j] = fmaf(x.x, root, v[i][4 * j]);
            v[i][4 * j + 1] = fmaf(x.y, root, v[i][4 * j + 1]);
            v[i][4 * j + 2] = fmaf(x.z, root, v[i][4 * j + 2]);
            v[i][4 * j + 3] = fmaf(x.w, root, v[i][4 * j + 3]);
        }
    finish<true>(v, task, first + down, start + 4 * across);
}

extern "C" __global__ void __launch_bounds__(THREADS, 4) adapted(
    const void *packed, const float *absmax, const float *row_scale, void *out, const void *up, const void *down,
    const int *part, const float *scale, int ranks, int type, int rows, int columns, int what, float unit)
{
    const Task task = {packed, absmax, row_scale, out, up, down, part, scale, ranks, type, rows, columns, what, unit};
    adapted_plain(task);
}

extern "C" __global__ void __launch_bounds__(THREADS, 3) adapted_rotated(
    const void *packed, const float *absmax, const float *row_scale, void *out, const void *up, const void *down,
    const int *part, const float *scale, int ranks, int type, int rows, int columns, int what, float unit, int joined,
    float root)
{
    const Task task = {packed, absmax, row_scale, out, up, down, part, scale, ranks, type, rows, columns, what, unit};
    adapted_turned(task, joined, root);
}
