// Log-probs, entropies and their gradient from logits: one read of each row.
//
// Why online: sum e^(x - max) needs the maximum, so a row (300 kB of Qwen's 151,936 logits) would be read twice. Carrying
// the maximum along, and rescaling the sums when it grows, reads it once. Why one block a row: its threads' sums meet in
// shared memory, and thousands of rows fill any card. What limits it: reading. So a thread takes 32 bytes at a time,
// branch-free. TYPE: 0 float32, 1 bfloat16; Bits: an unsigned integer of that size.

// bfloat16 is the upper half of a float32, rounded to the nearest, ties to even
__device__ float decode(Bits b) { return __uint_as_float((unsigned)b << 16 * TYPE); }
__device__ Bits encode(float x) {
    unsigned b = __float_as_uint(x);
    return TYPE == 0 ? b : x != x ? 0x7fff : (b + 0x7fff + (b >> 16 & 1)) >> 16;
}
const int PACK = 32 / sizeof(Bits);
union Pack { uint4 loads[2]; Bits at[PACK]; };
__device__ int packs(const Bits *x, int V) { return (size_t)x % 16 ? 0 : V / PACK; }  // the rest goes one by one

struct Sums { float max, s, u; };  // the largest x; the sums of e^(t (x - max)) and of (x - max) e^(t (x - max))
__device__ Sums merged(Sums a, Sums b, float k) {  // the online step
    float max = fmaxf(a.max, b.max), p = exp2f(k * (a.max - max)), q = exp2f(k * (b.max - max));  // fmaxf drops NaN, s does not
    float u = p > 0 ? p * (a.u + (a.max - max) * a.s) : 0, v = q > 0 ? q * (b.u + (b.max - max) * b.s) : 0;
    return {max, p * a.s + q * b.s, u + v};
}

// Of each row of logits (N, V) times t: log-prob of ids, entropy in nats, max, log s
extern "C" __global__ void forward(const Bits *logits, const long long *ids, float4 *out, int V, double scale) {
    const Bits *x = logits + (size_t)blockIdx.x * V;  // 64 bits: N V passes 2^31
    const float t = scale, k = t * 1.44269504f;  // e^(t x) = 2^(k x)
    Sums a = {-3.4e38f, 0, 0};  // not -inf: -inf - -inf is NaN
    for (int i = threadIdx.x; i < packs(x, V); i += blockDim.x) {
        Pack p = ((const Pack *)x)[i];
        Sums b = {-3.4e38f, 0, 0};
        for (int j = 0; j < PACK; j++) b.max = fmaxf(b.max, decode(p.at[j]));
        for (int j = 0; j < PACK; j++) {
            float d = decode(p.at[j]) - b.max, e = exp2f(k * d);
            b.s += e, b.u += fmaxf(d, -3.4e38f) * e;  // of -inf: 0, not NaN
        }
        a = merged(a, b, k);
    }
    for (int i = packs(x, V) * PACK + threadIdx.x; i < V; i += blockDim.x) a = merged(a, {decode(x[i]), 1, 0}, k);
    __shared__ Sums all[512];
    all[threadIdx.x] = a;
    for (int half = blockDim.x / 2; half; half /= 2) {
        __syncthreads();
        if (threadIdx.x < half) all[threadIdx.x] = a = merged(a, all[threadIdx.x + half], k);
    }
    float logp = t * (decode(x[ids[blockIdx.x]]) - a.max) - logf(a.s), entropy = logf(a.s) - t * a.u / a.s;
    if (threadIdx.x == 0) out[blockIdx.x] = {logp, entropy, a.max, logf(a.s)};
}

// The gradient of g logprob + h entropy, t (g [i = id] - p_i (g + h (log p_i + entropy))), takes the place of logit i
extern "C" __global__ void backward(Bits *logits, const long long *ids, const float4 *out, const float *g, const float *h,
                                    int V, double scale) {
    Bits *x = logits + (size_t)blockIdx.x * V;
    const float t = scale, G = g[blockIdx.x], H = h[blockIdx.x];
    const float entropy = out[blockIdx.x].y, max = out[blockIdx.x].z, log_s = out[blockIdx.x].w;
    auto gradient = [=, id = ids[blockIdx.x]](Bits b, int i) {
        float logp = fmaxf(t * (decode(b) - max) - log_s, -1e30f), p = exp2f(1.44269504f * logp);
        return encode(t * ((i == id ? G : 0) - p * (G + H * (logp + entropy))));
    };
    for (int i = threadIdx.x; i < packs(x, V); i += blockDim.x) {
        Pack p = ((Pack *)x)[i];
        for (int j = 0; j < PACK; j++) p.at[j] = gradient(p.at[j], i * PACK + j);
        ((Pack *)x)[i] = p;
    }
    for (int i = packs(x, V) * PACK + threadIdx.x; i < V; i += blockDim.x) x[i] = gradient(x[i], i);
}
