// NF4 to what products take, rounded once: to values, to fp8, or to rotated int8; or the largest of each row. With
// `ADAPTED`, the low-rank update of LoRAs (kernels/adapter.py) is added before. WHAT and ADAPTED are set by who compiles.
//
// Tensor cores multiply the factors, and rotate. A warp takes ROWS rows and 128 columns at once. Columns of a weight are
// the rows of such a product, and rows its columns, so of 8 rows a lane has two, 2 t and 2 t + 1 with t = lane % 4, and in
// each of both blocks of 64 columns the 8 from 8 g on, g = lane / 4. Which column is called which in a product is free:
// these make loads and stores of a warp touch 4 rows, and of each row 32 to 128 bytes that lie together.
#define ROWS 16
#define TILES (ROWS / 8)
#define THREADS 128
#define WARPS (THREADS / 32)
#define GROUP 16  // ranks of one product
#define HELD 8u   // groups whose left factors lie in shared memory
#define BLOCK 64  // values that share a scale

#define VALUES 0
#define FP8 1
#define INT8 2
#define LARGEST 3
#define LARGEST_ROTATED 4
#define ROTATED (WHAT == INT8 || WHAT == LARGEST_ROTATED)
#define SEARCHED (WHAT == LARGEST || WHAT == LARGEST_ROTATED)
#define HALVES (WHAT == FP8 || WHAT == INT8)  // arithmetic is in pairs of fp16: much finer than what is written
#define PREFETCH (WHAT != VALUES)             // codes are read a turn ahead, where registers allow it
#define REPLICAS 16                           // of the table of pairs: each lane of half a warp has its own bank

// Blocks of a multiprocessor at once: as many as nothing spills for.
#if SEARCHED
#define BLOCKS 4
#elif MANY || __CUDA_ARCH__ == 800 || __CUDA_ARCH__ >= 1000
#define BLOCKS 5
#else
#define BLOCKS 6
#endif

#define ONE 0x3c003c00u
#define MINUS_ONE 0xbc00bc00u
#define ROUND_HALVES 0x66006600u  // 1536, as ROUND: numbers from 1024 to 2048 have no fraction

__constant__ float nf4_level[16] = {LEVELS};

#ifdef __CUDACC__
#define DYNAMIC(type, name) extern __shared__ type name[]

// c `[16, 8]` += a `[16, 16]` times b `[16, 8]`, in fp16 with sums in fp32.
__device__ __forceinline__ void multiply_add16(float *c, const unsigned *a, const unsigned *b)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// As `multiply_add16`, with sums in fp16: two columns of a row are one word.
__device__ __forceinline__ void multiply_add_halves(unsigned *c, const unsigned *a, const unsigned *b)
{
    asm("mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16 {%0, %1}, {%2, %3, %4, %5}, {%6, %7}, {%0, %1};"
        : "+r"(c[0]), "+r"(c[1]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// The other way round: of 8 x 8 in fp16 a lane has two columns of row `lane / 4`.
__device__ __forceinline__ unsigned transposed(unsigned pair)
{
    unsigned found;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(found) : "r"(pair));
    return found;
}

// a * b + c, rounded once.
__device__ __forceinline__ unsigned add_halves(unsigned a, unsigned b, unsigned c)
{
    unsigned both;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(both) : "r"(a), "r"(b), "r"(c));
    return both;
}

__device__ __forceinline__ unsigned multiply_halves(unsigned a, unsigned b)
{
    unsigned both;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(both) : "r"(a), "r"(b));
    return both;
}

// Two values from fp16 to fp8 (e4m3). Nobody asks a card for it that has none.
__device__ __forceinline__ unsigned halves_fp8(unsigned both)
{
    unsigned short pair = 0;
#if __CUDA_ARCH__ >= 890
    asm("cvt.rn.satfinite.e4m3x2.f16x2 %0, %1;" : "=h"(pair) : "r"(both));
#endif
    return pair;
}

// Two values in fp16, the first in the low half.
__device__ __forceinline__ unsigned two_halves(float a, float b)
{
    unsigned both;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(b), "f"(a));
    return both;
}

__device__ __forceinline__ float half_of(unsigned both, int i)
{
    const unsigned short x = both >> 16 * i;
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}

// Two activations' values.
__device__ __forceinline__ unsigned two_values(float a, float b)
{
#if VALUE == 1
    unsigned both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(b), "f"(a));
    return both;
#else
    return two_halves(a, b);
#endif
}

// On Hopper a kernel may be launched before the one before it has ended: see kernels/launch.py. What finds row scales
// takes no part in that: the kernel after it may read them before it waits.
__device__ __forceinline__ void follow()
{
#if __CUDA_ARCH__ >= 900 && !SEARCHED
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
#endif

// Offsets are unsigned, and of 32 bits, which takes few instructions: a matrix has less than 4 GB.
struct Task {
    const unsigned char *packed;
    const float *absmax, *row_scale;
    const unsigned short *up;
    const uint4 *down;
    const float *scale;
    unsigned ranks, rows;
    float times;  // of row scales, for int8
};

// What a row is multiplied by.
__device__ __forceinline__ float row_factor(const Task &task, unsigned row)
{
    return task.row_scale ? 1 / (task.row_scale[min(row, task.rows - 1)] * task.times) : 1;
}

// The codes of two blocks in two rows, a lane's, and their scales.
struct Codes {
    unsigned word[2][2];  // by row and block
    float scale[2][2];

    // `rows_at`: the first block of each row; `first` and `second`: which blocks of it.
    __device__ __forceinline__ void load(const Task &task, const unsigned *rows_at, unsigned first, unsigned second)
    {
        const unsigned g = threadIdx.x % 32 / 4;
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const unsigned at[2] = {rows_at[r] + first, rows_at[r] + second};
#pragma unroll
            for (int b = 0; b < 2; b++) word[r][b] = *(const unsigned *)(task.packed + (at[b] * (BLOCK / 2) + 4 * g));
            scale[r][0] = task.absmax[at[0]], scale[r][1] = task.absmax[at[1]];
        }
    }
};

#if HALVES
typedef unsigned Level;  // 256 entries of REPLICAS: of each byte, which is two codes, their levels

__device__ __forceinline__ void fill(Level *levels)
{
    for (int byte = threadIdx.x; byte < 256; byte += THREADS) {
        const unsigned both = two_halves(nf4_level[byte >> 4], nf4_level[byte & 15]);
        const uint4 whole = {both, both, both, both};
#pragma unroll
        for (int i = 0; i < REPLICAS / 4; i++)
            ((uint4 *)levels)[byte * (REPLICAS / 4) + (byte / 2 + i) % (REPLICAS / 4)] = whole;
    }
}

// A lane's values of 8 rows and a block, where products add to them: a pair is a column's, in both rows.
struct Values {
    unsigned at[4][2];  // column 2 k + i

    __device__ __forceinline__ void set(const Level *levels, const Codes &codes, int b, const float *factor)
    {
        const unsigned x = codes.word[0][b], y = codes.word[1][b];
        const unsigned by = two_halves(codes.scale[0][b] * factor[0], codes.scale[1][b] * factor[1]);
        // the first value of a byte is its high half; each byte of these has a code of both rows
        const unsigned both[2] = {(x & 0xf0f0f0f0u) | (y >> 4 & 0x0f0f0f0fu), (x << 4 & 0xf0f0f0f0u) | (y & 0x0f0f0f0fu)};
#pragma unroll
        for (int k = 0; k < 4; k++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int left = 8 * k - 6;  // an entry has 64 bytes
                const unsigned entry = (left < 0 ? both[i] << 6 : both[i] >> left) & 0x3fc0;
                const unsigned place = entry | threadIdx.x % REPLICAS * 4;
                at[k][i] = multiply_halves(*(const unsigned *)((const char *)levels + place), by);
            }
    }

    __device__ __forceinline__ void add(int k, const unsigned *right, const unsigned *left)
    {
        multiply_add_halves(at[k], right, left);
    }
};
#else
typedef float Level;

__device__ __forceinline__ void fill(Level *levels)
{
    if (threadIdx.x < 16) levels[threadIdx.x] = nf4_level[threadIdx.x];
}

struct Values {
    float at[4][4];  // column 2 k + i of row r is [k][2 i + r]

    __device__ __forceinline__ void set(const Level *levels, const Codes &codes, int b, const float *factor)
    {
#pragma unroll
        for (int r = 0; r < 2; r++)
#pragma unroll
            for (int p = 0; p < 8; p++) {
                const int left = 4 * (p ^ 1) - 2;  // what remains is a multiple of a float's size
                const unsigned place = (left < 0 ? codes.word[r][b] << 2 : codes.word[r][b] >> left) & 60;
                at[p / 2][p % 2 * 2 + r] = *(const float *)((const char *)levels + place) * codes.scale[r][b];
            }
    }

    __device__ __forceinline__ void add(int k, const unsigned *right, const unsigned *left)
    {
        multiply_add16(at[k], right, left);
    }
};
#endif

#if ADAPTED
// Left factors of 16 ranks and 8 rows, times strengths, as products take them: a lane's.
typedef uint2 Left[TILES][32];

// What fp16 can hold; NaN stays.
__device__ __forceinline__ float bounded(float x)
{
    return x > 65504.0f ? 65504.0f : x < -65504.0f ? -65504.0f : x;
}

__device__ __forceinline__ void load_left(Left *left, const Task &task, unsigned first, unsigned part, unsigned start)
{
    const unsigned lane = threadIdx.x % 32, groups = min(HELD, task.ranks / GROUP - start);
    __syncwarp();
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
        const unsigned row = min(first + 8 * tile + lane / 4, task.rows - 1);
        const float factor = HALVES ? row_factor(task, row) : 1;
#pragma unroll 1
        for (unsigned group = 0; group < groups; group++) {
            const unsigned rank = (start + group) * GROUP + lane % 4 * 2;
            const unsigned *from = (const unsigned *)(task.up + (row * task.ranks + rank));
            const float2 *by = (const float2 *)(task.scale + (part * task.ranks + rank));
            unsigned found[2];
#pragma unroll
            for (int k = 0; k < 2; k++)
                found[k] = two_halves(bounded(half_of(from[4 * k], 0) * by[4 * k].x * factor),
                                      bounded(half_of(from[4 * k], 1) * by[4 * k].y * factor));
            left[group][tile][lane] = {found[0], found[1]};
        }
    }
    __syncwarp();
}

// The right factors of 16 ranks and 64 columns, in the order of kernels/adapter.py.
struct Right {
    uint4 at[4];

    __device__ __forceinline__ void load(const uint4 *from)
    {
#pragma unroll
        for (int k = 0; k < 4; k++) at[k] = from[32 * k];
    }
};
#endif

#if ROTATED
// What rotates 16 of a block's 64, by bits 0, 3, 4 and 5 of their index. Its rows g + 8 h and columns 2 t + e + 8 h are
// columns of a weight, h bit 0 and the rest bits 3 to 5. Of the sign (-1)^(i0 i1 + i2 i3 + i4 i5) it has i4 i5.
__device__ __forceinline__ void rotation_table(unsigned *table)
{
    const unsigned g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int k = 0; k < 4; k++) {
        const unsigned down = k % 2, across = k / 2;
        unsigned both = 0;
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const unsigned odd = (e & g) ^ (t & g >> 1) ^ (t >> 1 & g >> 2) ^ (down & across) ^ (t & t >> 1);
            both |= (odd & 1 ? MINUS_ONE : ONE) & (e ? 0xffff0000u : 0xffffu);
        }
        table[k] = both;
    }
}

// a + sign b and a - sign b, in place.
__device__ __forceinline__ void sum_and_difference(unsigned &a, unsigned &b, unsigned sign)
{
    const unsigned x = a, y = b;
    a = add_halves(y, sign, x);
    b = add_halves(y, sign ^ 0x80008000u, x);
}

// Two blocks of 64, rotated in place; a block of 128, if `joined`.
__device__ __forceinline__ void rotate(unsigned (*v)[4][2], const unsigned *table, bool joined)
{
    const unsigned sign = threadIdx.x % 32 / 4 & 1 ? MINUS_ONE : ONE;
    if (joined)
#pragma unroll
        for (int k = 0; k < 4; k++)
#pragma unroll
            for (int i = 0; i < 2; i++) sum_and_difference(v[0][k][i], v[1][k][i], ONE);
#pragma unroll
    for (int b = 0; b < 2; b++) {
#pragma unroll
        for (int i = 0; i < 2; i++) {  // bits 1 and 2, with the signs i0 i1 and i2 i3
            sum_and_difference(v[b][0][i], v[b][1][i], i ? MINUS_ONE : ONE);
            sum_and_difference(v[b][2][i], v[b][3][i], i ? MINUS_ONE : ONE);
            sum_and_difference(v[b][0][i], v[b][2][i], sign);
            sum_and_difference(v[b][1][i], v[b][3][i], sign);
        }
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const unsigned x[2] = {transposed(v[b][k][0]), transposed(v[b][k][1])};
            v[b][k][0] = v[b][k][1] = 0;
            multiply_add_halves(v[b][k], table, x);
        }
    }
}

// A power of two that brings x near 1, so that fp16 holds it.
__device__ __forceinline__ float balance(float x)
{
    const unsigned exponent = __float_as_uint(x) & 0x7f800000u;
    return exponent == 0 || exponent >= 0x7f000000u ? 1 : __uint_as_float(0x7f000000u - exponent);
}
#endif

// The largest of what the 8 lanes have that share rows.
__device__ __forceinline__ float shared_largest(float x)
{
#pragma unroll
    for (int away = 4; away < 32; away *= 2) x = larger(x, __shfl_xor_sync(0xffffffffu, x, away));
    return x;
}

// A lane's 8 columns of row r. `place`: where the block begins in `out`.
template <typename T> __device__ __forceinline__ void store(void *out, const T &v, int r, unsigned place)
{
    place += threadIdx.x % 32 / 4 * 8;
#if WHAT == VALUES && VALUE == 0
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float4 whole = {v[2 * i][r], v[2 * i][2 + r], v[2 * i + 1][r], v[2 * i + 1][2 + r]};
        ((float4 *)((float *)out + place))[i] = whole;
    }
#elif WHAT == VALUES
    const uint4 whole = {two_values(v[0][r], v[0][2 + r]), two_values(v[1][r], v[1][2 + r]),
                         two_values(v[2][r], v[2][2 + r]), two_values(v[3][r], v[3][2 + r])};
    *(uint4 *)((value *)out + place) = whole;
#endif
}

// The same for 8 bits, both rows.
__device__ __forceinline__ void narrow_columns(const unsigned (*v)[2], unsigned (*word)[2])
{
#pragma unroll
    for (int k = 0; k < 4; k += 2) {
        unsigned four[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const unsigned *x = v[k + i];
#if WHAT == FP8
            four[i] = __byte_perm(halves_fp8(x[0]), halves_fp8(x[1]), 0x5140);
#else
            four[i] = __byte_perm(add_halves(x[0], ONE, ROUND_HALVES), add_halves(x[1], ONE, ROUND_HALVES), 0x6240);
#endif
        }
        word[0][k / 2] = __byte_perm(four[0], four[1], 0x5410);
        word[1][k / 2] = __byte_perm(four[0], four[1], 0x7632);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) weights(
    const void *packed, const float *absmax, const float *row_scale, void *out, const void *up, const void *down,
    const int *part, const float *scale, unsigned ranks, unsigned rows, unsigned columns, unsigned steps, int joined,
    float unit)
{
    const unsigned blocks = columns / BLOCK, warp = threadIdx.x / 32, lane = threadIdx.x % 32, t = lane % 4;
    const Task task = {(const unsigned char *)packed, absmax, row_scale, (const unsigned short *)up, (const uint4 *)down,
                       scale, ranks, rows, WHAT == INT8 ? unit : 1};
    const unsigned first = (blockIdx.y * WARPS + warp) * ROWS;
    __shared__ uint4 table_of_levels[HALVES ? 256 * REPLICAS / 4 : 4];
    Level *levels = (Level *)table_of_levels;
    fill(levels);
    __syncthreads();
    if (first >= rows) return;
    unsigned rows_at[TILES][2];  // their first blocks; rows and blocks that do not exist are the last that do
    float factor[TILES][2], largest[TILES][2];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const unsigned row = min(first + 8 * tile + 2 * t + r, rows - 1);
            rows_at[tile][r] = row * blocks;
            factor[tile][r] = HALVES ? row_factor(task, row) : 1;
            largest[tile][r] = 0;
        }
    const unsigned begin = blockIdx.x * steps * 2, end = min(blocks, begin + steps * 2);
#if PREFETCH
    Codes next[TILES];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) next[tile].load(task, rows_at[tile], begin, min(begin + 1, blocks - 1));
#endif
#if ADAPTED
    DYNAMIC(Left, lefts);
    const unsigned groups = ranks / GROUP, mine = part[first / 64];
    Left *left = lefts + warp * min(groups, HELD);
    const uint4 *rights = task.down + (mine * groups * blocks * 128 + lane);
#if !MANY
    load_left(left, task, first, mine, 0);
#endif
#endif
#if ROTATED
    unsigned table[4];
    rotation_table(table);
#endif
#pragma unroll 1
    for (unsigned block = begin; block < end; block += 2) {
        Codes codes[TILES];
#if PREFETCH
        const unsigned after = min(block + 2, blocks - 1), second = min(block + 3, blocks - 1);
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            codes[tile] = next[tile];
            next[tile].load(task, rows_at[tile], after, second);
        }
#else
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) codes[tile].load(task, rows_at[tile], block, min(block + 1, blocks - 1));
#endif
        Values v[2][TILES];
#pragma unroll
        for (int b = 0; b < 2; b++) {
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) v[b][tile].set(levels, codes[tile], b, factor[tile]);
#if ADAPTED
            const uint4 *from = rights + min(block + b, blocks - 1) * 128;
#pragma unroll 1
            for (unsigned group = 0; group < groups; group++, from += blocks * 128) {
#if MANY
                if (group % HELD == 0) load_left(left, task, first, mine, group);
#endif
                Right right;
                right.load(from);
#pragma unroll
                for (int tile = 0; tile < TILES; tile++) {
                    const uint2 x = left[MANY ? group % HELD : group][tile][lane];
                    const unsigned own[2] = {x.x, x.y};
#pragma unroll
                    for (int k = 0; k < 4; k++) {
                        const unsigned theirs[4] = {right.at[k].x, right.at[k].y, right.at[k].z, right.at[k].w};
                        v[b][tile].add(k, theirs, own);
                    }
                }
            }
#endif
#if !ROTATED
            if (block == begin && b == 0) follow();
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
#if WHAT == FP8
                unsigned word[2][2];
                narrow_columns(v[b][tile].at, word);
#endif
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const unsigned place = (rows_at[tile][r] + block + b) * BLOCK;
                    const bool inside = first + 8 * tile + 2 * t + r < rows && block + b < blocks;
#if WHAT == VALUES
                    if (inside) store(out, v[b][tile].at, r, place);
#elif WHAT == FP8
                    if (inside) *(uint2 *)((char *)out + (place + lane / 4 * 8)) = {word[r][0], word[r][1]};
#else
#pragma unroll
                    for (int p = 0; p < 8; p++)
                        largest[tile][r] = larger(largest[tile][r], fabsf(v[b][tile].at[p / 2][p % 2 * 2 + r]));
#endif
                }
            }
#endif
        }
#if ROTATED
        if (block == begin) follow();
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
#if SEARCHED
            unsigned pairs[2][4][2];
            float times[2];
#pragma unroll
            for (int r = 0; r < 2; r++) {
                float x = 0;
#pragma unroll
                for (int p = 0; p < 16; p++) x = larger(x, fabsf(v[p / 8][tile].at[p % 8 / 2][p % 2 * 2 + r]));
                times[r] = balance(shared_largest(x));
            }
#pragma unroll
            for (int p = 0; p < 16; p++) {
                const float *x = v[p / 8][tile].at[p % 8 / 2] + p % 2 * 2;
                pairs[p / 8][p % 8 / 2][p % 2] = two_halves(x[0] * times[0], x[1] * times[1]);
            }
            rotate(pairs, table, joined);
#pragma unroll
            for (int r = 0; r < 2; r++)
#pragma unroll
                for (int p = 0; p < 16; p++)
                    largest[tile][r] = larger(largest[tile][r], fabsf(half_of(pairs[p / 8][p % 8 / 2][p % 2], r)) / times[r]);
#else
            unsigned pairs[2][4][2];
#pragma unroll
            for (int p = 0; p < 16; p++) pairs[p / 8][p % 8 / 2][p % 2] = v[p / 8][tile].at[p % 8 / 2][p % 2];
            rotate(pairs, table, joined);
#pragma unroll
            for (int b = 0; b < 2; b++) {
                unsigned word[2][2];
                narrow_columns(pairs[b], word);
#pragma unroll
                for (int r = 0; r < 2; r++)
                    if (first + 8 * tile + 2 * t + r < rows && block + b < blocks)
                        *(uint2 *)((char *)out + ((rows_at[tile][r] + block + b) * BLOCK + lane / 4 * 8)) = {word[r][0],
                                                                                                             word[r][1]};
            }
#endif
        }
#endif
    }
#if SEARCHED
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const unsigned row = first + 8 * tile + 2 * t + r;
            const float x = shared_largest(largest[tile][r]);
            // floats that are not negative are ordered as their bits
            if (row < rows && lane < 4) atomicMax((unsigned *)out + row, __float_as_uint(x * unit));
        }
#endif
}
