// The loss of Conv4 on one task, its gradient and its Hessian-vector product, on the CPU; and its body alone, the features and
// the gradient that theirs brings to the weights. native.py compiles and calls it.
//
// One thread takes one task at a time through everything, so that the task's activations stay in the core's cache; that is
// what makes it faster than PyTorch's operators, which take all tasks through one layer. Only standard C++17, OpenMP and
// GCC's vector types. A task is computed by one thread in one order, so its bits do not depend on the others or on scheduling.
//
// The Hessian-vector product is the derivative of the gradient's computation along v, forward over reverse: beside every
// quantity a there is a_dot = d a(weights + e v) / d e. Nothing is kept between calls, but for the body's maps, which its
// caller keeps.
//
// Layout. Maps are rows (image, height, width) of C channels. A kernel is (C out, 9 taps, depth in), as in Conv4.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#else
static int omp_get_thread_num() { return 0; } // a compiler without OpenMP: one thread
#endif

namespace {

constexpr int C = 64;       // filters
constexpr int LAYERS = 4;   // convolutions
constexpr int WEIGHTS = 14; // kernel, gamma and beta of each layer, then the head's weight and bias
constexpr int HEAD = 12, BIAS = 13;
constexpr double EPS = 1e-5; // of batch norm

} // namespace

// What a call is about; the same structure stands in native.py. `stride` is the distance from one task's weights to the
// next one's, in numbers; 0 where all tasks share them.
// The body alone goes up in one call, which writes `features`, and down in another, which reads `from_features`.
struct Problem {
    int64_t tasks, images, size, way, known, skip, mean, threads;
    const void* x;               // (tasks, images, size, size)
    const int64_t* y;            // (tasks, images)
    const void* gout;            // (tasks,) factor of each task's loss; null: 1
    void* loss;                  // (tasks,) the loss; with tangents, its slope along them
    const void* weight[WEIGHTS]; // (tasks, *shape)
    int64_t stride[WEIGHTS];
    const void* tangent[WEIGHTS]; // (tasks, *shape) v; null: the gradient is wanted, not the Hessian-vector product
    int64_t tangent_stride[WEIGHTS];
    void* result[WEIGHTS]; // (tasks, *shape) gout times gradient, or gout times H v; null where not wanted
    void* features;            // (tasks, images, width) of the body alone
    const void* from_features; // likewise, the gradient with respect to them
    void* kept;                // (tasks, room) maps of the way up for the way down; null where nothing comes down
    int64_t room;              // numbers of a task in `kept`, see `lend`
};

namespace {

// ------------------------------------------------------------------------------------------------ vectors
// A Block is as many channels as the innermost loops hold in registers: 4 vectors with AVX-512's 32 registers, 2 with 16.
#if defined(__AVX512F__)
constexpr int BYTES = 64, VECTORS = 4;
#elif defined(__AVX__)
constexpr int BYTES = 32, VECTORS = 2;
#else
constexpr int BYTES = 16, VECTORS = 2;
#endif

// Loops over the vectors of a Block, and over Blocks, must vanish for their arrays to become registers.
#define UNROLL _Pragma("GCC unroll 10")

template <class T> struct Block {
    typedef T V __attribute__((vector_size(BYTES)));
    typedef V Unaligned __attribute__((aligned(sizeof(T)), may_alias));
    static constexpr int LANES = BYTES / sizeof(T), WIDTH = VECTORS * LANES;
    static_assert(C % WIDTH == 0, "blocks must fill a row");
    V v[VECTORS];

    Block() : v{} {}
    explicit Block(const T* from) {
        UNROLL for (int n = 0; n < VECTORS; n++) v[n] = reinterpret_cast<const Unaligned*>(from)[n];
    }
    void store(T* to) const {
        UNROLL for (int n = 0; n < VECTORS; n++) reinterpret_cast<Unaligned*>(to)[n] = v[n];
    }
    template <class F> Block each(F f) const {
        Block out;
        UNROLL for (int n = 0; n < VECTORS; n++) out.v[n] = f(v[n], n);
        return out;
    }
    Block operator+(const Block& o) const { return each([&](V a, int n) { return a + o.v[n]; }); }
    Block operator-(const Block& o) const { return each([&](V a, int n) { return a - o.v[n]; }); }
    Block operator*(const Block& o) const { return each([&](V a, int n) { return a * o.v[n]; }); }
    Block operator*(T s) const { return each([&](V a, int) { return a * s; }); }
    void operator+=(const Block& o) { *this = *this + o; }
    // this where y > 0, or y is not a number: a diverged task must show
    Block where_positive(const Block& y) const {
        return each([&](V a, int n) { return y.v[n] <= T(0) ? V{} : a; });
    }
    Block rsqrt() const {
        return each([&](V a, int) {
            for (int i = 0; i < LANES; i++) a[i] = 1 / std::sqrt(a[i]);
            return a;
        });
    }
};

// Memory on cache lines that grows and is used again by the next call; or what a caller lends.
template <class T> class Buffer {
    struct alignas(64) Line { char bytes[64]; };
    std::vector<Line> lines;
    T* lent = nullptr;

public:
    void lend(T* memory) { lent = memory; } // null: its own again
    T* get() { return lent ? lent : reinterpret_cast<T*>(lines.data()); }
    T* get(size_t count) {
        if (lent) return lent;
        size_t needed = (count * sizeof(T) + sizeof(Line) - 1) / sizeof(Line);
        if (lines.size() < needed) lines.resize(needed);
        return get();
    }
    T* zeros(size_t count) { return static_cast<T*>(std::memset(get(count), 0, count * sizeof(T))); }
};

// ------------------------------------------------------------------------------------------------ convolution
// A 3 x 3 convolution of stride 2 and padding 1 is, for each tap, a list of pairs (row of the input, row of the output), and
// a matrix of the kernel. Three sums over these pairs make the convolution and both halves of its derivative:
//   y[out] += x[in] W[tap],    gx[in] += gy[out] W[tap]',    gW[tap] += x[in]' gy[out]
// Pairs outside the image do not exist. The first layer has one tap: its input is patches, made beforehand.

struct Pairs {
    int per_image;
    std::vector<int> in, out; // of a chunk's images, one after the other
};

struct Geometry {
    int depth, stride;            // channels in, and the distance between rows that hold them
    int in_rows, out_rows;        // positions of one image
    int chunk;                    // images that go through all taps together, so that their rows stay near
    std::vector<Pairs> taps;
};

constexpr int PATCH = 16; // a row of patches: nine pixels, 1, and nothing

Geometry geometry(int size, int images, bool first) {
    int half = (size + 1) / 2;
    Geometry g{first ? 10 : C, first ? PATCH : C, first ? half * half : size * size, half * half, 0, {}};
    g.chunk = std::max(1, std::min(images, 256 / g.out_rows));
    for (int tap = 0; tap < (first ? 1 : 9); tap++) {
        Pairs pairs{0, {}, {}};
        for (int b = 0; b < g.chunk; b++)
            for (int i = 0; i < half; i++)
                for (int j = 0; j < half; j++) {
                    int row = 2 * i + tap / 3 - 1, column = 2 * j + tap % 3 - 1, out = (b * half + i) * half + j;
                    if (!first && (row < 0 || row >= size || column < 0 || column >= size)) continue;
                    pairs.in.push_back(first ? out : (b * size + row) * size + column);
                    pairs.out.push_back(out);
                }
        pairs.per_image = int(pairs.in.size()) / g.chunk;
        g.taps.push_back(pairs);
    }
    return g;
}

constexpr int ROWS = 6; // rows of a Block each that are summed in registers
#define NOINLINE __attribute__((noinline)) // inlined, they would have to share the registers with what surrounds them

// to[to_row[r]] += sum over k < depth of from[from_row[r]][k] w[k], for R pairs of rows
template <class T, int R>
NOINLINE void product_tile(const int* to_row, T* to, const int* from_row, const T* from, int from_stride, int depth, const T* w,
             int w_stride) {
    using B = Block<T>;
    const T* a[R];
    for (int r = 0; r < R; r++) a[r] = from + size_t(from_row[r]) * from_stride;
    for (int c = 0; c < C; c += B::WIDTH) {
        B sum[R];
        UNROLL for (int r = 0; r < R; r++) sum[r] = B(to + size_t(to_row[r]) * C + c);
        for (int k = 0; k < depth; k++) {
            B weight(w + size_t(k) * w_stride + c);
            UNROLL for (int r = 0; r < R; r++) sum[r] += weight * a[r][k];
        }
        UNROLL for (int r = 0; r < R; r++) sum[r].store(to + size_t(to_row[r]) * C + c);
    }
}

// the same for any number of pairs
template <class T, int R = ROWS>
void product(int pairs, const int* to_row, T* to, const int* from_row, const T* from, int from_stride, int depth, const T* w,
             int w_stride) {
    int i = 0;
    for (; i + R <= pairs; i += R) product_tile<T, R>(to_row + i, to, from_row + i, from, from_stride, depth, w, w_stride);
    if constexpr (R > 1)
        if (i < pairs) product<T, R - 1>(pairs - i, to_row + i, to, from_row + i, from, from_stride, depth, w, w_stride);
}

// y += conv(x, w); w (taps, depth, C), transposed
template <class T> void convolve(const Geometry& g, int images, const T* x, const T* w, T* y) {
    for (int b = 0; b < images; b += g.chunk) {
        int count = std::min(g.chunk, images - b);
        for (size_t tap = 0; tap < g.taps.size(); tap++) {
            const Pairs& p = g.taps[tap];
            product(count * p.per_image, p.out.data(), y + size_t(b) * g.out_rows * C, p.in.data(),
                    x + size_t(b) * g.in_rows * g.stride, g.stride, g.depth, w + tap * g.depth * C, C);
        }
    }
}

// gx += gradient of conv with respect to x; w (C, taps, C) as the network has it
template <class T> void grad_input(const Geometry& g, int images, const T* gy, const T* w, T* gx) {
    for (int b = 0; b < images; b += g.chunk) {
        int count = std::min(g.chunk, images - b);
        for (size_t tap = 0; tap < g.taps.size(); tap++) {
            const Pairs& p = g.taps[tap];
            product(count * p.per_image, p.in.data(), gx + size_t(b) * g.in_rows * C, p.out.data(),
                    gy + size_t(b) * g.out_rows * C, C, C, w + tap * C, 9 * C);
        }
    }
}

// out[r] += sum over pairs of a[a_row][r] b[b_row], for R values r; b has C channels
template <class T, int R>
NOINLINE void outer_tile(int pairs, const int* a_row, const T* a, int a_stride, const int* b_row,
           const T* b, T* out, int out_stride) {
    using B = Block<T>;
    for (int c = 0; c < C; c += B::WIDTH) {
        B sum[R];
        UNROLL for (int r = 0; r < R; r++) sum[r] = B(out + size_t(r) * out_stride + c);
        for (int i = 0; i < pairs; i++) {
            const T* ai = a + size_t(a_row[i]) * a_stride;
            B bi(b + size_t(b_row[i]) * C + c);
            UNROLL for (int r = 0; r < R; r++) sum[r] += bi * ai[r];
        }
        UNROLL for (int r = 0; r < R; r++) sum[r].store(out + size_t(r) * out_stride + c);
    }
}

// the same for r from `first` to the last
template <class T, int R = ROWS>
void outer_rows(int first, int pairs, const int* a_row, const T* a, int a_stride, int rows, const int* b_row,
           const T* b, T* out, int out_stride) {
    for (; first + R <= rows; first += R)
        outer_tile<T, R>(pairs, a_row, a + first, a_stride, b_row, b, out + size_t(first) * out_stride, out_stride);
    if constexpr (R > 1)
        if (first < rows) outer_rows<T, R - 1>(first, pairs, a_row, a, a_stride, rows, b_row, b, out, out_stride);
}

// out (rows, C) += a' b over the pairs, few at a time: they stay in the first cache for all rows of `out`
template <class T>
void outer(int pairs, const int* a_row, const T* a, int a_stride, int rows, const int* b_row,
           const T* b, T* out, int out_stride) {
    constexpr int FEW = 64;
    for (int i = 0; i < pairs; i += FEW)
        outer_rows(0, std::min(FEW, pairs - i), a_row + i, a, a_stride, rows, b_row + i, b, out, out_stride);
}

// gw += gradient of conv with respect to the kernel, (C, taps, C)
template <class T> void grad_kernel(const Geometry& g, int images, const T* x, const T* gy, T* gw) {
    for (int b = 0; b < images; b += g.chunk) {
        int count = std::min(g.chunk, images - b);
        for (size_t tap = 0; tap < g.taps.size(); tap++) {
            const Pairs& p = g.taps[tap];
            outer(count * p.per_image, p.out.data(), gy + size_t(b) * g.out_rows * C, C, C, p.in.data(),
                  x + size_t(b) * g.in_rows * C, gw + tap * C, 9 * C);
        }
    }
}

// (C, columns) -> (columns, C)
template <class T> void transpose(const T* w, int columns, T* out) {
    constexpr int SIDE = 16;
    for (int k0 = 0; k0 < columns; k0 += SIDE)
        for (int c0 = 0; c0 < C; c0 += SIDE)
            for (int k = k0; k < std::min(columns, k0 + SIDE); k++)
                for (int c = c0; c < c0 + SIDE; c++) out[k * C + c] = w[c * columns + k];
}

// ------------------------------------------------------------------------------------------------ batch norm and ReLU
// Statistics come from the first s of n rows. With m = 1/s on those and 0 elsewhere, and sums over all rows:
//   mu = sum m z,  r = (sum m (z - mu)^2 + eps)^-1/2,  xhat = (z - mu) r,  y = relu(gamma xhat + beta)
// and along v, with p = sum m xhat z_dot (so that r_dot = -r^2 p):
//   xhat_dot = r (z_dot - sum m z_dot - xhat p),  y_dot = [y > 0] (gamma_dot xhat + gamma xhat_dot + beta_dot)

template <class T> struct Maps { // of one layer
    Buffer<T> xhat, y, r, xhat_dot, y_dot;
    alignas(64) T p[C];
};

// z lies in m.xhat and z_dot in m.xhat_dot; both are overwritten
template <class T>
void norm_relu(Maps<T>& m, int n, int s, const T* gamma, const T* beta, const T* gamma_dot, const T* beta_dot) {
    using B = Block<T>;
    T* all_r = m.r.get(C);
    for (int c = 0; c < C; c += B::WIDTH) {
        T *z = m.xhat.get() + c, *y = m.y.get() + c;
        B mean, var;
        for (int i = 0; i < s; i++) mean += B(z + i * C);
        mean = mean * (T(1) / s);
        for (int i = 0; i < s; i++) {
            B d = B(z + i * C) - mean;
            var += d * d;
        }
        B r = var.each([&](typename B::V a, int) { return a / T(s) + T(EPS); }).rsqrt(), g(gamma + c), b(beta + c);
        r.store(all_r + c);
        for (int i = 0; i < n; i++) {
            B xhat = (B(z + i * C) - mean) * r, t = xhat * g + b;
            xhat.store(z + i * C);
            t.where_positive(t).store(y + i * C);
        }
        if (!gamma_dot) continue;

        T *z_dot = m.xhat_dot.get() + c, *y_dot = m.y_dot.get() + c;
        B mean_dot, p, g_dot(gamma_dot + c), b_dot(beta_dot + c);
        for (int i = 0; i < s; i++) {
            B d(z_dot + i * C);
            mean_dot += d;
            p += d * B(z + i * C);
        }
        mean_dot = mean_dot * (T(1) / s);
        p = p * (T(1) / s);
        p.store(m.p + c);
        for (int i = 0; i < n; i++) {
            B xhat(z + i * C), xhat_dot = (B(z_dot + i * C) - mean_dot - xhat * p) * r;
            xhat_dot.store(z_dot + i * C);
            (g_dot * xhat + g * xhat_dot + b_dot).where_positive(B(y + i * C)).store(y_dot + i * C);
        }
    }
}

// Backward of g = dL/dy, with h = g [y > 0], A = sum h, B = sum h xhat, k = gamma r:
//   dL/dz = k (h - m (A + xhat B)),  dL/dgamma = B,  dL/dbeta = A
// and along v, with k_dot = r (gamma_dot - k p), A_dot = sum h_dot, B_dot = sum (h_dot xhat + h xhat_dot):
//   (dL/dz)_dot = k_dot (h - m (A + xhat B)) + k (h_dot - m (A_dot + xhat_dot B + xhat B_dot))
// The rows of g and g_dot are overwritten by dL/dz and (dL/dz)_dot; to_gamma and to_beta get B and A, or B_dot and A_dot.
template <class T>
void norm_relu_backward(Maps<T>& m, int n, int s, const T* gamma, const T* gamma_dot, T* g_rows, T* g_rows_dot, T* to_gamma, T* to_beta) {
    using B = Block<T>;
    for (int c = 0; c < C; c += B::WIDTH) {
        const T *xhat = m.xhat.get() + c, *y = m.y.get() + c;
        T* g = g_rows + c;
        B sum, sum_xhat, r(m.r.get() + c), k = B(gamma + c) * r;
        for (int i = 0; i < n; i++) {
            B h = B(g + i * C).where_positive(B(y + i * C));
            h.store(g + i * C);
            sum += h;
            sum_xhat += h * B(xhat + i * C);
        }
        if (!gamma_dot) {
            if (to_gamma) sum_xhat.store(to_gamma + c);
            if (to_beta) sum.store(to_beta + c);
            for (int i = 0; i < n; i++) {
                B h(g + i * C);
                if (i < s) h = h - (sum + B(xhat + i * C) * sum_xhat) * (T(1) / s);
                (h * k).store(g + i * C);
            }
            continue;
        }
        const T* xhat_dot = m.xhat_dot.get() + c;
        T* g_dot = g_rows_dot + c;
        B sum_dot, sum_xhat_dot, k_dot = (B(gamma_dot + c) - k * B(m.p + c)) * r;
        for (int i = 0; i < n; i++) {
            B h_dot = B(g_dot + i * C).where_positive(B(y + i * C));
            h_dot.store(g_dot + i * C);
            sum_dot += h_dot;
            sum_xhat_dot += h_dot * B(xhat + i * C) + B(g + i * C) * B(xhat_dot + i * C);
        }
        if (to_gamma) sum_xhat_dot.store(to_gamma + c);
        if (to_beta) sum_dot.store(to_beta + c);
        for (int i = 0; i < n; i++) {
            B h(g + i * C), h_dot(g_dot + i * C);
            if (i < s) {
                B x(xhat + i * C), x_dot(xhat_dot + i * C);
                h = h - (sum + x * sum_xhat) * (T(1) / s);
                h_dot = h_dot - (sum_dot + x_dot * sum_xhat + x * sum_xhat_dot) * (T(1) / s);
            }
            (h * k).store(g + i * C);
            (h * k_dot + h_dot * k).store(g_dot + i * C);
        }
    }
}

// ------------------------------------------------------------------------------------------------ first layer
// The images are never differentiated, so batch norm's mean and variance of the linear map P w follow from the mean m and
// covariance S of the patches P: mu = m w, var = w' S w, and convolution, batch norm and ReLU are one product,
//   y = relu([P 1] [w k; beta - mu k]),   r = (w' S w + eps)^-1/2,  k = gamma r
// Backward, from G = [P 1]' (g [y > 0]), with e = G[:9] - m G[9] and a = <w, e>, the derivative by k:
//   dL/dw = k e - gamma r^3 a S w,   dL/dgamma = r a,   dL/dbeta = G[9]
// Along v everything here is differentiated by the product rule, with r_dot = -r^3 <S w, w_dot>.

// The first layer's input: x (images, size, size) -> of every output position its nine neighbours, and 1
template <class T> void patches(int images, int size, const T* x, T* out) {
    int half = (size + 1) / 2;
    for (int b = 0; b < images; b++, x += size * size)
        for (int i = 0; i < half; i++)
            for (int j = 0; j < half; j++, out += PATCH) {
                for (int k = 0; k < 9; k++) {
                    int row = 2 * i + k / 3 - 1, column = 2 * j + k % 3 - 1;
                    bool inside = row >= 0 && row < size && column >= 0 && column < size;
                    out[k] = inside ? x[row * size + column] : 0;
                }
                out[9] = 1;
                for (int k = 10; k < PATCH; k++) out[k] = 0;
            }
}

template <class T> struct First {
    T mean[9], cov[9][9];
    T product[10 * C], product_dot[10 * C], grad[10 * C], grad_dot[10 * C]; // [w k; beta - mu k] and G
    T sw[9][C], sw_dot[9][C], r[C], r_dot[C];                               // S w
};

// Mean and covariance of the first s patches
template <class T> void statistics(First<T>& f, int s, const T* patches) {
    using B = Block<T>;
    constexpr int N = PATCH / B::LANES;
    typename B::V sum[10][N] = {};
    for (const T* row = patches; row < patches + size_t(s) * PATCH; row += PATCH)
        UNROLL for (int j = 0; j < 10; j++)
            UNROLL for (int n = 0; n < N; n++) sum[j][n] += reinterpret_cast<const typename B::Unaligned*>(row)[n] * row[j];
    T sums[10][PATCH];
    std::memcpy(sums, sum, sizeof sums);
    for (int j = 0; j < 9; j++) f.mean[j] = sums[9][j] / s;
    for (int j = 0; j < 9; j++)
        for (int k = 0; k < 9; k++) f.cov[j][k] = sums[j][k] / s - f.mean[j] * f.mean[k];
}

// w (9, C) transposed. Without tangents w_dot is null.
template <class T>
void fold(First<T>& f, const T* w, const T* gamma, const T* beta, const T* w_dot, const T* gamma_dot, const T* beta_dot) {
    for (int c = 0; c < C; c++) {
        T mu = 0, var = 0, mu_dot = 0, half_var_dot = 0;
        for (int j = 0; j < 9; j++) {
            T sw = 0, sw_dot = 0;
            for (int k = 0; k < 9; k++) sw += f.cov[j][k] * w[k * C + c];
            mu += f.mean[j] * w[j * C + c];
            var += w[j * C + c] * sw;
            f.sw[j][c] = sw;
            if (!w_dot) continue;
            for (int k = 0; k < 9; k++) sw_dot += f.cov[j][k] * w_dot[k * C + c];
            mu_dot += f.mean[j] * w_dot[j * C + c];
            half_var_dot += w_dot[j * C + c] * sw;
            f.sw_dot[j][c] = sw_dot;
        }
        const T r = f.r[c] = 1 / std::sqrt(var + T(EPS)), k = gamma[c] * r;
        for (int j = 0; j < 9; j++) f.product[j * C + c] = w[j * C + c] * k;
        f.product[9 * C + c] = beta[c] - mu * k;
        if (!w_dot) continue;
        const T r_dot = f.r_dot[c] = -r * r * r * half_var_dot, k_dot = gamma_dot[c] * r + gamma[c] * r_dot;
        for (int j = 0; j < 9; j++) f.product_dot[j * C + c] = w_dot[j * C + c] * k + w[j * C + c] * k_dot;
        f.product_dot[9 * C + c] = beta_dot[c] - mu_dot * k - mu * k_dot;
    }
}

// From G to the gradients, or along v to theirs; to_w is (C, 9) as the network has it. Null where not wanted.
template <class T>
void unfold(const First<T>& f, const T* w, const T* gamma, const T* w_dot, const T* gamma_dot, T* to_w, T* to_gamma, T* to_beta) {
    for (int c = 0; c < C; c++) {
        const T r = f.r[c], r3 = r * r * r, k = gamma[c] * r;
        T e[9], a = 0, e_dot[9], a_dot = 0;
        for (int j = 0; j < 9; j++) {
            e[j] = f.grad[j * C + c] - f.mean[j] * f.grad[9 * C + c];
            a += w[j * C + c] * e[j];
        }
        if (!w_dot) {
            if (to_w)
                for (int j = 0; j < 9; j++) to_w[c * 9 + j] = k * e[j] - gamma[c] * r3 * a * f.sw[j][c];
            if (to_gamma) to_gamma[c] = r * a;
            if (to_beta) to_beta[c] = f.grad[9 * C + c];
            continue;
        }
        for (int j = 0; j < 9; j++) {
            e_dot[j] = f.grad_dot[j * C + c] - f.mean[j] * f.grad_dot[9 * C + c];
            a_dot += w_dot[j * C + c] * e[j] + w[j * C + c] * e_dot[j];
        }
        const T r_dot = f.r_dot[c], k_dot = gamma_dot[c] * r + gamma[c] * r_dot, q = gamma[c] * r3 * a;
        const T q_dot = gamma_dot[c] * r3 * a + gamma[c] * 3 * r * r * r_dot * a + gamma[c] * r3 * a_dot;
        if (to_w)
            for (int j = 0; j < 9; j++)
                to_w[c * 9 + j] = k_dot * e[j] + k * e_dot[j] - q_dot * f.sw[j][c] - q * f.sw_dot[j][c];
        if (to_gamma) to_gamma[c] = r_dot * a + r * a_dot;
        if (to_beta) to_beta[c] = f.grad_dot[9 * C + c];
    }
}

// to = [y > 0] [P 1] product; y may be `to` itself, and then this is the ReLU
template <class T> void first_up(const Geometry& g, int images, const T* patches, const T* product, const T* y, T* to) {
    using B = Block<T>;
    for (int b = 0; b < images; b += g.chunk) { // while the rows are near
        const size_t count = std::min(g.chunk, images - b), at = size_t(b) * g.out_rows * C, end = at + count * g.out_rows * C;
        std::memset(to + at, 0, (end - at) * sizeof(T));
        convolve(g, int(count), patches + size_t(b) * g.in_rows * PATCH, product, to + at);
        for (size_t i = at; i < end; i += B::WIDTH) B(to + i).where_positive(B(y + i)).store(to + i);
    }
}

// grad = [P 1]' ([y > 0] g); g is overwritten
template <class T> void first_down(const Geometry& g, int images, const T* patches, const T* y, T* gy, T* grad) {
    using B = Block<T>;
    std::memset(grad, 0, 10 * C * sizeof(T));
    const Pairs& p = g.taps[0];
    for (int b = 0; b < images; b += g.chunk) {
        const size_t count = std::min(g.chunk, images - b), at = size_t(b) * g.out_rows * C, end = at + count * g.out_rows * C;
        for (size_t i = at; i < end; i += B::WIDTH) B(gy + i).where_positive(B(y + i)).store(gy + i);
        outer(int(count) * p.per_image, p.in.data(), patches + size_t(b) * g.in_rows * PATCH, PATCH, 10, p.out.data(), gy + at, grad, C);
    }
}

// ------------------------------------------------------------------------------------------------ head
// o = f W' + b;  q = softmax(o);  L = mean over the N images after `skip` of -log q[label]
//   dL/do = (q - onehot) / N,   (dL/do)_dot = q (o_dot - <q, o_dot>) / N,   L_dot = sum <dL/do, o_dot>

template <class T> T dot(int n, const T* a, const T* b) {
    T sum = 0;
    for (int i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

template <class T> void add(int n, T factor, const T* a, T* to) {
    for (int i = 0; i < n; i++) to[i] += factor * a[i];
}

// y (positions, C) of one image -> what the head sees of it: the same numbers, or their mean (C)
template <class T> const T* features(bool mean, int positions, const T* y, T* room) {
    if (!mean) return y;
    std::memset(room, 0, C * sizeof(T));
    for (int i = 0; i < positions; i++) add(C, T(1) / positions, y + i * C, room);
    return room;
}

// The transposed map: from a gradient with respect to the features to one with respect to y
template <class T> void spread(bool mean, int positions, T* y) {
    if (!mean) return;
    for (int c = 0; c < C; c++) y[c] /= positions;
    for (int i = 1; i < positions; i++) std::memcpy(y + i * C, y, C * sizeof(T));
}

// ------------------------------------------------------------------------------------------------ a task
// What the tasks of a call share: geometry, and transposed kernels where all tasks have the same weights.
template <class T> struct Shared {
    Geometry layer[LAYERS];
    Buffer<T> kernel[LAYERS], tangent[LAYERS];
};

// A thread's memory. It grows to the largest problem seen: some five times the first layer's maps.
template <class T> struct Workspace {
    Maps<T> maps[LAYERS];
    First<T> first;
    Buffer<T> patches, kernel[LAYERS], tangent[LAYERS], g[2], g_dot[2], logits, logits_dot, room, room_dot;
};

// What a task keeps lies at `kept`: every layer's y, and but for the first one's xhat and r. Null: in the thread's own memory.
template <class T> void lend(const Shared<T>& shared, Workspace<T>& ws, int images, T* kept) {
    auto next = [&](Buffer<T>& buffer, size_t count) {
        buffer.lend(kept);
        if (kept) kept += count;
    };
    for (int l = 0; l < LAYERS; l++) {
        const size_t numel = size_t(images) * shared.layer[l].out_rows * C;
        next(ws.maps[l].y, numel);
        if (l) next(ws.maps[l].xhat, numel);
        if (l) next(ws.maps[l].r, C);
    }
}

template <class T> const T* part(const void* base, int64_t stride, int64_t t) {
    return static_cast<const T*>(base) + stride * t;
}

// The head of a task, up and down: its loss, and the gradient to the last maps, into zeros. Images before `skip` only lend
// their statistics.
template <class T>
void head(const Problem& P, Workspace<T>& ws, int64_t t, int last, int width, const T* const* w, const T* const* v, T* const* out,
          bool backward, T* g, T* g_dot) {
    const int images = int(P.images), way = int(P.way), positions = images - int(P.skip);
    const bool second = P.tangent[0];
    const T gout = P.gout ? static_cast<const T*>(P.gout)[t] : T(1);
    const int64_t* label = P.y + t * images;
    T *o = ws.logits.get(way), *o_dot = ws.logits_dot.get(way), *room = ws.room.get(C), *room_dot = ws.room_dot.get(C);
    T loss = 0, slope = 0;
    for (int b = int(P.skip); b < images; b++) {
        const size_t at = size_t(b) * last * C;
        const T* f = features(P.mean, last, ws.maps[LAYERS - 1].y.get() + at, room);
        T top = -INFINITY, sum = 0;
        for (int j = 0; j < way; j++) {
            o[j] = w[BIAS][j] + dot(width, f, w[HEAD] + j * width);
            top = o[j] <= top ? top : o[j];
        }
        for (int j = 0; j < way; j++) sum += std::exp(o[j] - top);
        loss += (std::log(sum) + top - o[label[b]]) / positions;
        if (!backward) continue;
        for (int j = 0; j < way; j++) o[j] = std::exp(o[j] - top) / sum; // q from here on
        if (second) {
            const T* f_dot = features(P.mean, last, ws.maps[LAYERS - 1].y_dot.get() + at, room_dot);
            T mean = 0;
            for (int j = 0; j < way; j++) {
                o_dot[j] = v[BIAS][j] + dot(width, f, v[HEAD] + j * width) + dot(width, f_dot, w[HEAD] + j * width);
                mean += o[j] * o_dot[j];
            }
            slope += (mean - o_dot[label[b]]) / positions;
            for (int j = 0; j < way; j++) {
                T d = (o[j] - (j == label[b])) * gout / positions, d_dot = o[j] * (o_dot[j] - mean) * gout / positions;
                if (out[BIAS]) out[BIAS][j] += d_dot;
                if (out[HEAD]) {
                    add(width, d_dot, f, out[HEAD] + j * width);
                    add(width, d, f_dot, out[HEAD] + j * width);
                }
                add(width, d, w[HEAD] + j * width, g + at);
                add(width, d_dot, w[HEAD] + j * width, g_dot + at);
                add(width, d, v[HEAD] + j * width, g_dot + at);
            }
            spread(P.mean, last, g_dot + at);
        } else {
            for (int j = 0; j < way; j++) {
                T d = (o[j] - (j == label[b])) * gout / positions;
                if (out[BIAS]) out[BIAS][j] += d;
                if (out[HEAD]) add(width, d, f, out[HEAD] + j * width);
                add(width, d, w[HEAD] + j * width, g + at);
            }
        }
        spread(P.mean, last, g + at);
    }
    static_cast<T*>(P.loss)[t] = second ? slope : loss;
}

template <class T> void run_task(const Problem& P, Shared<T>& shared, Workspace<T>& ws, int64_t t) {
    const int images = P.images, way = P.way, last = shared.layer[LAYERS - 1].out_rows;
    const int width = P.mean ? C : last * C; // features
    const bool second = P.tangent[0];
    const T *w[WEIGHTS], *v[WEIGHTS];
    T* out[WEIGHTS];
    int lowest = LAYERS + 1; // the layer at which the way down ends; the head counts as one
    for (int i = WEIGHTS - 1; i >= 0; i--) {
        const int64_t numel = i == BIAS ? way : i == HEAD ? way * width : i % 3 ? C : C * (i ? 9 * C : 9);
        w[i] = part<T>(P.weight[i], P.stride[i], t);
        v[i] = second ? part<T>(P.tangent[i], P.tangent_stride[i], t) : nullptr;
        out[i] = P.result[i] ? static_cast<T*>(P.result[i]) + numel * t : nullptr;
        if (out[i]) lowest = std::min(i / 3, LAYERS);
        if (out[i]) std::memset(out[i], 0, numel * sizeof(T));
    }
    const bool backward = lowest <= LAYERS;

    // up: activations, and along v; on a way down alone they are there
    const bool kept = P.from_features;
    lend(shared, ws, images, P.kept ? static_cast<T*>(P.kept) + t * P.room : nullptr);
    T* input = ws.patches.get(size_t(images) * shared.layer[0].in_rows * PATCH);
    patches(images, int(P.size), static_cast<const T*>(P.x) + t * images * P.size * P.size, input);
    for (int l = 0; l < LAYERS; l++) {
        const Geometry& g = shared.layer[l];
        Maps<T>& m = ws.maps[l];
        const int columns = l ? 9 * C : 9, n = images * g.out_rows;
        auto transposed = [&](const T* kernel, int64_t stride, Buffer<T>& common, Buffer<T>& own) {
            if (stride == 0) return common.get();
            transpose(kernel, columns, own.get(size_t(columns) * C));
            return own.get();
        };
        const T* kernel = transposed(w[3 * l], P.stride[3 * l], shared.kernel[l], ws.kernel[l]);
        const T* tangent = second ? transposed(v[3 * l], P.tangent_stride[3 * l], shared.tangent[l], ws.tangent[l]) : nullptr;
        T *y = m.y.get(size_t(n) * C), *y_dot = second ? m.y_dot.get(size_t(n) * C) : nullptr;
        if (l == 0) {
            statistics(ws.first, int(P.known) * g.out_rows, input);
            fold(ws.first, kernel, w[1], w[2], tangent, v[1], v[2]);
            if (kept) break;
            first_up<T>(g, images, input, ws.first.product, y, y);
            if (second) first_up<T>(g, images, input, ws.first.product_dot, y, y_dot);
            continue;
        }
        const T *x = ws.maps[l - 1].y.get(), *x_dot = ws.maps[l - 1].y_dot.get();
        convolve(g, images, x, kernel, m.xhat.zeros(size_t(n) * C));
        if (second) {
            T* z_dot = m.xhat_dot.zeros(size_t(n) * C);
            convolve(g, images, x, tangent, z_dot);
            convolve(g, images, x_dot, kernel, z_dot);
        }
        norm_relu(m, n, int(P.known) * g.out_rows, w[3 * l + 1], w[3 * l + 2], v[3 * l + 1], v[3 * l + 2]);
    }

    // between up and down: the head, or the caller with the features
    const size_t numel = size_t(images) * last * C;
    T *y = ws.maps[LAYERS - 1].y.get(), *g = ws.g[1].zeros(numel), *g_dot = second ? ws.g_dot[1].zeros(numel) : nullptr;
    for (int b = 0; b < images && P.features; b++) {
        const T* f = features(P.mean, last, y + size_t(b) * last * C, ws.room.get(C));
        std::memcpy(static_cast<T*>(P.features) + (t * images + b) * width, f, width * sizeof(T));
    }
    for (int b = 0; b < images && P.from_features; b++) {
        T* to = g + size_t(b) * last * C;
        std::memcpy(to, static_cast<const T*>(P.from_features) + (t * images + b) * width, width * sizeof(T));
        spread(P.mean, last, to);
    }
    if (!P.features && !P.from_features) head(P, ws, t, last, width, w, v, out, backward, g, g_dot);

    // down: gradients, and along v. Nothing comes down from a head of zero, as head_init zero has it at a task's start: then
    // the gradient is done, and along v the products of g are left out.
    const bool silent = std::all_of(g, g + size_t(images) * last * C, [](T value) { return value == 0; });
    for (int l = LAYERS - 1; l >= lowest && (second || !silent); l--) {
        const Geometry& geo = shared.layer[l];
        if (l == 0) {
            const T* y = ws.maps[0].y.get();
            first_down<T>(geo, images, input, y, g, ws.first.grad);
            if (second) first_down<T>(geo, images, input, y, g_dot, ws.first.grad_dot);
            const T* kernel = P.stride[0] ? ws.kernel[0].get() : shared.kernel[0].get();
            const T* tangent = !second ? nullptr : P.tangent_stride[0] ? ws.tangent[0].get() : shared.tangent[0].get();
            unfold(ws.first, kernel, w[1], tangent, v[1], out[0], out[1], out[2]);
            break;
        }
        norm_relu_backward(ws.maps[l], images * geo.out_rows, int(P.known) * geo.out_rows, w[3 * l + 1], v[3 * l + 1],
                           g, g_dot, out[3 * l + 1], out[3 * l + 2]);
        const T *x = ws.maps[l - 1].y.get(), *x_dot = ws.maps[l - 1].y_dot.get(), *gz = g, *gz_dot = g_dot;
        if (out[3 * l]) {
            grad_kernel(geo, images, x, second ? gz_dot : gz, out[3 * l]);
            if (second && !silent) grad_kernel(geo, images, x_dot, gz, out[3 * l]);
        }
        if (l == lowest) break;
        g = ws.g[l % 2 ? 0 : 1].zeros(size_t(images) * geo.in_rows * C);
        if (!silent) grad_input(geo, images, gz, w[3 * l], g);
        if (second) {
            g_dot = ws.g_dot[l % 2 ? 0 : 1].zeros(size_t(images) * geo.in_rows * C);
            grad_input(geo, images, gz_dot, w[3 * l], g_dot);
            if (!silent) grad_input(geo, images, gz, v[3 * l], g_dot);
        }
    }
}

template <class T> void run(const Problem& P) {
    thread_local Shared<T> own_shared; // memory that is kept for the caller's next call
    thread_local std::vector<Workspace<T>> own_spaces;
    Shared<T>& shared = own_shared; // threads of this call see the caller's, not their own
    std::vector<Workspace<T>>& spaces = own_spaces;
    for (int l = 0, size = int(P.size); l < LAYERS; l++, size = (size + 1) / 2) {
        const int columns = l ? 9 * C : 9;
        shared.layer[l] = geometry(size, int(P.images), l == 0);
        if (P.stride[3 * l] == 0)
            transpose(static_cast<const T*>(P.weight[3 * l]), columns, shared.kernel[l].get(size_t(columns) * C));
        if (P.tangent[0] && P.tangent_stride[3 * l] == 0)
            transpose(static_cast<const T*>(P.tangent[3 * l]), columns, shared.tangent[l].get(size_t(columns) * C));
    }
    const int threads = int(std::min(P.threads, P.tasks));
    if (int(spaces.size()) < threads) spaces.resize(threads);
    // OpenMP's threads are PyTorch's own, where both use the same library. Others would have to compete with PyTorch's, which go
    // on spinning for a while after each of its operators.
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t t = 0; t < P.tasks; t++) run_task(P, shared, spaces[omp_get_thread_num()], t);
}

} // namespace

extern "C" void run_float(const Problem* problem) { run<float>(*problem); }
extern "C" void run_double(const Problem* problem) { run<double>(*problem); }
