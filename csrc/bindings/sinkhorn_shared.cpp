#include "otkd_fast/sinkhorn_shared.h"

#include <tuple>

#include "bindings.h"

namespace otkd_fast {
namespace {

// One call, field by field as in SinkhornSharedArgs; addresses are 0 where an operand is absent.
struct SharedCall {
    int dtype = 0, method = 0, keep = 0, gradient = 0, threads = 1;
    int64_t batch = 0, n = 0, m = 0, count = 0, num_iters = 0, apart_stride = 0;
    bool cost_transposed = false;
    double epsilon = 0, tol = 0, relaxation = 1, penalty_a = 0, penalty_b = 0, guard_a = 0, guard_b = 0;
    Address cost = 0, a = 0, b = 0, initial_f = 0, initial_g = 0, problems = 0, workspace = 0;
    Address blocks = 0, apart = 0, iterations = 0, methods = 0, kept_iterations = 0, left = 0;
    Address transport_cost = 0, regularized_cost = 0, f = 0, g = 0, marginal_error = 0;
    Address grad_transport_cost = 0, grad_regularized_cost = 0, grad_f = 0, grad_g = 0;
    Address grad_cost = 0, grad_a = 0, grad_b = 0;

    // What forward and backward have in common; all problems of the batch.
    SharedCall(int dtype, int threads, int keep, int64_t batch, int64_t n, int64_t m, int64_t num_iters, bool cost_transposed,
               double epsilon, double penalty_a, double penalty_b, double guard_a, double guard_b, Address cost, Address a,
               Address b, Address initial_f, Address initial_g)
        : dtype(dtype), keep(keep), threads(threads), batch(batch), n(n), m(m), count(batch), num_iters(num_iters),
          cost_transposed(cost_transposed), epsilon(epsilon), penalty_a(penalty_a), penalty_b(penalty_b), guard_a(guard_a),
          guard_b(guard_b), cost(cost), a(a), b(b), initial_f(initial_f), initial_g(initial_g) {}

    void set_outputs(double tolerance, double omega, Address transport, Address regularized, Address of_f, Address of_g, Address error,
                     Address iterations_run) {
        tol = tolerance;
        relaxation = omega;
        transport_cost = transport;
        regularized_cost = regularized;
        f = of_f;
        g = of_g;
        marginal_error = error;
        iterations = iterations_run;
    }

    template <class T>
    SinkhornSharedArgs<T> args() const {
        return {pointer<T>(cost), cost_transposed, pointer<T>(a), pointer<T>(b), pointer<T>(initial_f), pointer<T>(initial_g),
                pointer<int64_t>(problems), pointer<unsigned char>(workspace), batch, n, m, count, num_iters,
                static_cast<Method>(method), static_cast<Keep>(keep), epsilon, tol, relaxation, penalty_a, penalty_b, guard_a, guard_b,
                threads, pointer<T>(blocks), pointer<double>(apart), apart_stride, pointer<int64_t>(iterations),
                pointer<double>(methods), pointer<int64_t>(left), pointer<T>(transport_cost), pointer<T>(regularized_cost), pointer<T>(f),
                pointer<T>(g), pointer<T>(marginal_error), static_cast<Gradient>(gradient),
                pointer<T>(grad_transport_cost), pointer<T>(grad_regularized_cost), pointer<T>(grad_f),
                pointer<T>(grad_g), pointer<T>(grad_cost), pointer<T>(grad_a), pointer<T>(grad_b)};
    }
    int64_t workspace_bytes(bool backward) const {
        return with_type(dtype, [&](auto type) {
            using T = decltype(type);
            return kernels().of<T>().sinkhorn_shared_workspace_bytes(args<T>(), backward);
        });
    }
    int64_t forward() const {
        return with_type(dtype, [&](auto type) {
            using T = decltype(type);
            const int64_t left_over = kernels().of<T>().sinkhorn_shared_fwd(args<T>());
            keep_method();
            return left_over;
        });
    }
    // What the backward asks first; who solves a problem that is left over writes over it.
    void keep_method() const {
        const int64_t* solved = pointer<int64_t>(problems);
        for (int64_t k = 0; methods && k < count; ++k) {
            const int64_t p = solved ? solved[k] : k;
            pointer<double>(methods)[p] = method;
            pointer<int64_t>(kept_iterations)[p] = pointer<int64_t>(iterations)[p];
        }
    }
    void backward() const {
        with_type(dtype, [&](auto type) {
            using T = decltype(type);
            kernels().of<T>().sinkhorn_shared_bwd(args<T>());
        });
    }
};

// How many problems were solved in float, in double and by the dense solver.
std::tuple<int64_t, int64_t, int64_t> count_methods(Address methods, int64_t batch) {
    int64_t counts[3] = {};
    for (int64_t p = 0; p < batch; ++p) {
        for (int method = 0; method < 3; ++method) counts[method] += pointer<double>(methods)[p] == method;
    }
    return {counts[0], counts[1], counts[2]};
}

}  // namespace

void bind_sinkhorn_shared(pybind11::module_& module) {
    using Call = SharedCall;
    pybind11::class_<Call> call(module, "SinkhornSharedCall");
    call.def(pybind11::init<int, int, int, int64_t, int64_t, int64_t, int64_t, bool, double, double, double, double, double,
                            Address, Address, Address, Address, Address>());
    call.def("set_outputs", &Call::set_outputs);
    for (auto [name, field] : {std::pair{"method", &Call::method}, {"gradient", &Call::gradient}}) {
        call.def_readwrite(name, field);
    }
    for (auto [name, field] : {std::pair{"batch", &Call::batch}, {"count", &Call::count}, {"apart_stride", &Call::apart_stride}}) {
        call.def_readwrite(name, field);
    }
    for (auto [name, field] :
         {std::pair{"problems", &Call::problems}, {"workspace", &Call::workspace}, {"blocks", &Call::blocks},
          {"apart", &Call::apart}, {"iterations", &Call::iterations}, {"methods", &Call::methods},
          {"kept_iterations", &Call::kept_iterations}, {"left", &Call::left},
          {"grad_transport_cost", &Call::grad_transport_cost}, {"grad_regularized_cost", &Call::grad_regularized_cost},
          {"grad_f", &Call::grad_f}, {"grad_g", &Call::grad_g}, {"grad_cost", &Call::grad_cost},
          {"grad_a", &Call::grad_a}, {"grad_b", &Call::grad_b}}) {
        call.def_readwrite(name, field);
    }
    module.def("sinkhorn_shared_methods", &count_methods);
    call.def("workspace_bytes", &Call::workspace_bytes);
    call.def("forward", &Call::forward);
    call.def("backward", &Call::backward);
}

}  // namespace otkd_fast
