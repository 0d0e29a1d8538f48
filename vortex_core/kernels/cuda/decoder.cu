// The kernels of the VAE's decoder in CUDA C, around the library's convolutions; kernels/compiled.py launches them.
// Maps `[1, C, h, w]` have their channels last, C is a power of two from 8 to 2048. A thread takes 8 channels of a pixel.

// A strip with its neighbours' rows and a border of zeros, `[h + 2, w + 2, C]`; with `scale`, after norm and SiLU.
extern "C" __global__ void bordered(
    const value *above, const value *strip, const value *below, const float *scale, const float *shift, value *out,
    int height, int width, int channels)
{
    const int lanes = channels / 8;
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x, pixel = i / lanes;
    const int row = pixel / (width + 2) - 1, column = pixel % (width + 2) - 1, first = i % lanes * 8;
    if (row > height) return;
    float v[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    const value *from = row < 0 ? above : row < height ? strip + (long long)row * width * channels : below;
    if (from && column >= 0 && column < width) {
        load8(v, from + (long long)column * channels + first, 8);
        if (scale) {
#pragma unroll
            for (int k = 0; k < 8; k++) {
                const float x = v[k] * scale[first + k] + shift[first + k];
                v[k] = x / (1 + __expf(-x));
            }
        }
    }
    store8(out + 8 * i, v, 8);
}

// `out = found + bias`, with `add` `out += found + bias`. Pixel (r, c) of `[height, width]` goes to row `r * row_step` and
// column `c * column_step` of `out`, and comes from (r, c) of `found`; pitches are in values. The last channels may be no
// multiple of 8.
extern "C" __global__ void finish(
    const value *found, long long row_pitch, long long pitch, const value *bias, value *out, long long out_row,
    long long out_column, int height, int width, int channels, int add)
{
    const int lanes = (channels + 7) / 8;
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x, pixel = i / lanes;
    const int row = pixel / width, column = pixel % width, first = i % lanes * 8, count = channels - first;
    if (row >= height) return;
    float v[8], other[8];
    load8(v, found + row * row_pitch + column * pitch + first, count);
    load8(other, bias + first, count);
#pragma unroll
    for (int k = 0; k < 8; k++) v[k] += other[k];
    value *to = out + row * out_row + column * out_column + first;
    if (add) {
        load8(other, to, count);
#pragma unroll
        for (int k = 0; k < 8; k++) v[k] += other[k];
    }
    store8(to, v, count);
}

// Count, mean and sum of squares about the mean of each group, of 64 * blockDim.x values: a part for each block. The
// channels fit into one turn of a block's threads, so each thread sees the same 8 in all of its turns.
extern "C" __global__ void __launch_bounds__(256) moments(
    const value *x, long long values, int channels, int groups, float *out, int first_part, int capacity)
{
    __shared__ float part[8][256];
    __shared__ float group_mean[256];
    const int width = channels / groups, lanes = channels / 8;
    const int helpers = blockDim.x / groups < 32 ? blockDim.x / groups : 32;  // threads that sum up a group
    const int group = threadIdx.x / helpers;
    const int first = threadIdx.x % lanes * 8;
    const long long start = (long long)blockIdx.x * blockDim.x * 64;
    const long long left = (values - start < blockDim.x * 64 ? values - start : blockDim.x * 64) / channels;
    const float count = (float)left * width;  // of a group
    float v[8][8], sum[8];
#pragma unroll
    for (int k = 0; k < 8; k++) {
        const long long i = start + 8LL * (k * blockDim.x + threadIdx.x);
        load8(v[k], x + i, i < values ? 8 : 0);
    }
    for (int turn = 0; turn < 2; turn++) {  // the sums; then those of squares about the mean
        for (int k = 0; k < 8; k++) sum[k] = 0;
#pragma unroll
        for (int k = 0; k < 8; k++) {
            if (start + 8LL * (k * blockDim.x + threadIdx.x) >= values) continue;
#pragma unroll
            for (int j = 0; j < 8; j++) {
                const float off = turn ? v[k][j] - group_mean[(first + j) / width] : v[k][j];
                sum[j] += turn ? off * off : off;
            }
        }
#pragma unroll
        for (int j = 0; j < 8; j++) part[j][threadIdx.x] = sum[j];
        __syncthreads();
        float all = 0;
        if (group < groups)
            for (int i = threadIdx.x % helpers; i < width * (blockDim.x / lanes); i += helpers) {
                const int channel = group * width + i % width;
                all += part[channel % 8][channel / 8 + i / width * lanes];
            }
        for (int away = helpers / 2; away; away /= 2) all += __shfl_xor_sync(0xffffffffu, all, away);
        if (group < groups && threadIdx.x % helpers == 0) {
            float *to = out + (long long)group * capacity + first_part + blockIdx.x;
            if (turn) {
                to[2LL * groups * capacity] = all;
            } else {
                group_mean[group] = all / count;
                to[0] = count;
                to[1LL * groups * capacity] = all / count;
            }
        }
        __syncthreads();
    }
}

// The parts of a group joined, to scale and shift of its channels: a block for each group.
extern "C" __global__ void __launch_bounds__(256) terms(
    const float *parts, int count, int capacity, int groups, const value *weight, const value *bias, float epsilon,
    float *out, int channels)
{
    const float *n = parts + (long long)blockIdx.x * capacity, *mean = n + (long long)groups * capacity;
    const float *square = mean + (long long)groups * capacity;
    float total = 0, sum = 0;
    for (int i = threadIdx.x; i < count; i += blockDim.x) {
        total += n[i];
        sum += n[i] * mean[i];
    }
    total = block_sum(total);
    const float joint = block_sum(sum) / total;
    sum = 0;
    for (int i = threadIdx.x; i < count; i += blockDim.x)
        sum += square[i] + n[i] * (mean[i] - joint) * (mean[i] - joint);
    const float inverse = rsqrtf(block_sum(sum) / total + epsilon);
    const int width = channels / groups;
    for (int i = threadIdx.x; i < width; i += blockDim.x) {
        const int channel = blockIdx.x * width + i;
        const float scale = wide(weight[channel]) * inverse;
        out[channel] = scale;
        out[channels + channel] = wide(bias[channel]) - joint * scale;
    }
}

// A 3 x 3 convolution `[N, C, 3, 3]` of a picture whose pixels are doubled, as 2 x 2 taps on the small one for each corner
// of a pixel: `[2, 2, N, 2, 2, C]`. Of the three taps in a row or column two see the same pixel; those are added up.
extern "C" __global__ void corners(
    const value *weight, long long stride_n, long long stride_c, long long stride_y, long long stride_x, value *out,
    int wide_channels, int channels)
{
    const long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x;
    const int c = i % channels, u = i / channels % 2, t = i / channels / 2 % 2;
    const int n = i / channels / 4 % wide_channels, corner = i / channels / 4 / wide_channels;
    if (corner > 3) return;
    const int lower = corner / 2, right = corner % 2;
    float sum = 0;
    for (int y = lower ? 2 * t : t; y <= (lower ? t + 1 : 2 * t); y++)
        for (int x = right ? 2 * u : u; x <= (right ? u + 1 : 2 * u); x++)
            sum += wide(weight[n * stride_n + c * stride_c + y * stride_y + x * stride_x]);
    out[i] = narrow(sum);
}
