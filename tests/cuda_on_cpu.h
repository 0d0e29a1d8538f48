// CUDA's words for a C++ compiler, so that kernels run on the CPU: a block after the other, its threads in turn.
// A thread runs until it waits for others. It includes no more of CUDA than the kernels use.
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
#define __launch_bounds__(threads)
#define wide(x) wide_as<VALUE>(x)
#define narrow(x) narrow_as<VALUE>(x)

struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct Index { int x, y; };
static Index threadIdx, blockIdx, blockDim;

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
static float exchanged[1024];

inline void __syncthreads() { block_barrier.wait(blockDim.x); }

inline float __shfl_xor_sync(unsigned, float x, int away)
{
    const int self = threadIdx.x;
    exchanged[self] = x;
    warp_barriers[self / 32].wait(32);
    const float found = exchanged[self ^ away];
    warp_barriers[self / 32].wait(32);
    return found;
}

inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }

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
