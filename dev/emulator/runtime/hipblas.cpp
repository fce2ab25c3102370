// A libhipblas for programs that run on the emulator: matrix products on the host, in float32. Device memory is host memory there.
//
// Without hipBLAS's header, whose types of enumerations differ between versions; the values of both families are known here.

#include <cstdint>

namespace {

constexpr int SUCCESS = 0, NOT_SUPPORTED = 7, TRANSPOSED = 112;

enum class Kind { F32, F16, BF16, OTHER };

Kind kind_of(int type) {
    switch (type) {
        case 0:    // HIP_R_32F
        case 151:  // HIPBLAS_R_32F
            return Kind::F32;
        case 2:    // HIP_R_16F
        case 150:  // HIPBLAS_R_16F
            return Kind::F16;
        case 14:   // HIP_R_16BF
        case 168:  // HIPBLAS_R_16B
            return Kind::BF16;
        default:
            return Kind::OTHER;
    }
}

// HIPBLAS_COMPUTE_16F or HIPBLAS_R_16F: then alpha and beta are halves, too.
bool computes_in_half(int compute) {
    return compute == 0 || compute == 150;
}

float load(const void * data, Kind kind, int64_t index) {
    switch (kind) {
        case Kind::F32:
            return static_cast<const float *>(data)[index];
        case Kind::F16:
            return static_cast<const _Float16 *>(data)[index];
        default:
            return static_cast<const __bf16 *>(data)[index];
    }
}

void store(void * data, Kind kind, int64_t index, float value) {
    switch (kind) {
        case Kind::F32:
            static_cast<float *>(data)[index] = value;
            break;
        case Kind::F16:
            static_cast<_Float16 *>(data)[index] = value;
            break;
        default:
            static_cast<__bf16 *>(data)[index] = value;
    }
}

struct Matrix {
    const void * data;
    Kind         kind;
    int64_t      row, column;  // strides

    Matrix(const void * data, int type, int lead, bool transposed) :
        data(data),
        kind(kind_of(type)),
        row(transposed ? lead : 1),
        column(transposed ? 1 : lead) {}

    float at(int64_t i, int64_t j) const { return load(data, kind, i * row + j * column); }
};

// c[m, n] = alpha * a[m, k] * b[k, n] + beta * c, column by column
void multiply(int            m,
              int            n,
              int            k,
              float          alpha,
              const Matrix & a,
              const Matrix & b,
              float          beta,
              void *         c,
              int            type,
              int            lead) {
    for (int j = 0; j < n; j++) {
        for (int i = 0; i < m; i++) {
            float sum = 0;
            for (int l = 0; l < k; l++) {
                sum += a.at(i, l) * b.at(l, j);
            }
            const int64_t index  = i + int64_t(j) * lead;
            const float   before = beta == 0 ? 0 : beta * load(c, kind_of(type), index);
            store(c, kind_of(type), index, alpha * sum + before);
        }
    }
}

const void * offset(const void * data, int type, int64_t elements) {
    return static_cast<const char *>(data) + elements * (kind_of(type) == Kind::F32 ? 4 : 2);
}

constexpr int F32_TYPE = 151;

}  // namespace

extern "C" {

int hipblasCreate(void ** handle) {
    *handle = new char;
    return SUCCESS;
}

int hipblasDestroy(void * handle) {
    delete static_cast<char *>(handle);
    return SUCCESS;
}

int hipblasSetStream(void *, void *) {
    return SUCCESS;
}

int hipblasGemmEx(void *,
                  int          op_a,
                  int          op_b,
                  int          m,
                  int          n,
                  int          k,
                  const void * alpha,
                  const void * a,
                  int          type_a,
                  int          lead_a,
                  const void * b,
                  int          type_b,
                  int          lead_b,
                  const void * beta,
                  void *       c,
                  int          type_c,
                  int          lead_c,
                  int          compute,
                  int) {
    const Kind scalar = computes_in_half(compute) ? Kind::F16 : Kind::F32;
    multiply(m, n, k, load(alpha, scalar, 0), { a, type_a, lead_a, op_a == TRANSPOSED },
             { b, type_b, lead_b, op_b == TRANSPOSED }, load(beta, scalar, 0), c, type_c, lead_c);
    return SUCCESS;
}

int hipblasGemmStridedBatchedEx(void *       handle,
                                int          op_a,
                                int          op_b,
                                int          m,
                                int          n,
                                int          k,
                                const void * alpha,
                                const void * a,
                                int          type_a,
                                int          lead_a,
                                long long    stride_a,
                                const void * b,
                                int          type_b,
                                int          lead_b,
                                long long    stride_b,
                                const void * beta,
                                void *       c,
                                int          type_c,
                                int          lead_c,
                                long long    stride_c,
                                int          count,
                                int          compute,
                                int          algorithm) {
    for (int i = 0; i < count; i++) {
        hipblasGemmEx(handle, op_a, op_b, m, n, k, alpha, offset(a, type_a, i * stride_a), type_a, lead_a,
                      offset(b, type_b, i * stride_b), type_b, lead_b, beta,
                      const_cast<void *>(offset(c, type_c, i * stride_c)), type_c, lead_c, compute, algorithm);
    }
    return SUCCESS;
}

int hipblasGemmBatchedEx(void *               handle,
                         int                  op_a,
                         int                  op_b,
                         int                  m,
                         int                  n,
                         int                  k,
                         const void *         alpha,
                         const void * const * a,
                         int                  type_a,
                         int                  lead_a,
                         const void * const * b,
                         int                  type_b,
                         int                  lead_b,
                         const void *         beta,
                         void * const *       c,
                         int                  type_c,
                         int                  lead_c,
                         int                  count,
                         int                  compute,
                         int                  algorithm) {
    for (int i = 0; i < count; i++) {
        hipblasGemmEx(handle, op_a, op_b, m, n, k, alpha, a[i], type_a, lead_a, b[i], type_b, lead_b, beta, c[i],
                      type_c, lead_c, compute, algorithm);
    }
    return SUCCESS;
}

int hipblasSgemm(void *,
                 int           op_a,
                 int           op_b,
                 int           m,
                 int           n,
                 int           k,
                 const float * alpha,
                 const float * a,
                 int           lead_a,
                 const float * b,
                 int           lead_b,
                 const float * beta,
                 float *       c,
                 int           lead_c) {
    multiply(m, n, k, *alpha, { a, F32_TYPE, lead_a, op_a == TRANSPOSED }, { b, F32_TYPE, lead_b, op_b == TRANSPOSED },
             *beta, c, F32_TYPE, lead_c);
    return SUCCESS;
}

int hipblasSgemmStridedBatched(void *        handle,
                               int           op_a,
                               int           op_b,
                               int           m,
                               int           n,
                               int           k,
                               const float * alpha,
                               const float * a,
                               int           lead_a,
                               long long     stride_a,
                               const float * b,
                               int           lead_b,
                               long long     stride_b,
                               const float * beta,
                               float *       c,
                               int           lead_c,
                               long long     stride_c,
                               int           count) {
    for (int i = 0; i < count; i++) {
        hipblasSgemm(handle, op_a, op_b, m, n, k, alpha, a + i * stride_a, lead_a, b + i * stride_b, lead_b, beta,
                     c + i * stride_c, lead_c);
    }
    return SUCCESS;
}

int hipblasSgemmBatched(void *                handle,
                        int                   op_a,
                        int                   op_b,
                        int                   m,
                        int                   n,
                        int                   k,
                        const float *         alpha,
                        const float * const * a,
                        int                   lead_a,
                        const float * const * b,
                        int                   lead_b,
                        const float *         beta,
                        float * const *       c,
                        int                   lead_c,
                        int                   count) {
    for (int i = 0; i < count; i++) {
        hipblasSgemm(handle, op_a, op_b, m, n, k, alpha, a[i], lead_a, b[i], lead_b, beta, c[i], lead_c);
    }
    return SUCCESS;
}

int hipblasStrsmBatched() {
    return NOT_SUPPORTED;
}

}  // extern "C"
