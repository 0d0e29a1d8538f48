// The product of two int8 matrices with int32 sums, by the tensor cores of compute capability 8.0 and later. A block has
// a tile of results; each of its DOWN x ACROSS warps has TALL x WIDE of 16 x 8. Tiles of 64 bytes of K arrive by
// asynchronous copies, three at once. A row of 64 bytes has 4 pieces of 16, whose order depends on the row: so neither
// the copies' writes nor the matrix loads wait for a bank.
#define STAGES 3
#define DEPTH 64
#define GROUP 8  // tiles of M that share a weight's tile in the cache, while they run at the same time

#ifdef __CUDACC__
__device__ __forceinline__ void copy16(void *to, const void *from, bool inside)
{
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;"
                 :: "r"((unsigned)__cvta_generic_to_shared(to)), "l"(from), "r"(inside ? 16 : 0) : "memory");
}

__device__ __forceinline__ void copies_end() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// All but the last `STAGES - 2` groups of copies have arrived.
__device__ __forceinline__ void copies_wait() { asm volatile("cp.async.wait_group %0;" :: "n"(STAGES - 2) : "memory"); }

// Four 8 x 16 byte matrices: a lane names a row, lanes 8 i to 8 i + 7 those of matrix i, and gets 4 bytes of each.
__device__ __forceinline__ void matrices4(unsigned *x, const void *row)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"((unsigned)__cvta_generic_to_shared(row)) : "memory");
}

// c `[16, 8]` += a `[16, 32]` times b `[8, 32]`.
__device__ __forceinline__ void multiply_add(int *c, const unsigned *a, const unsigned *b)
{
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
#endif

// One thread's share of copying `ROWS` x 64 bytes by `THREADS`: rows from `limit` on are zeros.
template <int ROWS, int THREADS> struct Source {
    const signed char *from;
    long long stride;
    int row, limit;

    __device__ __forceinline__ Source(const signed char *matrix, long long stride, int first, int limit)
        : stride(stride), row(first + threadIdx.x / 4), limit(limit)
    {
        from = matrix + (row < limit ? row : 0) * stride + threadIdx.x % 4 * 16;
    }

    __device__ __forceinline__ void copy(unsigned char *to, int k) const
    {
        const int inside = threadIdx.x / 4;
        unsigned char *place = to + inside * DEPTH + (threadIdx.x % 4 ^ (inside >> 1 & 3)) * 16;
#pragma unroll
        for (int i = 0; i < 4 * ROWS / THREADS; i++) {
            const int down = i * THREADS / 4;
            const bool is = row + down < limit;
            copy16(place + down * DEPTH, from + k + (is ? down * stride : 0), is);
        }
    }
};

// The 4 words that each lane of a quad has become 4 words of one lane each.
__device__ __forceinline__ void exchange(unsigned *w)
{
#pragma unroll
    for (int away = 1; away <= 2; away *= 2) {
        const bool upper = threadIdx.x & away;
#pragma unroll
        for (int k = 0; k < 2; k++) {
            unsigned &low = w[away == 1 ? 2 * k : k], &high = w[away == 1 ? 2 * k + 1 : k + 2];
            const unsigned got = __shfl_xor_sync(0xffffffffu, upper ? low : high, away);
            if (upper) low = got;
            else high = got;
        }
    }
}

// Scales, bias and one rounding, then a warp's results in 32 columns to `out`, from `row` and `column` on.
template <int TALL>
__device__ __forceinline__ void write_product(
    const int (*sum)[4][4], const float *x_scale, const float *row_scale, const value *bias, value *out,
    long long stride, int row, int column, int m, int n)
{
    const int lane = threadIdx.x % 32, quad = lane % 4;
    float unit[4][2], plus[4][2];
#pragma unroll
    for (int t = 0; t < 4; t++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const int at = column + 8 * t + 2 * quad + e;
            unit[t][e] = at < n ? row_scale[at] : 0;
            plus[t][e] = bias && at < n ? wide(bias[at]) : 0;
        }
    const bool vectors = VALUE != 0 && n % 8 == 0 && (size_t)out % 16 == 0 && stride % 8 == 0;
#pragma unroll
    for (int i = 0; i < 2 * TALL; i++) {
        const int at = row + 8 * i + lane / 4;
        const float each = at < m ? x_scale[at] : 0;
        value pair[4][2];
#pragma unroll
        for (int t = 0; t < 4; t++)
#pragma unroll
            for (int e = 0; e < 2; e++)
                pair[t][e] = narrow((float)sum[i / 2][t][2 * (i & 1) + e] * each * unit[t][e] + plus[t][e]);
        value *place = out + at * stride + column;
#if VALUE != 0
        if (vectors) {  // the same for all
            unsigned w[4];
#pragma unroll
            for (int t = 0; t < 4; t++) w[t] = pair[t][0] | (unsigned)pair[t][1] << 16;
            exchange(w);
            const uint4 whole = {w[0], w[1], w[2], w[3]};
            if (at < m && column + 8 * quad < n) *(uint4 *)(place + 8 * quad) = whole;
            continue;
        }
#endif
#pragma unroll
        for (int t = 0; t < 4; t++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int to = 8 * t + 2 * quad + e;
                if (at < m && column + to < n) place[to] = pair[t][e];
            }
    }
}

template <int TALL, int WIDE, int DOWN, int ACROSS>
__device__ __forceinline__ void product(
    const signed char *x, long long x_stride, const float *x_scale, const signed char *weight, long long weight_stride,
    const float *row_scale, const value *bias, value *out, long long out_stride, int m, int n, int k)
{
    constexpr int HEIGHT = 16 * TALL * DOWN, WIDTH = 8 * WIDE * ACROSS, THREADS = 32 * DOWN * ACROSS;
    constexpr int SIZE = (HEIGHT + WIDTH) * DEPTH;
    __shared__ uint4 memory[STAGES * SIZE / 16];
    const int across = (n + WIDTH - 1) / WIDTH, group = blockIdx.x / (GROUP * across);
    const int left = (m + HEIGHT - 1) / HEIGHT - group * GROUP, rows = left < GROUP ? left : GROUP;
    const int inside = blockIdx.x % (GROUP * across);
    const int row = (group * GROUP + inside % rows) * HEIGHT, column = inside / rows * WIDTH;

    const Source<HEIGHT, THREADS> of_x(x, x_stride, row, m);
    const Source<WIDTH, THREADS> of_weight(weight, weight_stride, column, n);
    unsigned char *stages = (unsigned char *)memory;
    const int turns = k / DEPTH;
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < turns) {
            of_x.copy(stages + s * SIZE, s * DEPTH);
            of_weight.copy(stages + s * SIZE + HEIGHT * DEPTH, s * DEPTH);
        }
        copies_end();
    }

    // where a lane finds its rows, for the first 32 bytes; for the others, bit 1 of the piece is flipped
    const int lane = threadIdx.x % 32, down = threadIdx.x / 32 / ACROSS, beside = threadIdx.x / 32 % ACROSS;
    const int low = lane & 7, swapped = low >> 1;
    const int x_at = (down * 16 * TALL + (lane & 15)) * DEPTH + (lane >> 4 ^ swapped) * 16;
    const int weight_at =
        (HEIGHT + beside * 8 * WIDE + low + (lane >> 4) * 8) * DEPTH + ((lane >> 3 & 1) ^ swapped) * 16;
    int sum[WIDE / 4][TALL][4][4] = {};
    int now = 0, then = STAGES - 1;
    for (int turn = 0; turn < turns; turn++) {
        copies_wait();
        __syncthreads();  // for what others copied; and nobody reads the stage any more that is written now
        if (turn + STAGES - 1 < turns) {
            of_x.copy(stages + then * SIZE, (turn + STAGES - 1) * DEPTH);
            of_weight.copy(stages + then * SIZE + HEIGHT * DEPTH, (turn + STAGES - 1) * DEPTH);
        }
        copies_end();
        const unsigned char *tile = stages + now * SIZE;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            unsigned a[TALL][4], b[WIDE / 2][4];
#pragma unroll
            for (int j = 0; j < WIDE / 2; j++) matrices4(b[j], tile + (weight_at ^ half * 32) + j * 16 * DEPTH);
#pragma unroll
            for (int i = 0; i < TALL; i++) matrices4(a[i], tile + (x_at ^ half * 32) + i * 16 * DEPTH);
#pragma unroll
            for (int i = 0; i < TALL; i++)
#pragma unroll
                for (int t = 0; t < WIDE; t++) multiply_add(sum[t / 4][i][t % 4], a[i], b[t / 2] + t % 2 * 2);
        }
        now = now == STAGES - 1 ? 0 : now + 1;
        then = then == STAGES - 1 ? 0 : then + 1;
    }
#pragma unroll
    for (int part = 0; part < WIDE / 4; part++)
        write_product<TALL>(
            sum[part], x_scale, row_scale, bias, out, out_stride, row + down * 16 * TALL,
            column + beside * 8 * WIDE + 32 * part, m, n);
}

extern "C" __global__ void __launch_bounds__(128, 2) product_128(
    const signed char *x, long long x_stride, const float *x_scale, const signed char *weight, long long weight_stride,
    const float *row_scale, const value *bias, value *out, long long out_stride, int m, int n, int k)
{
    product<4, 8, 2, 2>(x, x_stride, x_scale, weight, weight_stride, row_scale, bias, out, out_stride, m, n, k);
}

extern "C" __global__ void __launch_bounds__(128, 4) product_64(
    const signed char *x, long long x_stride, const float *x_scale, const signed char *weight, long long weight_stride,
    const float *row_scale, const value *bias, value *out, long long out_stride, int m, int n, int k)
{
    product<4, 4, 2, 2>(x, x_stride, x_scale, weight, weight_stride, row_scale, bias, out, out_stride, m, n, k);
}
