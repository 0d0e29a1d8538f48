// CUDA's words for a C++ compiler, so that kernels run on the CPU: a block after the other, its threads in turn.
// A thread runs until it waits for others. It includes no more of CUDA than the kernels use.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>
#include <ucontext.h>

#define __global__
#define __device__
#define __forceinline__ inline
#define __shared__ static
#define __constant__ static const
#define __launch_bounds__(...)
#define wide(x) wide_as<VALUE>(x)
#define narrow(x) narrow_as<VALUE>(x)

struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct Index { int x, y; };
static Index threadIdx, blockIdx, blockDim, gridDim;

static ucontext_t scheduler;
static std::vector<ucontext_t> threads;

static void yield() { swapcontext(&threads[threadIdx.x], &scheduler); }

struct Barrier {
    int arrived = 0, rounds = 0;
    void wait(int count)
    {
        const int now = rounds;
        if (++arrived == count) {
            arrived = 0;
            rounds++;
        } else {
            while (rounds == now) yield();
        }
    }
};
static Barrier block_barrier, warp_barriers[32];

inline void __syncthreads() { block_barrier.wait(blockDim.x); }
inline void __syncwarp() { warp_barriers[threadIdx.x / 32].wait(32); }

// What each lane of a warp says, read by `read` before any lane goes on.
template <typename T, typename F> auto among(const T &said, F read)
{
    static T exchanged[1024];
    exchanged[threadIdx.x] = said;
    __syncwarp();
    const auto found = read(exchanged + threadIdx.x / 32 * 32);
    __syncwarp();
    return found;
}

template <typename T> T __shfl_xor_sync(unsigned, T x, int away)
{
    return among(x, [=](const T *lanes) { return lanes[threadIdx.x % 32 ^ away]; });
}

template <typename T> T __shfl_sync(unsigned, T x, int lane)
{
    return among(x, [=](const T *lanes) { return lanes[lane]; });
}

inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }

inline unsigned __float_as_uint(float x)
{
    unsigned bits;
    memcpy(&bits, &x, 4);
    return bits;
}

inline float __uint_as_float(unsigned bits)
{
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

inline unsigned atomicMax(unsigned *at, unsigned x)
{
    const unsigned before = *at;
    *at = x > before ? x : before;
    return before;
}

inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector)
{
    const uint64_t both = (uint64_t)y << 32 | x;
    unsigned found = 0;
    for (int i = 0; i < 4; i++) found |= (unsigned)(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return found;
}

// fp8 (e4m3), to nearest even; the largest is 448.
inline unsigned fp8(float x)
{
    if (x != x) return 127;
    const float size = std::fmin(std::fabs(x), 448.0f);
    int exponent;
    std::frexp(size, &exponent);
    exponent = size < std::ldexp(1.0f, -6) ? -6 : exponent - 1;
    const int steps = (int)std::nearbyint(std::ldexp(size, 3 - exponent));  // of 8 in a power of two
    return (x < 0 ? 128 : 0) + (exponent + 6) * 8 + steps;
}

inline unsigned two_fp8(float a, float b) { return fp8(a) | fp8(b) << 8; }

// The copies, matrix loads and tensor cores of product.cu. A copy arrives at once.
inline void copies_end() {}
inline void copies_wait() {}

inline void copy16(void *to, const void *from, bool inside)
{
    if (inside) memcpy(to, from, 16);
    else memset(to, 0, 16);
}

inline void matrices4(unsigned *x, const void *row)
{
    const int lane = threadIdx.x % 32;
    const uint4 found = among(row, [=](const void *const *rows) {
        unsigned words[4];
        for (int i = 0; i < 4; i++) words[i] = ((const unsigned *)rows[8 * i + lane / 4])[lane % 4];
        return uint4{words[0], words[1], words[2], words[3]};
    });
    memcpy(x, &found, 16);
}

struct Operands { unsigned a[4], b[2]; };

inline void multiply_add(int *c, const unsigned *a, const unsigned *b)
{
    const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
    const Operands mine = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
    among(mine, [=](const Operands *lanes) {
        for (int i = 0; i < 4; i++)
            for (int k = 0; k < 32; k++) {
                const unsigned left = lanes[row * 4 + k % 16 / 4].a[k / 16 * 2 + i / 2];
                const unsigned right = lanes[(column + i % 2) * 4 + k % 16 / 4].b[k / 16];
                c[i] += (signed char)(left >> k % 4 * 8) * (signed char)(right >> k % 4 * 8);
            }
        return 0;
    });
}

template <int VALUE_TYPE, typename T> float wide_as(T x)
{
    if constexpr (VALUE_TYPE == 0) return x;
    if constexpr (VALUE_TYPE == 1) {
        const uint32_t bits = (uint32_t)x << 16;
        float y;
        memcpy(&y, &bits, 4);
        return y;
    }
    _Float16 y;
    memcpy(&y, &x, 2);
    return y;
}

template <int VALUE_TYPE> auto narrow_as(float x)
{
    if constexpr (VALUE_TYPE == 0) {
        return x;
    } else if constexpr (VALUE_TYPE == 1) {
        uint32_t bits;
        memcpy(&bits, &x, 4);
        return (unsigned short)(x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    } else {
        const _Float16 y = x;
        unsigned short bits;
        memcpy(&bits, &y, 2);
        return bits;
    }
}

// What weights.cu uses beside that.
using std::min;

inline unsigned two_halves(float a, float b)
{
    const _Float16 both[2] = {(_Float16)a, (_Float16)b};
    unsigned bits;
    memcpy(&bits, both, 4);
    return bits;
}

inline float half_of(unsigned both, int i)
{
    const unsigned short bits = both >> 16 * i;
    _Float16 x;
    memcpy(&x, &bits, 2);
    return x;
}

inline void follow() {}
inline unsigned halves_fp8(unsigned both) { return two_fp8(half_of(both, 0), half_of(both, 1)); }

inline unsigned transposed(unsigned pair)
{
    const int lane = threadIdx.x % 32;
    return among(pair, [=](const unsigned *lanes) {
        const unsigned a = lanes[lane % 4 * 8 + lane / 8], b = lanes[lane % 4 * 8 + 4 + lane / 8];
        return (a >> lane / 4 % 2 * 16 & 0xffff) | b >> lane / 4 % 2 * 16 << 16;
    });
}

#define DYNAMIC(type, name) static type name[48 * 1024 / sizeof(type)]

inline unsigned add_halves(unsigned a, unsigned b, unsigned c)
{
    return two_halves(half_of(a, 0) * half_of(b, 0) + half_of(c, 0), half_of(a, 1) * half_of(b, 1) + half_of(c, 1));
}

inline unsigned multiply_halves(unsigned a, unsigned b)
{
    return two_halves(half_of(a, 0) * half_of(b, 0), half_of(a, 1) * half_of(b, 1));
}
#define two_values(a, b) (narrow(a) | (unsigned)narrow(b) << 16)

inline void multiply_add16(float *c, const unsigned *a, const unsigned *b)
{
    const int row = threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
    const Operands mine = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
    among(mine, [=](const Operands *lanes) {
        for (int i = 0; i < 4; i++)
            for (int k = 0; k < 16; k++) {
                const unsigned left = lanes[row * 4 + k % 8 / 2].a[k / 8 * 2 + i / 2];
                const unsigned right = lanes[(column + i % 2) * 4 + k % 8 / 2].b[k / 8];
                c[i] += half_of(left, k % 2) * half_of(right, k % 2);
            }
        return 0;
    });
}

inline void multiply_add_halves(unsigned *c, const unsigned *a, const unsigned *b)
{
    float sums[4] = {half_of(c[0], 0), half_of(c[0], 1), half_of(c[1], 0), half_of(c[1], 1)};
    multiply_add16(sums, a, b);
    c[0] = two_halves(sums[0], sums[1]);
    c[1] = two_halves(sums[2], sums[3]);
}

static std::function<void()> body;
static std::vector<char> done;

static void enter()
{
    body();
    done[threadIdx.x] = 1;
    yield();
}

static void launch(int columns, int rows, int count, std::function<void()> kernel)
{
    const size_t stack = 1 << 16;
    static std::vector<char> stacks;
    stacks.resize(stack * 1024);
    body = kernel;
    blockDim = {count, 1};
    gridDim = {columns, rows};
    threads.assign(count, ucontext_t());
    for (blockIdx.y = 0; blockIdx.y < rows; blockIdx.y++)
        for (blockIdx.x = 0; blockIdx.x < columns; blockIdx.x++) {
            done.assign(count, 0);
            for (int i = 0; i < count; i++) {
                getcontext(&threads[i]);
                threads[i].uc_stack.ss_sp = stacks.data() + i * stack;
                threads[i].uc_stack.ss_size = stack;
                makecontext(&threads[i], enter, 0);
            }
            for (int left = count; left;) {
                left = 0;
                for (threadIdx.x = 0; threadIdx.x < count; threadIdx.x++)
                    if (!done[threadIdx.x]) {
                        swapcontext(&scheduler, &threads[threadIdx.x]);
                        left += !done[threadIdx.x];
                    }
            }
        }
}
