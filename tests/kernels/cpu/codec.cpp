// Runs encoders, dot products and Hadamard transforms that come in through standard input, on the implementations that this program was
// linked with.
//
//     request  "encode TYPE SCALE ROWS N", then rows of N floats
//              "dot TYPE ROWS N", then rows of the type, then as many of Q8_0
//              "fwht ...", the other numbers of struct transform, then the rows of the source
//     answer   a line "ISA TAKEN INTACT", then the bytes of the result
//
// TAKEN: threads for which ggml_turbo_cpu_fwht took the op; if none, the result is what the buffer had. INTACT: as of attn.cpp.

#include "ggml-cpu-impl.h"
#include "ggml-cpu.h"
#include "ops.h"
#include "program.h"
#include "turbo/fwht.h"
#include "turbo/kernels.h"
#include "turbo/scalar.h"

#include <iostream>
#include <memory>
#include <sstream>
#include <string>

static void answer(int taken, bool intact, const guarded & result) {
    std::cout << ggml_turbo_cpu_scalar_isa() << ' ' << taken << ' ' << intact << '\n';
    result.write();
    std::cout.flush();
}

static void encode(std::istream & line) {
    std::string type_name;
    int         scale;
    int64_t     n_rows, n;
    line >> type_name >> scale >> n_rows >> n;
    const ggml_type type     = type_of(type_name);
    const size_t    row_size = ggml_row_size(type, n);

    const guarded x(n_rows * n * sizeof(float)), y(n_rows * row_size);
    x.read();
    ggml_turbo_set_scale((ggml_turbo_scale) scale);
    for (int64_t row = 0; row < n_rows; ++row) {
        ggml_get_type_traits_cpu(type)->from_float((const float *) x.data() + row * n,
                                                   (char *) y.data() + row * row_size, n);
    }
    answer(0, x.intact() && y.intact(), y);
}

static void dot(std::istream & line) {
    std::string type_name;
    int64_t     n_rows, n;
    line >> type_name >> n_rows >> n;
    const ggml_type type   = type_of(type_name);
    const size_t    size_x = ggml_row_size(type, n);
    const size_t    size_y = ggml_row_size(GGML_TYPE_Q8_0, n);

    const guarded x(n_rows * size_x), y(n_rows * size_y), result(n_rows * sizeof(float));
    x.read();
    y.read();
    for (int64_t row = 0; row < n_rows; ++row) {
        ggml_get_type_traits_cpu(type)->vec_dot((int) n, (float *) result.data() + row, 0,
                                                (const char *) x.data() + row * size_x, 0,
                                                (const char *) y.data() + row * size_y, 0, 1);
    }
    answer(0, x.intact() && y.intact() && result.intact(), result);
}

struct transform {
    std::string type;
    int64_t     n, gap;  // a row of the source is followed by `gap` values
    int64_t     ne[3];   // rows as they lie in memory
    int         axes[4];
    int         hint;
    int         use_ref;
    int         upstream;  // 1: upstream's implementation
    int         n_threads;

    void read(std::istream & line) {
        line >> type >> n >> gap >> ne[0] >> ne[1] >> ne[2] >> axes[0] >> axes[1] >> axes[2] >> axes[3] >> hint >>
            use_ref >> upstream >> n_threads;
    }
};

static void fwht(std::istream & line) {
    transform r;
    r.read(line);
    std::unique_ptr<ggml_context, decltype(&ggml_free)> context(ggml_init({ 1 << 16, nullptr, true }), ggml_free);

    ggml_context * ctx  = context.get();
    ggml_tensor *  base = ggml_new_tensor_4d(ctx, type_of(r.type), r.n + r.gap, r.ne[0], r.ne[1], r.ne[2]);
    ggml_tensor *  rows =
        ggml_view_4d(ctx, base, r.n, r.ne[0], r.ne[1], r.ne[2], base->nb[1], base->nb[2], base->nb[3], 0);
    ggml_tensor * src    = ggml_permute(ctx, rows, r.axes[0], r.axes[1], r.axes[2], r.axes[3]);
    // without data: nobody reads the matrix
    ggml_tensor * matrix = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, src->ne[0], src->ne[0]);
    ggml_tensor * out    = ggml_mul_mat(ctx, matrix, src);
    if (r.hint) {
        ggml_mul_mat_set_hint(out, GGML_HINT_SRC0_IS_HADAMARD);
    }
    const guarded x(ggml_nbytes(base)), y(ggml_nbytes(out));
    x.read();
    src->data = x.data();
    out->data = y.data();

    int taken = 0;
    for (int ith = 0; ith < r.n_threads; ++ith) {
        ggml_compute_params params = {};
        params.ith                 = ith;
        params.nth                 = r.n_threads;
        params.use_ref             = r.use_ref != 0;
        if (r.upstream) {
            ggml_compute_forward_fwht(&params, out);
            taken++;
        } else {
            taken += ggml_turbo_cpu_fwht(&params, out);
        }
    }
    answer(taken, x.intact() && y.intact(), y);
}

int main() {
    ggml_cpu_init();
    for (std::string text; std::getline(std::cin, text);) {
        std::istringstream line(text);
        std::string        what;
        line >> what;
        if (what == "encode") {
            encode(line);
        } else if (what == "dot") {
            dot(line);
        } else if (what == "fwht") {
            fwht(line);
        } else {
            fail("not a request: " + text);
        }
    }
    return 0;
}
