// logprobs.cu with stand-ins for the words of CUDA: a block is 64 threads of a CPU. on_cpu.py compiles it.
#include <barrier>
#include <cmath>
#include <cstring>
#include <thread>
#include <vector>
#define __device__ static
#define __global__
#define __shared__ static

struct alignas(16) float4 { float x, y, z, w; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct { unsigned x; } blockIdx, blockDim = {64};
thread_local struct { unsigned x; } threadIdx;
std::barrier<> block(64);

float __uint_as_float(unsigned b) { float x; memcpy(&x, &b, 4); return x; }
unsigned __float_as_uint(float x) { unsigned b; memcpy(&b, &x, 4); return b; }
void __syncthreads() { block.arrive_and_wait(); }

template <class F> void launch(int rows, F kernel) {
    for (blockIdx.x = 0; blockIdx.x < rows; blockIdx.x++) {
        std::vector<std::thread> threads;
        for (unsigned t = 0; t < 64; t++) threads.emplace_back([=] { threadIdx.x = t; kernel(); });
        for (auto &thread : threads) thread.join();
    }
}

#include "logprobs.cu"

extern "C" void run_forward(int N, Bits *x, long long *ids, float4 *out, int V, double t) {
    launch(N, [=] { forward(x, ids, out, V, t); });
}
extern "C" void run_backward(int N, Bits *x, long long *ids, float4 *out, float *g, float *h, int V, double t) {
    launch(N, [=] { backward(x, ids, out, g, h, V, t); });
}
