// One problem on the tile of sinkhorn_tile.h: forward.
#pragma once
#include "sinkhorn_tile.h"

namespace otkd_fast {
namespace cuda {
namespace {

template <class T, int kGroups, int kRows, int kColumns>
class TileForward {
    using Own = Tile<T, kGroups, kRows, kColumns>;
    using Memory = TileMemory<T, kColumns>;

  public:
    // False: the problem is left to the log domain, nothing was written that counts.
    OTKD_DEVICE static bool solve(const Problem<T>& p) {
        if (!p.plain()) return false;
        const Memory memory(block_warps());
        const int n = static_cast<int>(p.n), m = static_cast<int>(p.m);
        Own tile;
        OTKD_UNROLL
        for (int g = 0; g < kGroups; ++g) {
            OTKD_UNROLL
            for (int r = 0; r < kRows; ++r) {
                OTKD_UNROLL
                for (int c = 0; c < kColumns; ++c) tile.k[g][r][c] = static_cast<T>(kInfinity);
            }
        }
        Own::for_entries(n, m, [&](int g, int r, int c, int i, int j) { tile.k[g][r][c] = p.cost[i * m + j]; });
        T low, high;
        tile.cost_range(memory.scratch, low, high);
        const double range = (static_cast<double>(high) - low) / p.args.epsilon + given_range(p, memory.scratch);
        if (!(range <= Limits<T>::kRange)) return false;
        tile.exponentiate(low, p.args.epsilon);

        T u[kGroups] = {};
        int64_t ran = 0;
        if (!iterate(p, tile, memory, u, ran)) return false;
        finish(p, tile, memory, u, low, ran);
        return true;
    }

  private:
    // `memory.sums` holds K^T u of the last iteration at the end. False: a sum has left the safe range.
    OTKD_DEVICE static bool iterate(const Problem<T>& p, const Own& tile, const Memory& memory, T (&u)[kGroups], int64_t& ran) {
        const int n = static_cast<int>(p.n), m = static_cast<int>(p.m);
        T a[kGroups], s[kGroups], v[kColumns];
        OTKD_UNROLL
        for (int g = 0; g < kGroups; ++g) a[g] = Own::own_row(g) < n ? static_cast<T>(p.mass_a(Own::own_row(g))) : T(0);
        for (int j = thread_id(); j < Memory::kWidth; j += block_threads()) {
            const T mass = j < m ? static_cast<T>(p.mass_b(j)) : T(0);
            memory.mass[j] = mass;
            memory.v[j] = mass > 0 ? static_cast<T>(exp(p.start_gamma(j))) : T(0);
        }
        barrier();
        bool bad = false;
        double column_error = 0;
        for (; ran < p.args.num_iters; ++ran) {
            Own::load_columns(memory.v, v);
            tile.row_sums(v, s);
            if (p.args.tol > 0 && ran > 0) {
                double error = column_error;
                OTKD_UNROLL
                for (int g = 0; g < kGroups; ++g) {
                    if (Own::counts()) error += fabs(static_cast<double>(u[g]) * s[g] - a[g]);
                }
                if (block_sum(error, memory.scratch) <= p.args.tol) break;
            }
            OTKD_UNROLL
            for (int g = 0; g < kGroups; ++g) {
                u[g] = a[g] > 0 ? a[g] / s[g] : T(0);
                bad |= a[g] > 0 && !safe(s[g]);
                if (p.args.keep == Keep::all && Own::counts() && Own::own_row(g) < n) {
                    p.template kept_u<T>(ran)[Own::own_row(g)] = u[g];
                }
            }
            tile.column_sums(u, memory.partial);
            barrier();
            column_error = 0;
            for (int j = thread_id(); j < Memory::kWidth; j += block_threads()) {
                const T total = memory.column_sum(j), mass = memory.mass[j], next = mass > 0 ? mass / total : T(0);
                bad |= mass > 0 && !safe(total);
                column_error += fabs(static_cast<double>(next) * total - mass);
                if (p.args.keep == Keep::last_step && j < m) p.template kept_v<T>(0)[j] = memory.v[j];
                memory.v[j] = next;
                memory.sums[j] = total;
                if (p.args.keep == Keep::all && j < m) p.template kept_v<T>(ran)[j] = next;
            }
            barrier();
        }
        return !barrier_any(bad);
    }

    OTKD_DEVICE static void finish(const Problem<T>& p, const Own& tile, const Memory& memory, const T (&u)[kGroups], T low,
                                   int64_t ran) {
        const int n = static_cast<int>(p.n), m = static_cast<int>(p.m);
        const double shift = static_cast<double>(low) / p.args.epsilon;
        T *f = p.args.f ? p.args.f + p.index * n : nullptr, *g_out = p.args.g ? p.args.g + p.index * m : nullptr;
        T v[kColumns];
        Own::load_columns(memory.v, v);
        double moved_total = 0;
        SideSums rows, columns;
        OTKD_UNROLL
        for (int g = 0; g < kGroups; ++g) {
            T mass[kRows], moved[kRows];
            OTKD_UNROLL
            for (int r = 0; r < kRows; ++r) {
                mass[r] = moved[r] = 0;
                OTKD_UNROLL
                for (int c = 0; c < kColumns; ++c) {
                    const T kv = tile.k[g][r][c] * v[c];
                    mass[r] += kv;
                    // K is 0 outside of (n, m) and for forbidden pairs
                    if (kv > 0) moved[r] += kv * p.cost[Own::row(g, r) * m + Own::column(c)];
                }
            }
            const T row_mass = exchange_sums(mass), row_moved = exchange_sums(moved);
            const int i = Own::own_row(g);
            if (!Own::counts() || i >= n) continue;
            const double own = static_cast<double>(u[g]);
            moved_total += own * row_moved;
            rows.add(p.mass_a(i), log(own) + shift, own * row_mass, p.penalty_a(), f ? f + i : f);
            if (p.args.keep == Keep::last || p.args.keep == Keep::last_step) p.template kept_u<T>(p.last_slot(ran))[i] = u[g];
        }
        for (int j = thread_id(); j < m; j += block_threads()) {
            const double own = static_cast<double>(memory.v[j]);
            columns.add(p.mass_b(j), log(own), own * memory.sums[j], p.penalty_b(), g_out ? g_out + j : g_out);
            if (p.args.keep == Keep::last || p.args.keep == Keep::last_step) {
                p.template kept_v<T>(p.last_slot(ran))[j] = memory.v[j];
            }
        }
        rows.over_block(memory.scratch);
        columns.over_block(memory.scratch);
        write_scalars(p, rows, columns, block_sum(moved_total, memory.scratch), ran);
        close_history<T>(p, Method::scaling_float, ran);
    }
};

}  // namespace
}  // namespace cuda
}  // namespace otkd_fast
